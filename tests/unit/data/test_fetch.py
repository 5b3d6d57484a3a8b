"""Tests of fetch_table as a command: tables from files, web and S3 addresses, and a loopback dataset hub."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fetching import COMMIT, NOWHERE
from pyarrow import csv
from samples import kill_script

from sdtrain.config import schema_data
from sdtrain.config.keys import keys_of
from sdtrain.data.fetch import FORMS

# ---------------------------------------------------------------- files
ROWS = pa.table(
    {"URL": ["https://example.org/a.jpg", "https://example.org/b.jpg"], "TEXT": ["a", "b"], "WIDTH": [1, 2]}
)
COLUMNS = {"url": "URL", "caption": "TEXT", "original_width": "WIDTH"}


def parquet(table=ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_every_form_of_the_schema_is_in_the_registry_or_the_demo_and_no_other():
    assert {*FORMS, "emoji"} == set(keys_of(schema_data.TableConfig)["kind"].choices)


def test_files_become_one_table_under_our_names(fetcher, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.parquet").write_bytes(parquet())
    table, said = fetcher.command({"kind": "files", "path": f"{tmp_path}/*.parquet", "columns": COLUMNS})
    assert table.column_names == ["url", "caption", "original_width"] and table.num_rows == 4
    assert "4 rows" in said


def test_a_url_is_downloaded_and_checked(fetcher, web):
    web.routes["/some/t.parquet"] = parquet()
    config = {"path": f"{web.url}/some/t.parquet", "columns": COLUMNS}
    table, said = fetcher.here(config | {"sha256": "0" * 64})
    assert table is None and "sha256 is" in said and "delete the file" in said
    table, _ = fetcher.here(config | {"sha256": hashlib.sha256(parquet()).hexdigest()})
    assert table.num_rows == 2 and web.asked == ["/some/t.parquet"], "what was fetched is not fetched again"


def test_another_url_with_the_same_file_name_is_another_file(fetcher, web):
    web.routes |= {"/v1/t.parquet": parquet(), "/v2/t.parquet": parquet(ROWS.slice(0, 1))}
    for version, rows in ((1, 2), (2, 1)):
        table, _ = fetcher.here({"path": f"{web.url}/v{version}/t.parquet", "columns": COLUMNS})
        assert table.num_rows == rows


def test_urls_in_braces_are_all_downloaded(fetcher, web):
    web.routes |= {"/0.parquet": parquet(), "/1.parquet": parquet(ROWS.slice(1))}
    table, _ = fetcher.here({"path": f"{web.url}/{{0..1}}.parquet", "columns": COLUMNS})
    assert table["caption"].to_pylist() == ["a", "b", "b"]


def test_urls_in_braces_with_one_file_name_are_different_files(fetcher, web):
    web.routes |= {"/a/t.parquet": parquet(ROWS.slice(0, 1)), "/b/t.parquet": parquet(ROWS.slice(1))}
    table, _ = fetcher.here({"path": f"{web.url}/{{a,b}}/t.parquet", "columns": COLUMNS})
    assert table["caption"].to_pylist() == ["a", "b"] and web.asked == ["/a/t.parquet", "/b/t.parquet"]


def test_a_download_that_is_cut_off_is_an_error_and_then_made_again(fetcher, web):
    web.routes["/t.parquet"], web.cut_after = parquet(), 100
    config = {"path": f"{web.url}/t.parquet", "columns": COLUMNS}
    table, said = fetcher.here(config)
    assert table is None and "cannot be read (cut off after 100 of" in said
    web.cut_after = None
    assert fetcher.here(config)[0].num_rows == 2


def test_table_on_s3_is_read_in_place(fetcher, s3):
    for name in "ab":
        address = s3.put(f"fetch/{name}.parquet", parquet())
    table, _ = fetcher.here({"path": s3.url("fetch"), "columns": COLUMNS})
    assert table.num_rows == 4
    table, _ = fetcher.here({"path": address, "columns": COLUMNS, "sha256": hashlib.sha256(parquet()).hexdigest()})
    assert table.num_rows == 2


def test_paths_of_images_become_urls(fetcher, tmp_path):
    folder = tmp_path / "some images"
    folder.mkdir()
    (folder / "ü 1.jpg").write_bytes(b"pixels")
    urls = [
        "ü 1.jpg",
        "./sub/../2#.jpg",
        "/abs/3.jpg",
        "https://example.org/a b.jpg",
        "s3://x/y.jpg",
        "data:image/png,x",
    ]
    csv.write_csv(pa.table({"url": [*urls, None], "caption": list("abcdefg")}), folder / "t.csv")
    table, _ = fetcher.here({"path": str(folder)})
    here, quoted = folder.as_uri(), "%C3%BC%201.jpg"
    assert table["url"].to_pylist()[:6] == [f"{here}/{quoted}", f"{here}/2%23.jpg", "file:///abs/3.jpg", *urls[3:]]
    with urllib.request.urlopen(table["url"][0].as_py()) as answer:
        assert answer.read() == b"pixels"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": None}, "table.path: missing"),
        ({"path": "none/*.csv"}, "none/*.csv: no table there"),
        ({"path": "none/{a"}, "none/{a: no table there (unbalanced braces"),
        ({"path": f"{NOWHERE}/t.parquet"}, "/t.parquet: cannot be read"),
        ({"path": f"{NOWHERE}/{{0..1}}.parquet", "sha256": "0" * 64}, "/0.parquet: cannot be read"),
        ({"path": "{a,b}.parquet", "sha256": "0" * 64}, "table.sha256: must belong to a single file, but"),
        ({"columns": {"url": "Url"}}, "columns.url: no column Url; did you mean URL?"),
        ({"columns": {"url": "URL"}}, "no column caption"),
        ({"columns": {"url": "WIDTH", "caption": "TEXT"}}, "the column url holds int64, expected texts"),
        ({"kind": "file"}, "table.yaml: kind: must be one of files, hub, emoji, got 'file'; did you mean files?"),
        ({"columm": {}}, "unknown key columm; did you mean columns?"),
    ],
)
def test_invalid_input_is_an_error_and_leaves_no_file(fetcher, tmp_path, change, message):
    (tmp_path / "t.parquet").write_bytes(parquet())
    table, said = fetcher.here({"path": f"{tmp_path}/t.parquet", "columns": COLUMNS} | change)
    assert table is None and message in said


def test_an_empty_table_is_refused(fetcher, tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet(ROWS.slice(0, 0)))
    table, said = fetcher.here({"path": f"{tmp_path}/t.parquet", "columns": COLUMNS})
    assert table is None and "the table has no rows" in said


def test_killed_fetch_ends_with_the_same_bytes(web, tmp_path):
    """Kill it at random times and just before each rename, while it downloads tables."""
    n = 60_000
    many = {"url": [f"images/{i}.jpg" for i in range(n)], "caption": [f"caption {i}" for i in range(n)]}
    web.routes |= {f"/{i}.parquet": parquet(pa.table(many).slice(i * n // 2, n // 2)) for i in range(2)}
    (tmp_path / "table.yaml").write_text(f"path: {web.url}/{{0..1}}.parquet")
    output = tmp_path / "data" / "table.parquet"
    command = [f"config={tmp_path}/table.yaml", f"output={output}"]

    def files():
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}

    assert not kill_script("fetch_table", command)
    expected = files()
    assert len(expected) == 3
    draw, killed = random.Random(0), 0
    for point in [{"replaces": i} for i in range(3)] + [{"after": draw.uniform(0, 0.5)} for _ in range(10)]:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)  # the process may be killed before it creates the folder
        killed += kill_script("fetch_table", command, **point)
        assert all(data == expected[name] for name, data in files().items() if not Path(name).name.startswith("."))
        kill_script("fetch_table", command, after=draw.uniform(0, 0.5))  # once more, with the remaining files in place
        assert len(files()) <= 2 * len(expected), "temporary files of killed processes accumulate"
    assert killed >= 3
    assert not kill_script("fetch_table", command)
    assert files() == expected


# ---------------------------------------------------------------- hub
def test_a_dataset_repository_is_fetched_at_its_commit(fetcher, web):
    files = {"data/0.parquet": parquet(), "data/1.parquet": parquet(), "README.md": b"words"}
    siblings = [{"rfilename": name} for name in files]
    info = {"id": "some/set", "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
    web.routes[f"/api/datasets/some/set/revision/{COMMIT}"] = json.dumps(info).encode()
    tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
    web.routes[f"/api/datasets/some/set/tree/{COMMIT}"] = json.dumps(tree).encode()
    for name, body in files.items():
        web.routes[f"/datasets/some/set/resolve/{COMMIT}/{name}"] = body
    config = {"kind": "hub", "repo": "some/set", "revision": COMMIT, "columns": COLUMNS}
    table, said = fetcher.command(config, HF_ENDPOINT=web.url)
    assert table is not None, said
    assert table.num_rows == 4 and table.column_names[:2] == ["url", "caption"]


def test_unreachable_hub_or_unknown_commit_is_an_error(fetcher, web):
    config = {"kind": "hub", "repo": "some/set", "revision": COMMIT, "columns": COLUMNS}
    for endpoint in (NOWHERE, web.url):
        table, said = fetcher.command(config, HF_ENDPOINT=endpoint)
        assert table is None and "some/set@0123" in said and "check network and names" in said
    table, said = fetcher.command(config | {"revision": "main"})
    assert table is None and "a commit of 40 hex digits" in said
