"""Tests of yields as text, of selections and of shards, and of the command show_yields."""

from __future__ import annotations

import pytest
from samples import call_script, write_tar

from sdtrain.data.manifest import write_manifest
from sdtrain.data.yields import count_shards, show_bytes, show_selection, show_shards
from sdtrain.io.files import write_json

COUNTS = {"null": 1, "alone_kept": 2, "alone_dropped": 3, "kept": 1_234, "dropped": 4}
FILTERS = [{"column": "w", "predicate": ">= 1", **COUNTS}, {"column": "group", "predicate": "!= flags", **COUNTS}]
RESULT = {"rows": 5_000, "predicates": FILTERS, "kept": 350, "train": 325, "held_out": 25}


def test_each_filter_of_a_selection_is_a_row():
    rows, header, first, second, kept = show_selection(RESULT).splitlines()
    assert (rows, kept) == ("rows: 5,000", "kept 350: train 325, held out 25")
    assert header.split() == "null alone kept alone dropped kept dropped".split()
    assert first.split() == ["w", ">=", "1", "1", "2", "3", "1,234", "4"]
    assert second.startswith("group != flags ") and len(first) == len(second) == len(header)
    assert show_selection(RESULT | {"predicates": []}).splitlines() == [rows, kept]


def test_duplicates_rows_and_download_size_are_shown():
    more = {"without_url": 3, "duplicates": {"column": "url", "dropped": 4}, "rows_limit": 2, "size_from": "b"}
    sizes = {"bytes": {"train": 12_345_678, "held_out": 0}}
    assert show_selection(RESULT | more | sizes).splitlines()[4:] == [
        "rows without a url dropped: 3",
        "duplicates of url dropped: 4",
        "random rows requested: 2",
        "kept 350: train 325, held out 25",
        "expected download: train 12.3 MB, held out 0 B (from b)",
    ]


def test_yields_of_shards_are_shown():
    manifest = {"samples": 4, "dropped": {"filters": 3, "none": 0}, "shards": []}
    assert show_shards(manifest) == "no filter was applied\ndropped, filters: 3\nkept 4"
    lines = show_shards(manifest | {"yields": FILTERS}).splitlines()
    assert lines[1].startswith("w >= 1") and lines[3:] == ["dropped, filters: 3", "kept 4"]


def test_bytes_are_shown_in_their_unit():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "1.0 MB", 2.5e12: "2.5 TB", 1e16: "10,000.0 TB"}
    assert {size: show_bytes(size) for size in sizes} == sizes


def test_shards_are_counted_per_partition():
    cases = {(0, 10, 4): 0, (10, 10, 1): 1, (11, 10, 1): 2, (11, 10, 4): 4, (2, 10, 4): 2, (100, 1, 7): 100}
    assert {case: count_shards(*case) for case in cases} == cases


def show(capsys, path, **more) -> str:
    """Run show_yields; return its output."""
    arguments = {"yields": path, "samples_per_shard": 100, "parts": 3} | more
    call_script("show_yields", [f"{key}={value}" for key, value in arguments.items()])
    return capsys.readouterr().out


def test_the_command_shows_a_selection_and_its_shards(tmp_path, capsys):
    write_json(tmp_path / "yields.json", RESULT)
    said = show(capsys, tmp_path / "yields.json")
    assert "w >= 1" in said and "shards of 100 in 3 parts: train 6, held out 1" in said


def test_the_command_shows_a_manifest(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("a", {"txt": b"x"})])
    write_manifest(tmp_path / "manifest.json", "images", [tmp_path / "0.tar"], {"filters": 7}, {}, yields=FILTERS)
    said = show(capsys, tmp_path / "manifest.json")
    assert "w >= 1" in said and said.endswith("dropped, filters: 7\nkept 1\nshards: 1\n")


@pytest.mark.parametrize(
    "change, message",
    [({"parts": 0}, "parts: must be a positive whole number, got '0'"), ({}, "none.json: not a readable JSON")],
)
def test_command_with_invalid_input_is_an_error(tmp_path, capsys, change, message):
    with pytest.raises(SystemExit, match=message):
        show(capsys, tmp_path / "none.json", **change)
