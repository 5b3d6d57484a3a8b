"""Tests of storage: paths, S3, HTTP and commands give the same bytes, and errors name the address."""

from __future__ import annotations

import contextlib
import http.server
import multiprocessing
import os
import threading

import pytest

from sdtrain.io import storage
from sdtrain.io.storage import StorageError

DATA = bytes(range(256)) * 12_000  # about 3 MB: several blocks


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve DATA: complete, in ranges, truncated, behind a redirect, or without a length."""

    def do_GET(self):
        self.server.paths.append(self.path)
        name = self.path.split("/")[1]
        wanted = self.headers.get("Range") if name in ("ranges", "cut-range") else None
        if name == "away":
            self.send_response(302)
            self.send_header("Location", "/whole")
            return self.end_headers()
        if name not in ("whole", "ranges", "cut", "cut-range", "nolength"):
            return self.send_error(404)
        body = DATA
        if wanted:
            begin, end = (int(edge) for edge in wanted.removeprefix("bytes=").split("-"))
            body = DATA[begin : end + 1]
        self.send_response(206 if wanted else 200)
        if name != "nolength":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the reader closed the connection
            self.wfile.write(body[: len(body) // 2] if name.startswith("cut") else body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.paths = True, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["path", "file", "s3", "http", "http without ranges", "redirect"])
def address(request, tmp_path):
    """Return an address of DATA, one of each kind."""
    path = tmp_path / "a b.bin"
    path.write_bytes(DATA)
    if request.param in ("path", "file"):
        return str(path) if request.param == "path" else path.as_uri()
    if request.param == "s3":
        return request.getfixturevalue("s3").put("storage/a b.bin", DATA)
    url = request.getfixturevalue("web").url
    return url + {"http": "/ranges", "http without ranges": "/whole", "redirect": "/away"}[request.param]


def test_every_kind_of_address_gives_the_same_bytes(address, tmp_path):
    assert storage.read(address) == DATA
    assert storage.read(address, limit=len(DATA)) == DATA
    with storage.local(address) as path, open(path, "rb") as file:
        assert file.read() == DATA
    with open(tmp_path / "copy", "wb") as file:
        file.write(b"before")
        storage.copy(address, file)
    assert (tmp_path / "copy").read_bytes() == b"before" + DATA
    with pytest.raises(StorageError, match="more than 1,000 bytes"):
        storage.read(address, limit=1000)


def test_every_kind_of_address_supports_byte_ranges(address):
    assert storage.read_range(address, 0, 10) == DATA[:10]
    assert storage.read_range(address, 1_234_567, 89) == DATA[1_234_567 : 1_234_567 + 89]
    assert storage.read_range(address, len(DATA) - 5, 100) == DATA[-5:]


def test_pipe_command_is_read_and_copied(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(DATA)
    with storage.local(f"pipe:cat {path} | tail -c 1000") as copy, open(copy, "rb") as file:
        assert file.read() == DATA[-1000:]
    assert not os.path.exists(copy)
    with open(tmp_path / "all", "wb") as file:
        file.write(b"before")
        storage.copy(f"pipe:head -c 10 {path}", file)
        storage.copy(f"pipe:head -c 5 {path}", file)
    assert (tmp_path / "all").read_bytes() == b"before" + DATA[:10] + DATA[:5]


def test_failure_anywhere_in_a_pipe_command_is_an_error(tmp_path):
    for command in (f"cat {tmp_path}/none", f"cat {tmp_path}/none | cat"):
        with pytest.raises(StorageError, match=r"the command failed with exit code 1: .*none: No such file"):
            with storage.local(f"pipe:{command}"):
                raise AssertionError
    with pytest.raises(StorageError, match="failed with exit code 7: no output"), open(tmp_path / "x", "wb") as file:
        storage.copy("pipe:exit 7", file)


@pytest.mark.parametrize("path", ["/cut", "/cut-range"])
def test_a_body_that_is_cut_off_is_an_error(web, tmp_path, path):
    url = web.url + path
    with pytest.raises(StorageError, match="cut off after"), open(tmp_path / "x", "wb") as file:
        storage.copy(url, file)
    with pytest.raises(StorageError, match=r"cut off|IncompleteRead"):
        storage.read(url)
    with pytest.raises(StorageError, match="cut off"):
        storage.read(url, limit=len(DATA))
    if path == "/cut-range":
        with pytest.raises(StorageError, match="cut off after 50 of 100 bytes"):
            storage.read_range(url, 0, 100)


def test_a_body_without_a_length_is_read_to_its_end(web):
    assert storage.read(f"{web.url}/nolength") == DATA


def test_braces_globs_and_folders(tmp_path, s3):
    for name in ("00000.tar", "00001.tar", "00002.tar", "deep/00003.tar", "[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        s3.put(f"globs/{name}", b"x")
    for root in (str(tmp_path), s3.url("globs")):
        assert storage.expand(f"{root}/{{00002..00001}}.tar") == [f"{root}/00002.tar", f"{root}/00001.tar"]
        assert storage.expand(f"{root}/0*.tar") == [f"{root}/0000{i}.tar" for i in range(3)]
        assert storage.expand(f"{root}/{{deep/*,00000}}.tar") == [f"{root}/deep/00003.tar", f"{root}/00000.tar"]
        assert storage.expand(f"{root}/none.tar") == [f"{root}/none.tar"]  # an error only when it is read
        assert len(storage.walk(root)) == 5 and storage.walk(f"{root}/00000.tar") == [f"{root}/00000.tar"]
        assert storage.walk(f"{root}/none.tar") == []
        with pytest.raises(StorageError, match=r"z\*.tar: no file matches"):
            storage.expand(f"{root}/z*.tar")
    assert storage.expand(tmp_path / "[1].tar") == [f"{tmp_path}/[1].tar"]
    assert storage.expand("pipe:cat {a..b}*.tar") == ["pipe:cat a*.tar", "pipe:cat b*.tar"]
    assert storage.expand("https://example.org/{0..1}.tar?x=*")[1] == "https://example.org/1.tar?x=*"
    with pytest.raises(StorageError, match="unbalanced braces"):
        storage.expand(f"{tmp_path}/{{0..1.tar")


def test_objects_added_to_s3_later_are_found(s3):
    s3.put("later/0.tar", b"0")
    assert len(storage.expand(s3.url("later/*.tar"))) == 1
    s3.put("later/1.tar", b"1")
    assert len(storage.expand(s3.url("later/*.tar"))) == 2
    s3.put("later/1.tar", b"22")
    assert storage.read(s3.url("later/1.tar")) == b"22"


def test_unreadable_address_is_named(tmp_path, s3, web):
    addresses = [f"{tmp_path}/none", s3.url("none"), "s3://nobucket/x", f"{web.url}/none", "http://127.0.0.1:9/x"]
    for address in [*addresses, "zz://x", f"{tmp_path}"]:
        for attempt in (
            storage.read,
            lambda a: storage.read_range(a, 0, 4),
        ):
            with pytest.raises(StorageError) as error:
                attempt(address)
            assert address in str(error.value) and "\n" not in str(error.value)


def test_s3_can_be_read_after_a_fork(s3):
    """Loader processes are forked from a process that has used S3."""
    address = s3.put("fork/a", DATA)
    assert storage.read(address) == DATA
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = [pool.apply_async(storage.read_range, (address, i * 1000, 10)) for i in range(4)]
        assert [f.get(timeout=60) for f in found] == [DATA[i * 1000 :][:10] for i in range(4)]
