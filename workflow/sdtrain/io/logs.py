"""The reader of training logs (`log.jsonl`): one JSON object a line, each with the number of images seen."""

from __future__ import annotations

import json
from pathlib import Path


def read_log_line(line: str) -> dict | None:
    """Return the entry of one line of a log, or None for an incomplete line, which a killed process leaves behind."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("images"), int) else None


def read_log(path: str | Path) -> list[dict]:
    """Return the entries of a log in file order, without incomplete lines. Raise OSError if it cannot be read."""
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    return [entry for line in lines if (entry := read_log_line(line)) is not None]
