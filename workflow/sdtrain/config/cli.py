"""The command line of the scripts: `key=value` arguments."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sdtrain.config.load import load_config, require
from sdtrain.errors import ConfigError, did_you_mean


def command_line(
    argv: list[str], schema: type | None, about: str, **defaults: str
) -> tuple[DictConfig, dict[str, str]]:
    """Read `key=value` arguments: `config=FILE`, dot-list overrides of it, and the command's own keys.

    `defaults` are the command's own keys (None: required). Returns the config (None without a schema) and those keys.
    `--help` or a wrong key prints usage and ends.
    """
    usage = f"usage: {Path(argv[0]).name} " + " ".join(
        f"{k}=…" if v is None else f"[{k}={v}]" for k, v in defaults.items()
    )
    if schema is not None:
        usage += " config=FILE.yaml [section.key=value …]"
    if any(a in ("-h", "--help") for a in argv[1:]):
        print(f"{about}\n\n{usage}")
        raise SystemExit(0)
    own, rest = dict(defaults), []
    for argument in argv[1:]:
        key, eq, value = argument.partition("=")
        if not eq:
            raise SystemExit(f"error: {argument!r} is not key=value\n{usage}")
        if key in own or (key == "config" and schema is not None):
            own[key] = value
        elif schema is not None:
            rest.append(argument)
        else:
            raise SystemExit(f"error: unknown key {key!r}{did_you_mean(key, list(defaults))}\n{usage}")
    absent = [k for k, v in own.items() if v is None] + (
        ["config"] if schema is not None and "config" not in own else []
    )
    if absent:
        raise SystemExit(f"error: missing {', '.join(f'{k}=…' for k in absent)}\n{usage}")
    if schema is None:
        return None, own
    try:
        return require(load_config(schema, own["config"], rest), own["config"]), own
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
