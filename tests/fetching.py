"""Run the command fetch_table in tests, with a loopback web server whose responses the test defines."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from samples import ROOT, call_script

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"  # no server listens there


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer from `server.routes`, path -> body; a body is cut off after `server.cut_after` bytes."""

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


@contextlib.contextmanager
def serve_routes() -> Iterator[http.server.ThreadingHTTPServer]:
    """Run the server as a context."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.routes, server.url = {}, f"http://127.0.0.1:{server.server_port}"
        server.asked, server.cut_after = [], None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Fetcher:
    """Run fetch_table on configurations; each run returns the table, or None, and the output."""

    def __init__(self, folder: Path, capsys):
        self.folder, self.output, self.capsys = folder, folder / "data" / "table.parquet", capsys

    def here(self, config: dict) -> tuple[pa.Table | None, str]:
        """Run it in this process, which is fast; the default is `kind: files`."""
        said = ""
        try:
            call_script("fetch_table", self._arguments({"kind": "files"} | config))
        except SystemExit as error:
            said = str(error)
        return self._result(not said, said + self.capsys.readouterr().out)

    def command(self, config: dict, **environment: str) -> tuple[pa.Table | None, str]:
        """Run the command in a new process that can reach only loopback."""
        script = str(ROOT / "workflow/scripts/fetch_table.py")
        env = os.environ | {
            "npm_config_registry": NOWHERE,
            "npm_config_cache": str(self.folder / "npm"),
            "HF_ENDPOINT": NOWHERE,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.folder / "hub"),
            "PYTHONPATH": str(ROOT / "workflow"),
        }
        command = [sys.executable, script, *self._arguments(config)]
        done = subprocess.run(command, capture_output=True, text=True, env=env | environment, timeout=120)
        return self._result(done.returncode == 0, done.stdout + done.stderr)

    def _arguments(self, config: dict) -> list[str]:
        (self.folder / "table.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return [f"config={self.folder}/table.yaml", f"output={self.output}"]

    def _result(self, success: bool, said: str) -> tuple[pa.Table | None, str]:
        assert "Traceback" not in said, said
        assert self.output.exists() == success, said
        assert not list(self.folder.rglob(".*.tmp"))
        return (pq.read_table(self.output) if success else None), said
