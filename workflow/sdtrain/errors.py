"""The errors that users are expected to meet, and the hint to a name that was probably meant."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class SDTrainError(Exception):
    """An error with a message for the user: what is wrong, where (file, key), the value found, and what to do.

    Modules derive their own classes from it. Commands print the message as one line, without a traceback.
    """


class ConfigError(SDTrainError, ValueError):
    """A configuration or an argument that cannot be used."""


class DataError(SDTrainError, ValueError):
    """Data, a shard or a manifest that cannot be used; the message names the file and the remedy."""


@contextlib.contextmanager
def one_line_errors(prefix: str = "") -> Iterator[None]:
    """End the command with `error: {prefix}{message}` and exit code 1 on an SDTrainError or an OSError."""
    try:
        yield
    except (SDTrainError, OSError) as error:
        raise SystemExit(f"error: {prefix}{error}") from None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean …?` with the nearest of the known names, or `; known here: …` if none is near."""
    names = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(word.replace("-", "_").lower(), names, 1, cutoff=0.5)
    if near:
        return f"; did you mean {prefix}{names[near[0]]}?"
    return f"; known here: {', '.join(names.values()) or 'none'}"
