"""Read the command line of the scripts: `key=value` arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdtrain.config.load import load_config, require
from sdtrain.errors import ConfigError, did_you_mean


def command_line(
    argv: list[str], schema: type | None, about: str, **defaults: str | None
) -> tuple[Any, dict[str, str]]:
    """Read `key=value` arguments: `config=FILE`, dot-list overrides of it, and the command's own keys.

    `defaults` are the command's own keys and their defaults; None means that the key is required. Return the config
    (None without a schema) and the command's own keys. Print usage and exit for `--help` and for a wrong argument.
    """
    keys = {**defaults, "config": None} if schema else defaults
    names = [f"{key}=…" if value is None else f"[{key}={value}]" for key, value in defaults.items()]
    usage = " ".join([f"usage: {Path(argv[0]).name}", *names])
    usage += " config=FILE.yaml [section.key=value …]" if schema else ""
    if any(argument in ("-h", "--help") for argument in argv[1:]):
        print(f"{about}\n\n{usage}")
        raise SystemExit(0)
    own, overrides = {key: value for key, value in keys.items() if value is not None}, []
    for argument in argv[1:]:
        key, equals, value = argument.partition("=")
        if not equals:
            raise SystemExit(f"error: {argument!r} must be key=value\n{usage}")
        if key in keys:
            own[key] = value
        elif schema:
            overrides.append(argument)
        else:
            raise SystemExit(f"error: unknown key {key!r}{did_you_mean(key, list(defaults))}\n{usage}")
    if missing := [f"{key}=…" for key in keys if key not in own]:
        raise SystemExit(f"error: missing {', '.join(missing)}\n{usage}")
    if schema is None:
        return None, own
    try:
        return require(load_config(schema, own["config"], overrides), own["config"]), own
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None


def positive(text: str, key: str) -> int:
    """Return an argument as a positive whole number. Raise ConfigError if it is not one."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ConfigError(f"{key}: must be a positive whole number, got {text!r}")
    return int(text)
