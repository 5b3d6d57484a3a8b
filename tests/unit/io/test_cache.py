"""Tests of the local cache: each file is made once and atomically, and the oldest ones are deleted."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from sdtrain.io.cache import LocalCache
from sdtrain.io.storage import StorageError

DATA = bytes(range(256)) * 4000


@pytest.fixture
def address(tmp_path):
    """Return a `pipe:` address of DATA whose command logs each run in tmp_path/log."""
    (tmp_path / "data").write_bytes(DATA)
    return f"pipe:echo x >> {tmp_path}/log; cat {tmp_path}/data"


def fetch(folder: Path, address: str) -> bytes:
    with LocalCache(folder).fetch(address) as file:
        return file.read()


def test_concurrent_processes_make_one_copy(address, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(fetch, [(tmp_path / "cache", address)] * 12)
    assert set(found) == {DATA} and (tmp_path / "log").read_text().count("x") == 1


def test_partial_copy_of_a_killed_process_is_replaced(address, tmp_path):
    cache = LocalCache(tmp_path / "cache")
    fetch(cache.folder, address)
    path = cache.path(address)
    os.replace(path, path.with_name(f".{path.name}.tmp"))
    os.truncate(path.with_name(f".{path.name}.tmp"), 100)
    assert fetch(cache.folder, address) == DATA == path.read_bytes()


def test_failed_copy_leaves_no_file(tmp_path):
    with pytest.raises(StorageError, match="exit code 3"):
        fetch(tmp_path, "pipe:echo half; exit 3")
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_least_recently_used_file_is_deleted_and_open_files_stay_readable(tmp_path):
    cache, made = LocalCache(tmp_path, 2), []

    def read(name: str) -> bytes:
        def write(path: Path) -> None:
            made.append(name)
            path.write_bytes(name.encode())

        with cache.open(name, write) as file:
            for path in tmp_path.iterdir() if name == "gone" else ():
                path.unlink()
            return file.read()

    assert [read(name) for name in "abac"] == [b"a", b"b", b"a", b"c"] and made == ["a", "b", "c"]
    assert read("a") == b"a" and made == ["a", "b", "c"]  # b, the least recently used, was deleted
    assert read("gone") == b"gone"


def test_cache_without_a_limit_deletes_no_file(tmp_path):
    for name in "abcde":
        LocalCache(tmp_path).open(name, lambda path: path.write_bytes(b"x")).close()
    assert len([path for path in tmp_path.iterdir() if not path.suffix]) == 5
