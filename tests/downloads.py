"""A loopback image server with the faults of web servers, and builds of shards that download from it."""

from __future__ import annotations

import functools
import http.server
import io
import os
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from samples import ROOT

from sdtrain.data.manifest import read_manifest
from sdtrain.data.verify import find_faults

CONFIG = {"image_size": 16, "samples_per_shard": 4, "processes": 1, "threads": 4, "retries": 0, "columns": ["group"]}
ENVIRONMENT = {  # img2dataset imports many modules three times per run, so bytecode is kept between runs
    **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
    "PYTHONPATH": str(ROOT / "workflow"),
    "PYTHONPYCACHEPREFIX": f"{tempfile.gettempdir()}/sdtrain-bytecode-{os.getuid()}",
}


def png(number: int, size=(24, 16), background=(0, 0, 0, 0)) -> bytes:
    """Return a PNG whose left half has a colour that depends on the number; the right half is transparent."""
    image = Image.new("RGBA", size, background)
    image.paste((10 * number % 256, 200, 40, 255), (0, 0, size[0] // 2, size[1]))
    image = image.convert("RGB") if background[3] else image
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


@functools.cache
def bomb(side: int = 30_000) -> bytes:
    """Return a black PNG of `side` x `side` pixels in 110 kB."""
    deflate = zlib.compressobj()
    rows = bytes(1 + side // 8) * 100
    body = b"".join(deflate.compress(rows) for _ in range(side // 100)) + deflate.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer `/{number}.png` with an image, and `/{manner}/{number}.png` with one of the faults below.

    Answers are delayed by up to two times `server.slow` seconds, so that downloads finish out of order. Numbers in
    `server.absent` are answered with 404.
    """

    def do_GET(self):
        self.server.asked[self.path] += 1
        self.server.agents.add(self.headers["User-Agent"])
        *_, manner, name = self.path.split("/")
        number = int(Path(name).stem)
        time.sleep(self.server.slow * (number % 3))
        if manner in ("404", "500", "503") or number in self.server.absent:
            return self.send_error(int(manner or 404))
        if manner == "once" and self.server.asked[self.path] == 1:
            return self.send_error(500)
        if manner == "hang":
            time.sleep(6)
        if manner in ("redirect", "loop"):
            self.send_response(302)
            self.send_header("Location", self.path if manner == "loop" else f"/{name}")
            return self.end_headers()
        self.answer(manner, number)

    def answer(self, manner: str, number: int):
        bodies = {
            "html": lambda: b"<html>no image</html>",
            "empty": lambda: b"",
            "bomb": bomb,
            "strip": lambda: png(number, (400, 16)),
            "opaque": lambda: png(number, (16, 16), (0, 0, 0, 255)),
            "small": lambda: png(number, (24, 8)),
        }
        body = bodies.get(manner, lambda: png(number))()
        self.send_response(200)
        if manner == "noai":
            self.send_header("X-Robots-Tag", "noai, noimageai")
        self.send_header("Content-Length", str(len(body) + (1000 if manner == "short" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serve() -> Iterator[http.server.ThreadingHTTPServer]:
    """Run the server as a context."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # a client closed its connection
        reset(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def reset(server) -> None:
    """Reset the record of requests and the behaviour of the server."""
    server.asked, server.agents, server.absent, server.slow = Counter(), set(), set(), 0.02


class Work:
    """A folder in which build_shards is started or run, on a selection of images of the server."""

    def __init__(self, folder: Path, server):
        self.folder, self.output, self.server = folder, folder / "shards" / "manifest.json", server

    def select(self, paths: int | list[str], **columns) -> None:
        """Write a selection of these paths of the server, or of this many images."""
        paths = [f"{i}.png" for i in range(paths)] if isinstance(paths, int) else paths
        n = len(paths)
        table = {"url": [f"http://127.0.0.1:{self.server.server_port}/{path}" for path in paths]}
        table |= {"caption": [f"caption {i}" for i in range(n)], "group": [("even", "odd")[i % 2] for i in range(n)]}
        pq.write_table(pa.table(table | columns), self.folder / "selected.parquet", row_group_size=5)

    def start(self, environment=None, part=0, parts=1, output=None, program=(), **config) -> subprocess.Popen:
        """Start the command, or another `program` for Python with its arguments, in a process group of its own."""
        (self.folder / "shards.yaml").write_text(yaml.safe_dump(CONFIG | config))
        arguments = {
            "config": self.folder / "shards.yaml",
            "selection": self.folder / "selected.parquet",
            "part": part,
            "parts": parts,
            "output": output or self.output,
        }
        return subprocess.Popen(
            [
                sys.executable,
                *(program or [ROOT / "workflow/scripts/build_shards.py"]),
                *(f"{k}={v}" for k, v in arguments.items()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=ENVIRONMENT | {"BUILD": str(self.folder)} | (environment or {}),
            start_new_session=True,
        )

    def run(self, **config) -> tuple[dict | None, str]:
        """Run the command to its end; return the manifest, or None, and the output."""
        process = self.start(**config)
        said, _ = process.communicate(timeout=120)
        output = config.get("output") or self.output
        assert "Traceback" not in said, said
        assert (process.returncode == 0) == output.exists(), said
        assert not output.exists() or find_faults(output) == [], said
        return (read_manifest(output) if output.exists() else None), said


def content(output: Path) -> dict[str, bytes]:
    """Return the bytes of a build's files: the manifest (without the digest of the code), tars and indices."""
    folder = output.parent
    paths = [*folder.glob("*/[0-9]*.tar"), *folder.glob("*/[0-9]*.parquet")]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return found | {output.name: re.sub(rb'"code": "\w+"', b"", output.read_bytes())}


def wait(ready, limit=60) -> None:
    """Wait until `ready()` is true."""
    end = time.monotonic() + limit
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
