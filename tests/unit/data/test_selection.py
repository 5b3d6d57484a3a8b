"""Tests of select_samples: yields, duplicates, random rows, expected download, and the held-out split by hash."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from samples import call_script, kill_script, run_script

from sdtrain.data.selection import choose

N = 400
OUTPUTS = ("train", "held_out", "yields")


def rows(n=N) -> pa.Table:
    return pa.table(
        {
            "url": [f"https://example.org/{i}.jpg" for i in range(n)],
            "caption": [f"caption {i}" for i in range(n)],
            "width": [None if i % 10 == 9 else 100 + i for i in range(n)],
            "group": ["flags" if i % 4 == 0 else "food" for i in range(n)],
            "concept": [f"concept {i // 4}" for i in range(n)],
        }
    )


def arguments(folder, config: dict) -> list[str]:
    """Return the arguments of select_samples for the table in `folder`."""
    (folder / "select.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    out = [f"{name}={folder}/out/{name}.{'json' if name == 'yields' else 'parquet'}" for name in OUTPUTS]
    return [f"config={folder}/select.yaml", f"table={folder}/table.parquet", *out]


@pytest.fixture
def select(tmp_path, capsys):
    """Run the command; return (train, held out, yields) or None, and its output."""

    def run(config: dict, table: pa.Table | None = None, row_group_size=1000):
        pq.write_table(rows() if table is None else table, tmp_path / "table.parquet", row_group_size=row_group_size)
        out = tmp_path / "out"
        for path in out.glob("*"):
            path.unlink()
        try:
            call_script("select_samples", arguments(tmp_path, config))
        except SystemExit as error:
            assert not list(out.glob("*")) and not list(out.glob(".*")), "half-written results"
            return None, str(error)
        found = (*(pq.read_table(out / f"{name}.parquet") for name in OUTPUTS[:2]),)
        return (*found, json.loads((out / "yields.json").read_text())), capsys.readouterr().out

    return run


def test_filters_select_rows_and_yields_are_recorded(select):
    (train, held_out, yields), said = select({"filters": {"width": ">=200", "group": "!=flags"}})
    expected = [r for r in rows().to_pylist() if r["width"] is not None and r["width"] >= 200 and r["group"] != "flags"]
    assert train.to_pylist() == expected and held_out.num_rows == 0
    assert (yields["rows"], yields["kept"], yields["train"], yields["held_out"]) == (N, len(expected), len(expected), 0)
    assert yields["after_filters"] == len(expected) and yields["duplicates"] is yields["rows_limit"] is None
    width, group = yields["predicates"]
    assert (width["null"], width["alone_kept"], width["alone_dropped"]) == (40, 270, 130)
    assert (group["alone_kept"], group["alone_dropped"], group["kept"]) == (300, 100, len(expected))
    assert "width >= 200" in said and "group != flags" in said


def test_hash_of_the_value_decides_the_split(select):
    held = {"column": "concept", "fraction": 0.25, "seed": 3}
    (train, held_out, _), _ = select({"held_out": held})

    def outside(value):
        return int(hashlib.sha256(f"3:{value}".encode()).hexdigest()[:16], 16) / 2**64 < 0.25

    assert held_out.to_pylist() == [r for r in rows().to_pylist() if outside(r["concept"])]
    assert train.to_pylist() == [r for r in rows().to_pylist() if not outside(r["concept"])]
    assert 0.1 < held_out.num_rows / N < 0.4

    # filters and other rows do not move a value to the other split
    (_, fewer, _), _ = select({"held_out": held, "filters": {"group": "food"}})
    assert set(fewer["concept"].to_pylist()) <= set(held_out["concept"].to_pylist())
    (_, part, _), _ = select({"held_out": held}, rows(200))
    assert part.to_pylist() == [r for r in held_out.to_pylist() if int(r["concept"].split()[1]) < 50]
    (_, other, _), _ = select({"held_out": held | {"seed": 4}})
    assert other.to_pylist() != held_out.to_pylist()


@pytest.mark.parametrize("values", [[3, 1, 3], [0.5, 2.0, 0.5], [True, False, True], ["é", "", "é"], [None, 1, None]])
def test_every_type_of_value_belongs_to_a_split(select, values):
    table = rows(3).append_column("key", pa.array(values))
    held = {"column": "key", "fraction": 0.5}
    for seed in range(20):
        sides = [int(hashlib.sha256(f"{seed}:{v}".encode()).hexdigest()[:16], 16) / 2**64 < 0.5 for v in values]
        if len(set(sides)) == 2:
            break
    (_, held_out, _), _ = select({"held_out": held | {"seed": seed}}, table)
    assert held_out["key"].to_pylist() == [v for v, out in zip(values, sides, strict=True) if out]


@pytest.mark.parametrize("values", ["text", "number", "float"])
def test_deduplication_keeps_the_first_row_that_passes(select, values):
    draw = random.Random(0)
    drawn = [draw.choice([None, *range(40)]) for _ in range(N)]
    as_type = {"text": lambda v: f"v{v}", "number": int, "float": float}[values]
    keys = [None if v is None else as_type(v) for v in drawn]
    table = rows().append_column("key", pa.array(keys))
    (train, _, yields), said = select({"filters": {"width": ">=150"}, "deduplicate": "key"}, table, 64)
    seen, expected = set(), []
    for row in table.to_pylist():
        if row["width"] is not None and row["width"] >= 150 and (row["key"] is None or row["key"] not in seen):
            seen.add(row["key"])
            expected.append(row)
    assert train.to_pylist() == expected
    passed = sum(w is not None and w >= 150 for w in table["width"].to_pylist())
    assert yields["after_filters"] == passed
    assert yields["duplicates"] == {"column": "key", "dropped": passed - len(expected)}
    assert f"duplicates of key dropped: {passed - len(expected)}" in said


def test_rows_without_a_url_are_dropped_and_counted(select):
    urls = [None if i % 5 == 0 else f"https://example.org/{i % 100}.jpg" for i in range(N)]
    table = rows().set_column(0, "url", pa.array(urls))
    (train, held_out, yields), said = select({"filters": {"group": "food"}, "held_out": {"fraction": 0.2}}, table, 64)
    expected = [r for r in table.to_pylist() if r["group"] == "food" and r["url"] is not None]
    assert train.num_rows + held_out.num_rows == yields["kept"] == len(expected) == 240
    assert not train["url"].null_count and not held_out["url"].null_count
    assert (yields["after_filters"], yields["without_url"]) == (300, 60)
    assert "rows without a url dropped: 60" in said
    (train, _, yields), _ = select({"deduplicate": "url", "rows": 10**6}, table)
    assert yields["without_url"] == 80 and yields["duplicates"]["dropped"] == 240 and train.num_rows == 80


def test_random_rows_depend_only_on_the_seed(select):
    config = {"filters": {"group": "food"}, "deduplicate": "concept", "rows": 30, "seed": 5}
    (train, _, yields), _ = select(config)
    assert train.num_rows == yields["kept"] == yields["rows_limit"] == 30 and yields["after_filters"] == 300
    assert len(set(train["concept"].to_pylist())) == 30 and set(train["group"].to_pylist()) == {"food"}
    urls = train["url"].to_pylist()
    assert urls == [url for url in rows()["url"].to_pylist() if url in set(urls)], "the table's order is kept"
    (again, _, _), _ = select(config, row_group_size=7)
    assert again.equals(train), "the batch size has no effect"
    (other, _, _), _ = select(config | {"seed": 6})
    assert not other.equals(train)
    (train, held_out, yields), _ = select({"rows": 200, "held_out": {"fraction": 0.5}})
    assert train.num_rows + held_out.num_rows == yields["kept"] == 200 and held_out.num_rows > 50


def test_every_row_is_equally_likely():
    passing, counts = pa.array([True] * 20), Counter()
    for seed in range(2000):
        config = type("Config", (), {"deduplicate": None, "rows": 5, "seed": seed})
        chosen, _ = choose(passing, None, config)
        assert chosen.true_count == 5
        counts.update(i for i, kept in enumerate(chosen.to_pylist()) if kept)
    assert all(400 < counts[i] < 600 for i in range(20))  # 500 expected, 5 standard deviations are 97


def test_fewer_rows_than_requested_are_kept_with_a_message(select):
    (train, _, yields), said = select({"filters": {"group": "flags"}, "rows": 1000})
    assert train.num_rows == yields["kept"] == 100
    assert "random rows requested: 1,000; only 100 are left, and all are kept" in said


@pytest.mark.parametrize(
    "size, train, source",
    [
        ({}, 2 * 150_000, "150,000 bytes an image"),
        ({"width": "w", "height": "h"}, 100 * 50 * 0.25 + 150_000, "w x h x 0.25 bytes a pixel"),
        (
            {"width": "w", "height": "h", "bytes_per_pixel": 0.5, "bytes_per_image": 7},
            2507,
            "w x h x 0.5 bytes a pixel",
        ),
        ({"bytes": "b", "width": "w", "height": "h", "bytes_per_image": 5}, 1005, "b"),
        ({"bytes": "none", "width": "w", "height": "url", "bytes_per_image": 5}, 10, "5 bytes an image"),
    ],
)
def test_expected_download_is_recorded(select, size, train, source):
    table = rows(4).append_column("w", pa.array([100, None, 10, -7])).append_column("h", pa.array([50, 50, 20, -7]))
    table = table.append_column("b", pa.array([1000, None, 3.0, 2.0])).append_column("side", pa.array([0, 0, 1, 2]))
    (_, _, yields), said = select({"filters": {"side": "==0"}, "size": size}, table)
    assert yields["bytes"] == {"train": train, "held_out": 0} and yields["size_from"] == source
    assert f"(from {source})" in said and "expected download: train" in said


def test_both_splits_have_an_expected_download(select):
    config = {"held_out": {"fraction": 0.3}, "size": {"bytes": "bytes"}}
    table = rows().append_column("bytes", pa.array(range(N)))
    (train, held_out, yields), _ = select(config, table)
    sums = {name: sum(side["bytes"].to_pylist()[1:]) for name, side in (("train", train), ("held_out", held_out))}
    assert sums["train"] + 150_000 == yields["bytes"]["train"]  # row 0 states 0 bytes, which is not a valid size
    assert held_out["bytes"][0].as_py() + sums["held_out"] == yields["bytes"]["held_out"]


def test_the_same_rows_give_the_same_bytes(select, tmp_path):
    config = {"filters": {"width": ">=150"}, "held_out": {"column": "url", "fraction": 0.5}, "rows": 70}
    digests = []
    for size in (1000, 1000, 33):
        select(config, row_group_size=size)
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / "out").iterdir())])
    assert digests[0] == digests[1] == digests[2]


def test_null_counts_as_a_separate_value(select):
    table = rows().set_column(4, "concept", pa.array([None] * N, pa.string()))
    result, said = select({"held_out": {"column": "concept", "fraction": 0.01}}, table)
    assert result is None and "nothing is held out" in said


@pytest.mark.parametrize(
    "config, message",
    [
        ({"filters": {"width": ">=9000"}}, "the selection is empty"),
        ({"filters": {"widht": ">=1"}}, "no column widht; did you mean width?"),
        ({"filters": {"width": ">=big"}}, "filters.width: cannot parse the predicate '>=big'"),
        ({"held_out": {"column": "consept", "fraction": 0.1}}, "no column consept; did you mean concept?"),
        ({"held_out": {"fraction": 1.5}}, "held_out.fraction: must be at least 0 and less than 1, got 1.5"),
        ({"held_out": {"column": "url", "fraction": 1e-9}}, "nothing is held out"),
        ({"deduplicate": "ulr"}, "no column ulr; did you mean url?"),
        ({"rows": 0}, ": rows: must be at least 1, got 0"),
        ({"filter": {}}, "unknown key filter; did you mean filters?"),
    ],
)
def test_invalid_input_is_an_error_and_leaves_no_file(select, config, message):
    result, said = select(config)
    assert result is None and message in said


def test_an_empty_selection_shows_which_filter_emptied_it(select):
    _, said = select({"filters": {"group": "!=flags", "width": ">=9000"}})
    assert "group != flags" in said and "width >= 9000" in said and "loosen" in said


def test_a_missing_table_is_a_clear_error(tmp_path):
    done = run_script("select_samples", *arguments(tmp_path, {}))
    assert done.returncode and "table.parquet: no table there" in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["select.yaml"]


def test_killed_selection_ends_with_the_same_bytes(tmp_path):
    pq.write_table(rows(150_000), tmp_path / "table.parquet", row_group_size=10_000)
    held_out = {"fraction": 0.3, "column": "concept"}
    command = arguments(tmp_path, {"deduplicate": "url", "rows": 100_000, "held_out": held_out})
    out = tmp_path / "out"
    assert not kill_script("select_samples", command)
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(expected) == 3
    draw, killed = random.Random(0), 0
    points = [{"replaces": number} for number in range(3)] + [{"after": draw.uniform(0, 0.5)} for _ in range(10)]
    for point in points:
        for path in out.iterdir():
            path.unlink()
        killed += kill_script("select_samples", command, **point)
        left = {path.name: path.read_bytes() for path in out.iterdir()}
        assert all(data == expected[name] for name, data in left.items() if not name.startswith("."))
        kill_script("select_samples", command, after=draw.uniform(0, 0.5))  # once more, with the files that remain
        assert len(list(out.iterdir())) <= 6, "temporary files of killed processes accumulate"
    assert killed >= 3
    assert not kill_script("select_samples", command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
