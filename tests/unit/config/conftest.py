"""Fixtures of the tests of configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def project(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """Return a function that writes a file of that name and text to `configs/` of a new working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/data").mkdir(parents=True)

    def write(name: str, text: str) -> Path:
        path = Path("configs", name)
        path.write_text(text)
        return path

    return write
