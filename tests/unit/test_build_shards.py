"""build_shards, run as a command: img2dataset really downloads, is judged by its statistics, goes on after a kill."""

from __future__ import annotations

import fcntl
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sdtrain.shards import ShardWriter, index_tar, read_manifest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "workflow" / "scripts" / "build_shards.py"
CONFIG = {"image_size": 16, "samples_per_shard": 4, "processes": 1, "threads": 4, "retries": 0, "columns": ["group"]}


def png(number: int, size=(24, 16)) -> bytes:
    """Left half of a colour of its own, right half transparent."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((10 * number, 200, 40, 255), (0, 0, size[0] // 2, size[1]))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """`/{number}.png` is an image; `server.broken` and `server.absent` numbers are not; `server.slow` seconds each."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        number = int(Path(self.path).stem)
        time.sleep(self.server.slow * (number % 3))  # so that they end out of order
        if number in self.server.absent:
            return self.send_error(404)
        body = b"no image" if number in self.server.broken else png(number)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def serve():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.asked, server.absent, server.broken, server.slow = Counter(), set(), set(), 0.02
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server():
    with serve() as server:
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def reset(server):
    server.asked, server.absent, server.broken, server.slow = Counter(), set(), set(), 0.02


class Work:
    """A folder in which the command is started or run on a selection of `n` images."""

    def __init__(self, folder: Path, server):
        self.folder, self.output, self.server = folder, folder / "shards" / "manifest.json", server

    def select(self, n: int):
        urls = [f"http://127.0.0.1:{self.server.server_port}/{i}.png" for i in range(n)]
        table = {"url": urls, "caption": [f"caption {i}" for i in range(n)], "group": ["even", "odd"] * (n // 2)}
        pq.write_table(pa.table(table), self.folder / "selected.parquet")

    def start(self, environment=None, **config):
        (self.folder / "shards.yaml").write_text(yaml.safe_dump(CONFIG | config))
        command = [sys.executable, SCRIPT, f"config={self.folder}/shards.yaml", f"output={self.output}"]
        if "path" not in config:
            command.append(f"selection={self.folder}/selected.parquet")
        env = os.environ | {"PYTHONPATH": str(ROOT / "workflow")} | (environment or {})
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

    def run(self, **config):
        process = self.start(**config)
        said, _ = process.communicate(timeout=120)
        assert "Traceback" not in said, said
        assert (process.returncode == 0) == self.output.exists(), said
        return (read_manifest(self.output, full=True) if self.output.exists() else None), said


@pytest.fixture
def work(tmp_path, server):
    return Work(tmp_path, server)


@pytest.fixture(scope="module")
def built(tmp_path_factory, server):
    """A build of ten images, of which 1, 2 and 5 fail; tests that change something work on a copy."""
    work = Work(tmp_path_factory.mktemp("built"), server)
    server.absent, server.broken = {1, 5}, {2}
    work.select(10)
    manifest, said = work.run()
    return work, manifest, said


@pytest.fixture
def copy(built, tmp_path, server):
    shutil.copytree(built[0].folder, tmp_path, dirs_exist_ok=True)
    work = Work(tmp_path, server)
    work.output.unlink()
    return work


def samples(manifest: dict) -> list[dict]:
    """Every sample's metadata, image and caption, in order."""
    found = []
    for row in manifest["shards"]:
        for sample in index_tar(row["path"]):
            image = Image.open(io.BytesIO(sample.read("jpg")))
            found.append(json.loads(sample.read("json")) | {"image": image, "txt": sample.read("txt").decode()})
    return found


def test_images_become_shards_whatever_order_they_arrive_in(built):
    _, manifest, said = built
    assert manifest["samples"] == 7 and [row["samples"] for row in manifest["shards"]] == [2, 3, 2], said
    for number, sample in zip([0, 3, 4, 6, 7, 8, 9], samples(manifest), strict=True):
        assert (sample["txt"], sample["caption"]) == (f"caption {number}", f"caption {number}")
        assert sample["group"] == ("even", "odd")[number % 2]
        assert (sample["original_width"], sample["original_height"]) == (24, 16)
        image = sample["image"]
        assert image.mode == "RGB" and image.size == (24, 16)  # the shorter side is 16 already
        left, right = image.getpixel((4, 8)), image.getpixel((20, 8))
        assert max(abs(a - b) for a, b in zip(left, (10 * number, 200, 40), strict=True)) < 12
        assert min(right) > 245, "transparent parts come out white"


def test_failures_are_counted_by_reason(built):
    _, manifest, said = built
    assert sum(manifest["dropped"].values()) == 3 and "3 dropped" in said
    assert manifest["dropped"]["HTTP Error 404: Not Found"] == 2


def test_a_damaged_shard_is_made_again_with_the_same_bytes(copy, built, server):
    server.absent, server.broken = {1, 5}, {2}
    shard = copy.folder / "shards" / built[1]["shards"][1]["name"]
    shard.write_bytes(shard.read_bytes()[:2000])
    manifest, said = copy.run()
    assert manifest["fingerprint"] == built[1]["fingerprint"], said
    assert sorted(server.asked) == [f"/{i}.png" for i in range(4, 8)], "whole shards are left as they are"


def test_another_size_is_another_folder(copy, built):
    manifest, _ = copy.run(image_size=8)
    assert manifest["samples"] == 10 and samples(manifest)[0]["image"].size == (12, 8)
    assert Path(manifest["shards"][0]["name"]).parent != Path(built[1]["shards"][0]["name"]).parent


def test_too_few_images_are_an_error_and_are_asked_again(work, server):
    server.absent = set(range(4, 10))
    work.select(10)
    manifest, said = work.run()
    assert manifest is None and "4 of 10 images arrived" in said and "6  HTTP Error 404" in said
    server.absent = set()
    manifest, said = work.run()
    assert manifest["samples"] == 10, said
    assert [server.asked[f"/{i}.png"] for i in range(10)] == 4 * [1] + 6 * [2]


def test_a_killed_build_goes_on_where_it_was(work, server):
    work.select(12)
    server.slow = 0.3
    process = work.start(threads=1)
    wait(lambda: list(work.output.parent.glob("*/00000_stats.json")))
    process.kill()
    process.communicate()
    assert not work.output.exists()
    manifest, said = work.run(threads=1)
    if manifest is None:  # the img2dataset that the killed build left is still at work
        assert "another build still writes there" in said
        wait(lambda: free(work))
        manifest, said = work.run(threads=1)
    assert manifest["samples"] == 12, said
    assert [server.asked[f"/{i}.png"] for i in range(4)] == [1] * 4


def test_a_terminated_build_ends_its_img2dataset(work, server):
    work.select(12)
    server.slow = 5
    process = work.start(threads=1, environment={"BUILD": work.folder.name})
    wait(lambda: server.asked)
    assert not free(work) and len(alive(work)) > 2
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode and not work.output.exists()
    assert free(work)
    wait(lambda: not alive(work), 10)


def alive(work) -> list[str]:
    """The processes of a build that carries its folder's name in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"BUILD={work.folder.name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


def free(work) -> bool:
    """Whether no build holds the folder."""
    (lock,) = work.output.parent.glob("*/.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait(ready, limit=60):
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def test_existing_shards_are_adopted_in_place(work, tmp_path):
    with ShardWriter(tmp_path / "there", 2) as writer:
        for i in range(4):
            writer.add(f"{i:04d}", {"jpg": b"x", "cls": b"7"})
    manifest, _ = work.run(path=f"{tmp_path}/there/{{00000..00001}}.tar")
    assert manifest["samples"] == 4 and [row["name"] for row in manifest["shards"]] == [
        "../there/00000.tar",
        "../there/00001.tar",
    ]
    work.output.unlink()
    manifest, said = work.run(path=f"{tmp_path}/there/{{00000..00002}}.tar")
    assert manifest is None and "00002.tar: shard is missing" in said


@pytest.mark.parametrize(
    "config, message",
    [
        ({"columns": ["grup"]}, "has no column grup; did you mean group?"),
        ({"columns": ["width"]}, "shards.columns: width is written by img2dataset itself"),
        ({"resize_mode": "stretch"}, "img2dataset failed"),
        ({"environment": {"IMG2DATASET": "/none/img2dataset"}}, "img2dataset is not there (/none/img2dataset)"),
        ({"colums": []}, "unknown key colums; did you mean columns?"),
    ],
)
def test_bad_input_says_what_and_leaves_nothing(work, config, message):
    work.select(4)
    manifest, said = work.run(**config)
    assert manifest is None and message in said


def test_missing_and_empty_selections_are_refused(work):
    manifest, said = work.run()
    assert manifest is None and "selected.parquet: cannot read the selection" in said
    work.select(0)
    manifest, said = work.run()
    assert manifest is None and "no rows" in said and "select.held_out.fraction" in said
