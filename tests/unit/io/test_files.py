"""Tests of atomic writes, locks, links and replaced folders."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from samples import ROOT

from sdtrain.io import files
from sdtrain.io.files import (
    FileError,
    LockedError,
    atomic_folder,
    atomic_path,
    hold_lock,
    is_locked,
    lock_owner,
    read_json,
    replace_folder,
    replace_link,
    write_json,
    write_text,
)


def python(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE)


# ---------------------------------------------------------------- lock
HOLD = """
import sys, time
from sdtrain.io.files import hold_lock
with hold_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_lock_excludes_other_processes_until_its_owner_dies(tmp_path):
    holder = python(HOLD, tmp_path / "run/.lock")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            LockedError,
            match=rf"run: another process is working here \(process {holder.pid} on .*\); wait for it or end it",
        ):
            with hold_lock(tmp_path / "run/.lock"):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate(timeout=60)
    for _ in range(2):
        with hold_lock(tmp_path / "run/.lock"):
            pass


def test_a_file_system_without_locks_causes_a_warning(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.warns(UserWarning, match=r"\.lock: this file system has no locks .*start one process only"):
        with hold_lock(tmp_path / ".lock"):
            pass


def test_a_process_waits_for_a_lock(tmp_path, capsys):
    holder = python(HOLD, tmp_path / "run/.lock")
    assert holder.stdout.readline() == "held\n"
    end = threading.Timer(1.0, holder.kill)
    end.start()
    with hold_lock(tmp_path / "run/.lock", 60.0, say=print):
        assert holder.wait(timeout=60) != 0
    assert "waiting for its end" in capsys.readouterr().out
    holder.communicate()


FORK = """
import os, sys, time
from sdtrain.io.files import hold_lock
ready, tell = os.pipe()
with hold_lock(sys.argv[1]):
    if os.fork() == 0:
        os.write(tell, b"x")  # the hooks that close the lock in a forked process have run
        time.sleep(300)
    os.read(ready, 1)
    print(os.getpid(), flush=True)
    time.sleep(300)
"""


def test_forked_processes_do_not_hold_the_lock(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK, str(tmp_path / ".lock")],
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert int(parent.stdout.readline()) == parent.pid and is_locked(tmp_path / ".lock")
        parent.kill()
        parent.wait(timeout=60)
        assert not is_locked(tmp_path / ".lock")
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the forked process
        parent.communicate(timeout=60)


def test_read_only_lock_file_tells_whether_it_is_held(tmp_path):
    assert is_locked(tmp_path / ".lock") is False and lock_owner(tmp_path / ".lock") == ""
    holder = python(HOLD, tmp_path / ".lock")
    assert holder.stdout.readline() == "held\n"
    (tmp_path / ".lock").chmod(0o444)
    assert is_locked(tmp_path / ".lock") and lock_owner(tmp_path / ".lock").startswith(f"process {holder.pid} on ")
    holder.kill()
    holder.communicate(timeout=60)
    assert is_locked(tmp_path / ".lock") is False


# ---------------------------------------------------------------- folders and links
def test_a_link_is_replaced_and_moves_with_its_folder(tmp_path):
    for name in ("1", "2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "which").write_text(name)
        replace_link(tmp_path / "run/latest", tmp_path / "run" / name)
    assert (tmp_path / "run/latest/which").read_text() == "2"
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert Path(moved, "latest/which").read_text() == "2" and sorted(os.listdir(moved)) == ["1", "2", "latest"]


def test_replace_link_does_not_touch_a_folder(tmp_path):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest/precious").touch()
    with pytest.raises(FileError, match="latest: a folder is in the way of a link; move it away"):
        replace_link(tmp_path / "latest", tmp_path / "1")
    assert os.listdir(tmp_path) == ["latest"] and os.listdir(tmp_path / "latest") == ["precious"]


def test_replace_folder_replaces_an_older_folder(tmp_path):
    for text in ("old", "new"):
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / text).touch()
        replace_folder(tmp_path / "aside", tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["new"]


# ---------------------------------------------------------------- atomic writes
def test_write_text_leaves_no_temporary_file(tmp_path):
    file = tmp_path / "new/folder/a.txt"
    write_text(file, "é\n")
    write_text(file, "two")
    assert file.read_text() == "two" and os.listdir(file.parent) == ["a.txt"]


def test_full_disk_keeps_the_old_text(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    code = (
        "import resource, signal, sys\n"
        "from sdtrain.io.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(sys.argv[1], 'x' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], cwd=ROOT / "workflow", capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_unreadable_json_names_the_file(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1]})
    assert read_json(tmp_path / "a.json") == {"é": [1]}
    (tmp_path / "b.json").write_text("{")
    for name in ("b.json", "absent.json"):
        with pytest.raises(FileError, match=rf"{name}: not a readable JSON file .*make it again: snakemake --force"):
            read_json(tmp_path / name)


KILLED = """
import os, signal, sys
from sdtrain.io.files import atomic_folder, atomic_path
with (atomic_folder if sys.argv[2] == "folder" else atomic_path)(sys.argv[1]) as path:
    (path / "half" if path.is_dir() else path).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_write_keeps_the_old_content_and_leaves_one_temporary(tmp_path, kind):
    def write(text: str) -> None:
        with (atomic_folder if kind == "folder" else atomic_path)(tmp_path / "it") as path:
            (path / "text" if kind == "folder" else path).write_text(text)

    def text() -> str:
        return (tmp_path / "it/text" if kind == "folder" else tmp_path / "it").read_text()

    write("old")
    for _ in range(2):
        killed = python(KILLED, tmp_path / "it", kind)
        assert killed.wait(timeout=60) == -signal.SIGKILL
        killed.communicate()
        assert text() == "old" and sorted(os.listdir(tmp_path)) == [".it.tmp", "it"]
    write("new")
    assert text() == "new" and os.listdir(tmp_path) == ["it"]
    if kind == "folder":
        assert os.listdir(tmp_path / "it") == ["text"]


@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_error_keeps_the_old_content(tmp_path, write):
    (tmp_path / "it").mkdir()
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "it") as path:
        (path / "new" if path.is_dir() else path).write_text("new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["it"] and os.listdir(tmp_path / "it") == []
