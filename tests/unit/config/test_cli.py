"""Tests of the command line of the scripts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from sdtrain.config.cli import command_line, positive
from sdtrain.errors import ConfigError


# ---------------------------------------------------------------- commands
@dataclass
class Settings:
    size: int = 3
    names: list[str] = field(default_factory=list)


def command(*arguments, schema=Settings, **own):
    return command_line(["scripts/do.py", *map(str, arguments)], schema, "Do it.", **own)


def test_command_line_reads_config_overrides_and_own_keys(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("names: [a]")
    cfg, own = command(f"config={file}", "size=5", "output=x=y", output=None, extra="1")
    assert (cfg.size, list(cfg.names), own["output"], own["extra"]) == (5, ["a"], "x=y", "1")
    assert command("a=2", schema=None, a=None) == (None, {"a": "2"})


def test_help_prints_usage(capsys):
    with pytest.raises(SystemExit) as end:
        command("--help", output=None, extra="1")
    assert end.value.code == 0
    assert (
        capsys.readouterr().out == "Do it.\n\nusage: do.py output=… [extra=1] config=FILE.yaml [section.key=value …]\n"
    )


def test_command_line_errors_name_the_remedy(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("sizes: 4")
    for arguments, message in [
        (["config"], "error: 'config' must be key=value\nusage: do.py output=…"),
        (["output=x"], "error: missing config=…\nusage"),
        ([f"config={file}"], "error: missing output=…\nusage"),
        ([f"config={file}", "output=x"], f"error: {file}: unknown key sizes; did you mean size?"),
        ([f"config={tmp_path / 'absent.yaml'}", "output=x"], "no such file"),
    ]:
        with pytest.raises(SystemExit) as end:
            command(*arguments, output=None)
        assert message in str(end.value.code)
    with pytest.raises(SystemExit, match="error: unknown key 'outputs'; did you mean output"):
        command("outputs=x", schema=None, output=None)


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "²", "", "many"])
def test_positive_names_key_and_value(text):
    assert positive("12", "parts") == 12
    with pytest.raises(ConfigError, match=f"parts: must be a positive whole number, got '{text}'"):
        positive(text, "parts")
