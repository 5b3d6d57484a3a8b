"""Tars are read only whole, written only whole, and a manifest knows them to the byte."""

from __future__ import annotations

import os
import random
import shutil
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample, write_tar

from sdtrain import shards
from sdtrain.shards import ShardError, ShardWriter, index_tar, read_manifest, write_manifest

SAMPLES = [make_sample(n) for n in range(5)]


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "00000.tar", SAMPLES)


@pytest.fixture
def folder(image_shards, tmp_path):
    """A copy of the shards that a test may spoil."""
    return shutil.copytree(image_shards, tmp_path / "copy")


# ---------------------------------------------------------------- reading
def test_members_group_into_samples_that_read_back(tar):
    found = index_tar(tar)
    assert [s.key for s in found] == [key for key, _ in SAMPLES]
    for sample, (_, fields) in zip(found, SAMPLES, strict=True):
        assert {extension: sample.read(extension) for extension in sample.fields} == fields


def test_names_follow_the_webdataset_format(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x.y")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("x.y/1.JPG", "x.y/1.seg.png", "x.y/2.txt", "3.txt"):
            tar.addfile(tarfile.TarInfo(name))
    found = [(s.key, set(s.fields)) for s in index_tar(tmp_path / "a.tar")]
    assert found == [("x.y/1", {"jpg", "seg.png"}), ("x.y/2", {"txt"}), ("3", {"txt"})]


def test_an_empty_tar_has_no_samples(tmp_path):
    assert index_tar(write_tar(tmp_path / "a.tar", [])) == []


def test_a_tar_cut_anywhere_is_refused(tar, tmp_path):
    data, end = tar.read_bytes(), index_tar(tar)[-1].fields["json"]
    whole = -(-sum(end) // 512) * 512  # where the last member and its padding end
    cut = tmp_path / "cut.tar"
    boundaries = [offset - 512 for s in index_tar(tar) for offset, _ in s.fields.values()]
    for length in {
        0,
        1,
        511,
        512,
        700,
        *boundaries,
        *(b + 100 for b in boundaries),
        sum(end) - 1,
        sum(end),
        whole,
        whole + 511,
    }:
        cut.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"cut\.tar: not a whole tar \(.*\); delete it and rebuild the shards"):
            index_tar(cut)
    cut.write_bytes(data[: whole + 512])
    assert len(index_tar(cut)) == 5


@given(length=st.integers(0, 20_000))
@settings(max_examples=60, deadline=None)
def test_no_cut_loses_a_sample_silently(tmp_path_factory, length):
    tar = write_tar(tmp_path_factory.mktemp("cut") / "a.tar", SAMPLES)
    tar.write_bytes(tar.read_bytes()[:length])
    try:
        assert len(index_tar(tar)) == 5
    except ShardError:
        pass


def test_a_damaged_header_is_no_end(tar):
    data = bytearray(tar.read_bytes())
    header = index_tar(tar)[2].fields["jpg"][0] - 512
    data[header + 148] ^= 0xFF  # of its checksum
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="no end-of-archive mark after"):
        index_tar(tar)


def test_foreign_and_missing_files_are_named(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar at all\n" * 100)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"))
    (tmp_path / "folder.tar").mkdir()
    for name in ("text.tar", "zipped.tar", "folder.tar"):
        with pytest.raises(ShardError, match=f"{name}: not a whole tar"):
            index_tar(tmp_path / name)
    with pytest.raises(ShardError, match="absent.tar: shard is missing; rebuild it"):
        index_tar(tmp_path / "absent.tar")


# ---------------------------------------------------------------- writing
def test_the_writer_fills_shards_and_gives_the_same_bytes_again(tmp_path):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, samples_per_shard=2) as writer:
            for key, fields in SAMPLES:
                writer.add(key, fields)
        assert [path.name for path in writer.paths] == ["00000.tar", "00001.tar", "00002.tar"]
        assert sorted(os.listdir(tmp_path / name)) == ["00000.tar", "00001.tar", "00002.tar"]
    for path in writer.paths:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
    read = [(s.key, {e: s.read(e) for e in s.fields}) for path in writer.paths for s in index_tar(path)]
    assert read == SAMPLES and [len(index_tar(path)) for path in writer.paths] == [2, 2, 1]


def test_a_failure_leaves_whole_shards_only(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for key, fields in SAMPLES[:3]:
            writer.add(key, fields)
        raise KeyError
    assert os.listdir(tmp_path) == ["00000.tar"] and len(index_tar(tmp_path / "00000.tar")) == 2


def test_no_samples_no_shard(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        pass
    assert writer.paths == [] and os.listdir(tmp_path) == []


# ---------------------------------------------------------------- manifests
def test_a_manifest_describes_its_shards(folder):
    manifest = read_manifest(folder / "manifest.json", full=True)
    assert [row["samples"] for row in manifest["shards"]] == [17, 5, 19] and manifest["samples"] == 41
    assert [row["name"] for row in manifest["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    assert manifest["bytes"] == sum(os.path.getsize(row["path"]) for row in manifest["shards"])
    assert manifest["kind"] == "images" and manifest["dropped"] == {}


def test_the_fingerprint_follows_content_and_recipe(folder):
    tars = sorted(folder.glob("*.tar"))
    marks = [
        write_manifest(folder / "m.json", "images", t, {}, m)["fingerprint"]
        for t, m in [(tars, {"a": 1}), (tars[::-1], {"a": 1})]
    ]
    assert marks[0] == marks[1]
    assert write_manifest(folder / "m.json", "images", tars, {}, {"a": 2})["fingerprint"] != marks[0]
    tars[1].write_bytes(tars[0].read_bytes())
    assert write_manifest(folder / "m.json", "images", tars, {}, {"a": 1})["fingerprint"] != marks[0]


def test_shards_lie_relative_to_the_manifest(folder, tmp_path):
    manifest = folder / "deep/manifest.json"
    write_manifest(manifest, "images", list(folder.glob("*.tar")), {"broken": 2}, {})
    moved = shutil.move(folder, tmp_path / "moved")
    assert read_manifest(f"{moved}/deep/manifest.json", full=True)["dropped"] == {"broken": 2}


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
    with pytest.raises(ShardError, match=rf"{tar.name}: sha256 differs .* rebuild it: snakemake --force"):
        read_manifest(folder / "manifest.json", full=True)


def test_missing_and_resized_shards_are_named(folder):
    manifest, tar = folder / "manifest.json", folder / "00001.tar"
    tar.write_bytes(tar.read_bytes() + b"\0")
    with pytest.raises(ShardError, match=r"00001.tar: \d+ bytes, \d+ expected by .*manifest.json; rebuild it"):
        read_manifest(manifest)
    tar.unlink()
    with pytest.raises(ShardError, match="00001.tar: shard is missing, though .*manifest.json lists it; rebuild it"):
        read_manifest(manifest)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"shards": 3}', '{"shards": [{"name": "a"}]}', '{"shards": [[]]}']
)
def test_what_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(ShardError, match="manifest.json: not a shard manifest; delete it and make it again"):
        read_manifest(path)


def test_an_absent_manifest_names_its_rule(tmp_path):
    with pytest.raises(ShardError, match="no such manifest; make it with: snakemake .*absent.json"):
        read_manifest(tmp_path / "absent.json")


def test_a_manifest_of_a_broken_tar_is_not_written(tmp_path, tar):
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ShardError):
        write_manifest(tmp_path / "manifest.json", "images", [tar], {}, {})
    assert not (tmp_path / "manifest.json").exists()


def test_sums_are_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert shards.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
