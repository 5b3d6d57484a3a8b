"""Tests of reading training logs."""

from __future__ import annotations

import pytest

from sdtrain.io.logs import read_log, read_log_line


@pytest.mark.parametrize("line", ['{"images": 8, "lo', "", "\x00\x00", "[]", '{"a": 1}', '{"images": "8"}'])
def test_incomplete_and_foreign_lines_are_skipped(line, tmp_path):
    assert read_log_line(line) is None
    (tmp_path / "log.jsonl").write_text(f'{{"images": 4}}\n{line}\n{{"images": 8, "loss": 0.5}}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"images": 4}, {"images": 8, "loss": 0.5}]
