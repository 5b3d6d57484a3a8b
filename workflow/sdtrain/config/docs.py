"""Generate docs/configuration.md from the schema: `python -m sdtrain.config.docs > docs/configuration.md`, or --check.

A line `<!-- keys SCHEMA SECTION -->` of the template becomes the table of a section's keys; without a section, of the
schema's own keys. `configuration.tests.yaml` names the tests that show what a key does.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sdtrain.config import schema, schema_data
from sdtrain.config.keys import Key, all_keys
from sdtrain.errors import ConfigError, one_line_errors

FOLDER = Path(__file__).resolve().parents[3] / "docs"
PAGE, TEMPLATE, TESTS = (FOLDER / f"configuration.{ending}" for ending in ("md", "in.md", "tests.yaml"))
SCHEMAS: tuple[type, ...] = (schema.RunConfig, schema_data.DataConfig, schema_data.ComponentConfig)
NAMED = {kind.__name__: kind for kind in (schema.StageConfig, *SCHEMAS)}  # in marks
MARK = re.compile(r"^<!-- keys (\w+) ?([\w.]*) -->$", re.MULTILINE)


def keys_of_table(kind: type, section: str) -> list[Key]:
    """Return the keys of one table: those below a section, or the schema's own keys that are in no section."""
    keys = [entry for entry in all_keys(kind) if not entry.section]
    if section:
        return [entry for entry in keys if entry.name.startswith(f"{section}.")]
    return [entry for entry in keys if entry.name in kind.__annotations__]  # without those of its base class


def default_text(value: Any) -> str:
    """Return a default as in YAML, and `none` for null."""
    if isinstance(value, list):
        return f"[{', '.join(map(default_text, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def meaning(entry: Key) -> str:
    """Return the meaning of a key, with its choices and bounds."""
    choices = ", ".join(f"`{choice}`" for choice in entry.choices)
    sentences = [entry.metadata["help"], choices and f"One of {choices}", entry.limits.capitalize()]
    return ". ".join(sentence for sentence in sentences if sentence).replace("|", "\\|")


def table(keys: list[Key], tests: Any) -> str:
    """Return the Markdown table of keys; its last column names tests if there are any for these keys."""
    shown = any(entry.name in tests.shown_by for entry in keys)
    rows = [["key", "default", "meaning", *["shown by"] * shown], ["---"] * (3 + shown)]
    for entry in keys:
        mark = " *" if entry.name in tests.open_diffusion else ""
        row = [f"`{entry.name}`{mark}", f"`{default_text(entry.default)}`", meaning(entry)]
        rows.append(row + [", ".join(f"`{test}`" for test in tests.shown_by.get(entry.name, []))] * shown)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def render() -> str:
    """Return the page. Raise ConfigError if a key is in no table, or in two."""
    template, tests = TEMPLATE.read_text(encoding="utf-8"), OmegaConf.load(TESTS)
    found: Counter[str] = Counter()

    def fill(mark: re.Match[str]) -> str:
        name, section = mark.groups()
        if name not in NAMED:
            raise ConfigError(f"{TEMPLATE}: {mark[0]}: no schema {name}; use one of {', '.join(NAMED)}")
        keys = keys_of_table(NAMED[name], section)
        found.update(entry.name for entry in keys)
        return table(keys, tests)

    page = MARK.sub(fill, template)
    wanted = Counter(entry.name for kind in SCHEMAS for entry in all_keys(kind) if not entry.section)
    if wrong := sorted(name for name in wanted | found if wanted[name] != found[name]):
        raise ConfigError(f"{TEMPLATE}: every key must be in one table; not so: {', '.join(wrong)}")
    return page


def main(argv: list[str]) -> None:
    """Print the page; with --check, exit with an error if docs/configuration.md differs from it."""
    with one_line_errors():
        page = render()
        if argv[1:] != ["--check"]:
            print(page, end="")
        elif PAGE.read_text(encoding="utf-8") != page:
            remedy = "run: python -m sdtrain.config.docs > docs/configuration.md"
            raise ConfigError(f"{PAGE}: differs from the schema or from {TEMPLATE.name}; {remedy}")


if __name__ == "__main__":
    main(sys.argv)
