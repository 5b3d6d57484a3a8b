"""Tests of index_shards: existing shards are indexed in place; a killed command resumes with the remaining shards."""

from __future__ import annotations

import os
import re

import pytest
import yaml
from samples import kill_script, load_script, make_sample, write_tar

from sdtrain.data.indices import read_index
from sdtrain.data.manifest import gather_manifests, read_manifest
from sdtrain.data.tars import index_tar
from sdtrain.data.verify import find_faults

SAMPLES = [make_sample(n) for n in range(6)]
SCRIPT = load_script("index_shards")


@pytest.fixture
def tars(tmp_path):
    """Write six tars with three different names in two folders."""
    found = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        found += [write_tar(tmp_path / folder / f"{n}.tar", SAMPLES[: n + 1]) for n in range(3)]
    return found


def arguments(folder, path, *more, **config):
    """Write the configuration to a file; return the arguments of the command."""
    file = folder / "index.yaml"
    file.write_text(yaml.safe_dump({"path": str(path), **config}))
    return [f"config={file}", f"output={folder}/indexed/0-of-1.json", *more]


def index(folder, path, *more, **config):
    """Run the command and assert success; return its manifest."""
    given = arguments(folder, path, *more, **config)
    SCRIPT.main(["index_shards.py", *given])
    (output,) = [a.removeprefix("output=") for a in given if a.startswith("output=")][-1:]
    assert find_faults(output) == []
    return read_manifest(output)


def refused(folder, path, *more, **config):
    """Run the command and assert failure; return its error message."""
    with pytest.raises(SystemExit, match="^error: ") as error:
        SCRIPT.main(["index_shards.py", *arguments(folder, path, *more, **config)])
    return str(error.value)


def test_partitions_divide_the_shards_and_do_not_change_them(tmp_path, tars):
    path, names = f"{tmp_path}/{{a,b}}/*.tar", []
    for part in range(4):
        output = tmp_path / f"indexed/{part}-of-4.json"
        manifest = index(tmp_path, path, f"part={part}", "parts=4", f"output={output}")
        names += [row["path"] for row in manifest["shards"]]
    assert [os.path.realpath(name) for name in names] == [str(tar) for tar in tars]
    assert sorted(os.listdir(tmp_path / "a")) == ["0.tar", "1.tar", "2.tar"]
    parts = [tmp_path / f"indexed/{part}-of-4.json" for part in range(4)]
    manifest = gather_manifests(parts, tmp_path / "shards/manifest.json")
    assert manifest["samples"] == 12 and manifest["made_by"] == {"path": path}
    for row in read_manifest(tmp_path / "shards/manifest.json")["shards"]:
        assert read_index(row["index_path"], row["path"]) == index_tar(row["path"])


def test_existing_manifest_is_used_with_its_indices(tmp_path, image_shards):
    manifest = index(tmp_path, image_shards / "manifest.json")
    assert manifest["samples"] == 41 and os.listdir(tmp_path / "indexed") == ["0-of-1.json"]
    source = read_manifest(image_shards / "manifest.json")["shards"]
    for row, old in zip(manifest["shards"], source, strict=True):
        assert os.path.samefile(row["index_path"], old["index_path"]) and row["sha256"] == old["sha256"]


def test_held_out_split_has_separate_shards(tmp_path, tars):
    manifest = index(tmp_path, f"{tmp_path}/a/*.tar", "split=held_out", held_out_path=str(tars[5]))
    assert [os.path.realpath(row["path"]) for row in manifest["shards"]] == [str(tars[5])]


def test_shards_that_cannot_be_indexed_are_named(tmp_path, tars):
    assert "shards.held_out_path: name the shards" in refused(tmp_path, tars[0], "split=held_out")
    assert "no file matches" in refused(tmp_path, f"{tmp_path}/none/*.tar")
    assert "9.tar: shard is missing" in refused(tmp_path, f"{tmp_path}/a/{{0,9}}.tar")
    assert f"names {tars[0]} more than once" in refused(tmp_path, f"{tmp_path}/a/{{0,0}}.tar")
    assert "part=2 parts=2: expected a part from 0 to parts - 1" in refused(tmp_path, tars[0], "part=2", "parts=2")
    message = refused(tmp_path, tars[0], select={"rows": 5})
    assert "select.rows: is for tables only" in message
    assert "select.deduplicate: is for tables only" in refused(tmp_path, tars[0], select={"deduplicate": "url"})
    tars[1].write_bytes(tars[1].read_bytes()[:700])
    assert "1.tar: not a whole tar" in refused(tmp_path, f"{tmp_path}/a/*.tar")
    assert "the command failed with exit code 3" in refused(tmp_path, "pipe:exit 3")
    assert not (tmp_path / "indexed/0-of-1.json").exists()


def test_killed_indexing_ends_with_the_same_bytes_and_repeats_no_index(tmp_path):
    """Kill -9 after some indices are in place, at points that random kills rarely hit."""
    (tmp_path / "in").mkdir()
    for n in range(30):
        write_tar(tmp_path / f"in/{n:05d}.tar", SAMPLES[: n % 6 + 1])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    index(whole, tmp_path / "in/*.tar")
    done = []
    for replaces in (0, 4, 7, 11):
        assert kill_script("index_shards", arguments(killed, tmp_path / "in/*.tar"), replaces=replaces)
        done.append(len(list(killed.glob("indexed/*/[!.]*.parquet"))))
    assert done == sorted(done) and 0 < done[-1] < 30  # threads may finish more of them
    index(killed, tmp_path / "in/*.tar")
    assert files(killed) == files(whole)


def files(folder) -> dict:
    """Return the bytes of every result file; of the manifest, without the code digest."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.glob("indexed/**/[!.]*") if f.is_file()}
    return {name: re.sub(rb'"code": "\w+"', b"", data) for name, data in found.items()}
