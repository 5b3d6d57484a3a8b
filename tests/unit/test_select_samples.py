"""select_samples, run as a command: the filters' yields, and a held-out split that a value's hash alone decides."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "workflow" / "scripts" / "select_samples.py"
N = 400


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


@pytest.fixture
def select(tmp_path):
    """Run the command; returns (train, held out, yields) or None, and what it said."""

    def run(config: dict, table: pa.Table | None = None):
        pq.write_table(rows() if table is None else table, tmp_path / "table.parquet")
        (tmp_path / "select.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        out = {key: tmp_path / "out" / f"{key}.parquet" for key in ("train", "held_out")}
        yields = tmp_path / "out" / "yields.json"
        command = [sys.executable, SCRIPT, f"config={tmp_path}/select.yaml", f"table={tmp_path}/table.parquet"]
        command += [f"{key}={path}" for key, path in out.items()] + [f"yields={yields}"]
        for path in (*out.values(), yields):
            path.unlink(missing_ok=True)
        env = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        if done.returncode:
            assert not yields.parent.exists() or not list(yields.parent.iterdir()), "half-written results"
            return None, said
        return (*(pq.read_table(path) for path in out.values()), json.loads(yields.read_text())), said

    return run


def test_filters_select_and_their_yields_are_told(select):
    (train, held_out, yields), said = select({"filters": {"width": ">=200", "group": "!=flags"}})
    expected = [r for r in rows().to_pylist() if r["width"] is not None and r["width"] >= 200 and r["group"] != "flags"]
    assert train.to_pylist() == expected and held_out.num_rows == 0
    assert (yields["rows"], yields["kept"], yields["train"], yields["held_out"]) == (N, len(expected), len(expected), 0)
    width, group = yields["predicates"]
    assert (width["null"], width["alone_kept"], width["alone_dropped"]) == (40, 270, 130)
    assert (group["alone_kept"], group["alone_dropped"], group["kept"]) == (300, 100, len(expected))
    assert "width >= 200" in said and "group != flags" in said


def test_the_hash_of_the_value_alone_decides_the_side(select):
    held = {"column": "concept", "fraction": 0.25, "seed": 3}
    (train, held_out, _), _ = select({"held_out": held})

    def outside(value):
        return int(hashlib.sha256(f"3:{value}".encode()).hexdigest()[:16], 16) / 2**64 < 0.25

    assert held_out.to_pylist() == [r for r in rows().to_pylist() if outside(r["concept"])]
    assert train.to_pylist() == [r for r in rows().to_pylist() if not outside(r["concept"])]
    assert 0.1 < held_out.num_rows / N < 0.4

    # filters, or other rows, move no value to the other side
    (_, fewer, _), _ = select({"held_out": held, "filters": {"group": "food"}})
    assert set(fewer["concept"].to_pylist()) <= set(held_out["concept"].to_pylist())
    (_, part, _), _ = select({"held_out": held}, rows(200))
    assert part.to_pylist() == [r for r in held_out.to_pylist() if int(r["concept"].split()[1]) < 50]
    (_, other, _), _ = select({"held_out": held | {"seed": 4}})
    assert other.to_pylist() != held_out.to_pylist()


def test_the_same_input_gives_the_same_bytes(select, tmp_path):
    config = {"filters": {"width": ">=150"}, "held_out": {"column": "url", "fraction": 0.5}}
    digests = []
    for _ in range(2):
        select(config)
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / "out").iterdir())])
    assert digests[0] == digests[1]


def test_a_null_is_a_value_of_its_own(select):
    table = rows().set_column(4, "concept", pa.array([None] * N, pa.string()))
    result, said = select({"held_out": {"column": "concept", "fraction": 0.01}}, table)
    assert result is None and "nothing is held out" in said


@pytest.mark.parametrize(
    "config, message",
    [
        ({"filters": {"width": ">=9000"}}, "the selection is empty"),
        ({"filters": {"widht": ">=1"}}, "no column widht; did you mean width?"),
        ({"filters": {"width": ">=big"}}, "filters.width: cannot read predicate '>=big'"),
        ({"held_out": {"column": "consept", "fraction": 0.1}}, "no column consept; did you mean concept?"),
        ({"held_out": {"column": "url", "fraction": 1.5}}, "select.held_out.fraction: 1.5 is not in [0, 1)"),
        ({"held_out": {"column": "url", "fraction": 1e-9}}, "nothing is held out"),
        ({"filter": {}}, "unknown key filter; did you mean filters?"),
    ],
)
def test_bad_input_says_what_and_leaves_nothing(select, config, message):
    result, said = select(config)
    assert result is None and message in said


def test_an_empty_selection_shows_which_filter_emptied_it(select):
    _, said = select({"filters": {"group": "!=flags", "width": ">=9000"}})
    assert "group != flags" in said and "width >= 9000" in said and "loosen" in said


def test_a_missing_table_is_a_clear_error(tmp_path):
    (tmp_path / "select.yaml").write_text("{}")
    command = [sys.executable, SCRIPT, f"config={tmp_path}/select.yaml", f"table={tmp_path}/none.parquet"]
    command += [f"{key}={tmp_path}/{key}" for key in ("train", "held_out", "yields")]
    env = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode and "none.parquet: no table there" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["select.yaml"]
