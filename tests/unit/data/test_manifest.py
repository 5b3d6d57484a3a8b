"""Tests of manifests: description of shards, gathering of partitions, and refused input."""

from __future__ import annotations

import json
import os
import random
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample, run_script, write_tar

from sdtrain.data.indices import read_index
from sdtrain.data.manifest import gather_manifests, read_manifest, write_manifest
from sdtrain.data.tars import index_tar
from sdtrain.data.verify import find_faults
from sdtrain.errors import DataError
from sdtrain.io.files import sha256_file

SAMPLES = [make_sample(n) for n in range(5)]


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "00000.tar", SAMPLES)


@pytest.fixture
def folder(image_shards, tmp_path):
    """Return a copy of the shards that a test may damage."""
    return shutil.copytree(image_shards, tmp_path / "copy")


# ---------------------------------------------------------------- manifests
def test_a_manifest_describes_its_shards(folder):
    assert find_faults(folder / "manifest.json") == []
    manifest = read_manifest(folder / "manifest.json")
    assert [row["samples"] for row in manifest["shards"]] == [17, 5, 19] and manifest["samples"] == 41
    assert [row["name"] for row in manifest["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert manifest["bytes"] == sum(os.path.getsize(row["path"]) for row in manifest["shards"])
    assert manifest["kind"] == "images" and manifest["dropped"] == {}


def test_fingerprint_depends_on_content_and_settings(folder):
    tars = sorted(folder.glob("*.tar"))
    marks = [
        write_manifest(folder / "m.json", "images", t, {}, m)["fingerprint"]
        for t, m in [(tars, {"a": 1}), (tars[::-1], {"a": 1})]
    ]
    assert marks[0] == marks[1]
    assert write_manifest(folder / "m.json", "images", tars, {}, {"a": 2})["fingerprint"] != marks[0]
    tars[1].write_bytes(tars[0].read_bytes())
    assert write_manifest(folder / "m.json", "images", tars, {}, {"a": 1})["fingerprint"] != marks[0]


def test_paths_of_shards_are_relative_to_the_manifest(folder, tmp_path):
    manifest = folder / "deep/manifest.json"
    write_manifest(manifest, "images", list(folder.glob("*.tar")), {"broken": 2}, {})
    moved = shutil.move(folder, tmp_path / "moved")
    assert find_faults(f"{moved}/deep/manifest.json") == []
    assert read_manifest(f"{moved}/deep/manifest.json")["dropped"] == {"broken": 2}


@given(seed=st.integers())
@settings(max_examples=10, deadline=None)
def test_a_flipped_bit_is_found_by_the_full_check(image_shards, tmp_path_factory, seed):
    folder = shutil.copytree(image_shards, tmp_path_factory.mktemp("bit") / "copy")
    rng = random.Random(seed)
    tar = folder / f"0000{rng.randrange(3)}.tar"
    data = bytearray(tar.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    tar.write_bytes(data)
    read_manifest(folder / "manifest.json")
    (fault,) = find_faults(folder / "manifest.json")
    assert re.search(rf"{tar.name}: sha256 differs .* rebuild it: snakemake --force", fault)


def test_missing_and_resized_shards_are_named(folder):
    manifest, tar = folder / "manifest.json", folder / "00001.tar"
    tar.write_bytes(tar.read_bytes() + b"\0")
    with pytest.raises(
        DataError, match=r"00001.tar: \d+ bytes, \d+ expected by .*manifest.json; delete it, then rebuild it"
    ):
        read_manifest(manifest)
    tar.unlink()
    with pytest.raises(DataError, match="00001.tar: shard is missing, though .*manifest.json lists it; rebuild it"):
        read_manifest(manifest)


def test_a_manifest_leads_to_the_indices(folder):
    for row in read_manifest(folder / "manifest.json")["shards"]:
        assert row["index"] == row["name"].replace(".tar", ".index.parquet")
        index = read_index(row["index_path"], row["path"], ["original_width"])
        assert index == index_tar(row["path"]) and index.metadata.schema.names == ["original_width"]


def test_shards_of_the_same_name_have_separate_indices(tmp_path):
    for name, sample in (("a", SAMPLES[0]), ("b", SAMPLES[1])):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", [sample])
    tars = [tmp_path / "a/00000.tar", tmp_path / "b/00000.tar"]
    write_manifest(tmp_path / "m/manifest.json", "images", tars, {}, {})
    assert find_faults(tmp_path / "m/manifest.json") == []
    rows = read_manifest(tmp_path / "m/manifest.json")["shards"]
    assert [read_index(row["index_path"], row["path"])[0].key for row in rows] == [SAMPLES[0][0], SAMPLES[1][0]]
    assert (
        os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b") == ["00000.tar"]
    )  # nothing is written beside shards in another folder


def test_finished_indices_are_reused_unless_the_shard_changed(folder):
    def times():
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.index.parquet")}

    tars = sorted(folder.glob("*.tar"))
    first = write_manifest(folder / "manifest.json", "images", tars, {}, {})
    before, record = times(), (folder / "manifest.json").read_bytes()
    write_manifest(folder / "manifest.json", "images", tars, {}, {})
    assert times() == before and (folder / "manifest.json").read_bytes() == record
    content = bytearray(tars[1].read_bytes())
    content[700] ^= 1  # in the first image: same size, same samples
    tars[1].write_bytes(content)
    os.utime(tars[1], (0, 0))
    second = write_manifest(folder / "manifest.json", "images", tars, {}, {})
    assert [name for name, time in times().items() if time != before[name]] == ["00001.index.parquet"]
    assert second["shards"][1]["sha256"] == sha256_file(tars[1]) != first["shards"][1]["sha256"]


def test_remote_shards_are_listed_by_their_address(s3, tar, tmp_path):
    places = [s3.put("shards/a.tar", tar.read_bytes()), f"pipe:cat {tar}"]
    manifest = write_manifest(tmp_path / "manifest.json", "images", places, {}, {})
    assert {row["name"] for row in manifest["shards"]} == set(places) and manifest["samples"] == 10
    assert find_faults(tmp_path / "manifest.json") == []
    rows = read_manifest(tmp_path / "manifest.json")["shards"]
    assert {row["path"] for row in rows} == set(places)
    (remote,) = (row for row in rows if row["path"].startswith("s3://"))
    sample = read_index(remote["index_path"], remote["path"])[0]
    assert sample.read("txt") == SAMPLES[0][1]["txt"]
    s3.put("shards/a.tar", write_tar(tmp_path / "b.tar", SAMPLES[:2]).read_bytes())
    changed = write_manifest(tmp_path / "manifest.json", "images", places, {}, {})
    assert changed["samples"] == 7


# ---------------------------------------------------------------- gathering parts
def write_parts(folder, kinds=("images", "images")):
    for part, kind in enumerate(kinds):
        (folder / f"p{part}").mkdir(parents=True)
        tar = write_tar(folder / f"p{part}/00000.tar", [SAMPLES[part]])
        rows = [{"column": "a", "predicate": "> 1", "kept": part + 1}]
        dropped = {"filters": part + 1, **({"no readable json": 1} if part else {})}
        made_by = {"path": "x", "part": part}
        write_manifest(folder / f"{part}-of-2.json", kind, [tar], dropped, made_by, yields=rows)


def test_command_gathers_partitions(tmp_path):
    write_parts(tmp_path / "built")
    output = tmp_path / "shards/manifest.json"
    done = run_script("gather_shards", f"folder={tmp_path}/built", "parts=2", f"output={output}")
    assert done.returncode == 0, done.stderr
    assert find_faults(output) == []
    manifest = read_manifest(output)
    assert [row["name"] for row in manifest["shards"]] == ["../built/p0/00000.tar", "../built/p1/00000.tar"]
    assert [row["part"] for row in manifest["shards"]] == ["../built/0-of-2.json", "../built/1-of-2.json"]
    assert manifest["dropped"] == {"filters": 3, "no readable json": 1} and manifest["made_by"] == {"path": "x"}
    assert manifest["yields"] == [{"column": "a", "predicate": "> 1", "kept": 3}] and manifest["samples"] == 2
    found = [read_index(row["index_path"], row["path"])[0] for row in manifest["shards"]]
    assert [sample.read("txt") for sample in found] == [SAMPLES[n][1]["txt"] for n in (0, 1)]
    (tmp_path / "built/1-of-2.json").unlink()
    done = run_script("gather_shards", f"folder={tmp_path}/built", "parts=2", f"output={output}")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "1-of-2.json: no such manifest" in done.stderr


def test_one_empty_partition_is_valid_but_not_all(tmp_path):
    write_parts(tmp_path)
    write_manifest(tmp_path / "1-of-2.json", "images", [], {"filters": 7}, {"path": "x"})
    parts = [tmp_path / "0-of-2.json", tmp_path / "1-of-2.json"]
    assert gather_manifests(parts, tmp_path / "all.json")["samples"] == 1
    with pytest.raises(DataError, match="all.json: no sample in any of 1 partitions; dropped: filters 7"):
        gather_manifests(parts[1:], tmp_path / "all.json")


def test_partitions_of_two_kinds_are_refused(tmp_path):
    write_parts(tmp_path, ("images", "latents"))
    with pytest.raises(DataError, match="1-of-2.json: holds latents, but .*0-of-2.json images; gather one kind"):
        gather_manifests([tmp_path / "0-of-2.json", tmp_path / "1-of-2.json"], tmp_path / "all.json")


# ---------------------------------------------------------------- manifests that cannot be read
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"shards": 3}', '{"shards": [{"name": "a"}]}', '{"shards": [[]]}']
)
def test_file_that_is_not_a_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(DataError, match="manifest.json: not a shard manifest; delete it and make it again"):
        read_manifest(path)


def test_an_absent_manifest_names_its_rule(tmp_path):
    with pytest.raises(DataError, match="no such manifest; make it with: snakemake .*absent.json"):
        read_manifest(tmp_path / "absent.json")


def test_a_manifest_of_a_broken_tar_is_not_written(tmp_path, tar):
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(DataError):
        write_manifest(tmp_path / "manifest.json", "images", [tar], {}, {})
    assert not (tmp_path / "manifest.json").exists()


def test_digests_are_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_remote_manifest_is_refused_with_a_remedy():
    with pytest.raises(DataError, match="s3://bucket/manifest.json: a manifest must be a local file; copy it here"):
        read_manifest("s3://bucket/manifest.json")


# ---------------------------------------------------------------- wids
def test_a_manifest_is_a_wids_shard_index(folder, tmp_path):
    import wids

    gathered = tmp_path / "elsewhere/shards/manifest.json"
    gather_manifests([folder / "manifest.json"], gathered)
    for number, manifest in enumerate((folder / "manifest.json", gathered)):
        local = wids.wids.DefaultLocalname(str(tmp_path / f"cache-{number}"))  # wids copies shards before it reads them
        dataset = wids.ShardListDataset(str(manifest), localname=local, transformations=[])
        assert len(dataset) == 41
        found = [dataset[position] for position in range(len(dataset))]
        expected = [make_sample(number) for number in range(41)]
        assert [sample["__key__"] for sample in found] == [key for key, _ in expected]
        for sample, (_, fields) in zip(found, expected, strict=True):
            assert {name: sample[f".{name}"].read() for name in fields} == fields


def test_a_manifest_without_a_shard_index_is_read(folder):
    """Manifests of earlier versions have no fields for wids."""
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("__kind__", "wids_version", "shardlist"):
        del content[name]
    manifest.write_text(json.dumps(content))
    assert read_manifest(manifest)["samples"] == 41 and find_faults(manifest) == []
