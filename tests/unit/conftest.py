"""Fixtures of the tests of fetch_table and build_shards: loopback servers, and folders in which the commands run."""

from __future__ import annotations

import downloads
import fetching
import pytest


@pytest.fixture(scope="module")
def server():
    """Serve valid and faulty images on loopback; see tests/downloads.py."""
    with downloads.serve() as server:
        yield server


@pytest.fixture
def reset(server):
    """Reset the server of images."""
    downloads.reset(server)


@pytest.fixture
def work(tmp_path, server):
    """Return a folder in which build_shards can be started."""
    return downloads.Work(tmp_path, server)


@pytest.fixture
def web():
    """Serve the content of `web.routes`, which a test fills, on loopback."""
    with fetching.serve_routes() as server:
        yield server


@pytest.fixture
def fetcher(tmp_path, capsys):
    """Return what runs fetch_table in the test's folder."""
    return fetching.Fetcher(tmp_path, capsys)
