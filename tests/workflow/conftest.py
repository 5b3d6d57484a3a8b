"""Fixtures of the planning tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import Plan, make_checkout, snakemake


@pytest.fixture
def plan() -> Callable[..., Plan]:
    """Return plan(tree, *arguments), a dry run with the local profile."""
    return lambda tree, *arguments: snakemake(tree, "--profile", "profiles/local", "--dry-run", *arguments)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Make a working copy without results."""
    return make_checkout(tmp_path / "checkout")
