"""Fixtures of the tests of build_shards: a server of images, good and bad, and a folder to build in."""

from __future__ import annotations

import downloads
import pytest


@pytest.fixture(scope="module")
def server():
    """A server on loopback; see tests/downloads.py."""
    with downloads.serve() as server:
        yield server


@pytest.fixture
def reset(server):
    """The server as it was at its start."""
    downloads.reset(server)


@pytest.fixture
def work(tmp_path, server):
    """A folder in which build_shards can be started."""
    return downloads.Work(tmp_path, server)
