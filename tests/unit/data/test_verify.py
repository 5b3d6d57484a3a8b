"""Tests of verify: it finds every fault of shards, indices and manifests, and names file and remedy."""

from __future__ import annotations

import json
import shutil

import pytest
from samples import make_sample, run_script, write_tar

from sdtrain.data.indices import read_metadata, write_index
from sdtrain.data.manifest import gather_manifests, write_manifest
from sdtrain.data.tars import index_tar
from sdtrain.data.verify import find_faults
from sdtrain.io.files import sha256_file


@pytest.fixture
def folder(image_shards, tmp_path):
    """Return a copy of the shards that a test may damage."""
    return shutil.copytree(image_shards, tmp_path / "copy")


def flip(path, at: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_intact_shards_have_no_fault(folder):
    manifest = folder / "manifest.json"
    assert find_faults(manifest) == []
    done = run_script("verify", f"manifests={manifest} {manifest}")
    size = sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{manifest}: whole; 3 shards, 41 samples, {size:,} bytes"] * 2


def test_every_fault_is_reported_at_once(folder, tmp_path):
    manifest = folder / "manifest.json"
    flip(folder / "00000.tar", 5000)
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:-512])
    (folder / "00002.tar").unlink()
    flip(folder / "00002.index.parquet", 200)
    write_tar(folder / "00007.tar", [make_sample(0)])
    done = run_script("verify", f"manifests={manifest} {tmp_path}/absent.json")
    remedy = f"rebuild it: snakemake --force {manifest}"
    assert done.returncode == 1 and done.stdout == ""
    assert sorted(done.stderr.splitlines()[-6:]) == sorted(
        [
            f"error: {folder}/00000.tar: sha256 differs from the one in {manifest}; delete it, then {remedy}",
            f"error: {folder}/00001.tar: {(folder / '00001.tar').stat().st_size} bytes, "
            f"{(folder / '00001.tar').stat().st_size + 512} expected by {manifest}; delete it, then {remedy}",
            f"error: {folder}/00002.tar: shard is missing, though {manifest} lists it; {remedy}",
            f"error: {folder}/00002.index.parquet: sha256 of the index differs from the one in {manifest}; "
            f"delete it, then {remedy}",
            f"error: {folder}/00007.tar: foreign shard, not listed in {manifest}; delete it, then {remedy}",
            f"error: {tmp_path}/absent.json: no such manifest; make it with: snakemake {tmp_path}/absent.json",
        ]
    )


def test_wrong_manifest_is_found(folder):
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["samples"] = 18
    content["samples"] = 50
    manifest.write_text(json.dumps(content))
    faults = find_faults(manifest)
    assert [fault.partition("; ")[0] for fault in faults] == [
        f"{manifest}: samples is 50, but its shards have 42",
        f"{manifest}: its shardlist, for wids, does not fit its shards",
        f"{folder}/00000.tar: 17 samples, 18 expected by {manifest}",
    ]


def test_missing_index_and_replaced_shard_are_found(folder):
    (folder / "00001.index.parquet").unlink()
    (folder / "00002.tar").write_bytes((folder / "00000.tar").read_bytes())
    faults = find_faults(folder / "manifest.json")
    assert f"{folder}/00001.index.parquet: index is missing" in faults[0] and "00002.tar: " in faults[1]
    assert len(faults) == 2


def test_an_index_of_other_samples_is_found(folder):
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    tar, index = folder / "00000.tar", folder / "00000.index.parquet"
    found = read_metadata(index_tar(tar), tar)
    found.fields["jpg"][3, 0] += 512
    write_index(index, found)
    content["shards"][0]["index_sha256"] = sha256_file(index)
    manifest.write_text(json.dumps(content))
    (fault,) = find_faults(manifest)
    assert fault.startswith(f"{index}: does not fit the samples of {tar}; delete it, then rebuild it")


def test_empty_tar_of_a_download_is_not_an_unlisted_shard(folder):
    write_tar(folder / "00009.tar", [])
    assert find_faults(folder / "manifest.json") == []


def test_remedies_differ_for_partitions_and_indexed_shards(folder, tmp_path):
    part, gathered = tmp_path / "indexed/0-of-1.json", tmp_path / "shards/manifest.json"
    write_manifest(part, "images", sorted(folder.glob("*.tar")), {}, {})
    gather_manifests([part], gathered)
    write_tar(folder / "00007.tar", [make_sample(0)])  # not listed, but in a folder that belongs to others
    assert find_faults(gathered) == []
    flip(folder / "00000.tar", 5000)
    assert find_faults(gathered) == [
        f"{folder}/00000.tar: sha256 differs from the one in {gathered}; "
        + "restore it from its source, or if the new content is right, index it again: "
        + f"snakemake --force {part} {gathered}"
    ]


def test_remote_shards_are_read_to_the_end(s3, folder, tmp_path):
    place = s3.put("verify/0.tar", (folder / "00000.tar").read_bytes())
    write_manifest(tmp_path / "manifest.json", "images", [place], {}, {})
    assert find_faults(tmp_path / "manifest.json") == []
    s3.put("verify/0.tar", (folder / "00001.tar").read_bytes())
    (fault,) = find_faults(tmp_path / "manifest.json")
    assert fault.startswith(f"{place}: sha256 differs") and "restore it from its source" in fault
    s3.client.delete_object(Bucket="tests", Key="verify/0.tar")
    (fault,) = find_faults(tmp_path / "manifest.json")
    assert fault.startswith(f"{place}: no such file")


def test_the_fingerprint_and_the_empty_caption_are_checked(folder):
    manifest, empty = folder / "latents.json", folder / "empty.safetensors"
    empty.write_bytes(b"states")
    write_manifest(manifest, "latents", sorted(folder.glob("*.tar")), {}, {"a": 1}, empty_text=empty.name)
    assert find_faults(manifest) == []
    empty.write_bytes(b"others")
    (fault,) = find_faults(manifest)
    assert fault.startswith(f"{empty}: sha256 differs")
    empty.unlink()
    content = json.loads(manifest.read_text()) | {"made_by": {"a": 2}}
    manifest.write_text(json.dumps(content))
    assert [
        "empty.safetensors: states of the empty" in f or "its fingerprint does not fit" in f
        for f in find_faults(manifest)
    ] == [
        True,
        True,
    ]
