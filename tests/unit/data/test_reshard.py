"""Tests of reshard: the selected samples are kept in order, byte for byte, each exactly once."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import kill_script, load_script, make_sample, run_script, write_tar

from sdtrain.data.indices import read_index, write_index
from sdtrain.data.manifest import describe_shard, gather_manifests, read_manifest, write_manifest
from sdtrain.data.reshard import read_source
from sdtrain.data.tars import index_tar
from sdtrain.data.verify import find_faults
from sdtrain.io.files import hold_lock

SCRIPT = load_script("reshard")
SIZES = (7, 1, 0, 12, 5)
FILTERS = {"original_width": ">=45", "pwatermark": "<0.8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write five unequal tars of 25 samples in all; one sample has no JSON and one has invalid JSON."""
    folder, number = tmp_path_factory.mktemp("source"), 0
    for tar, size in enumerate(SIZES):
        samples = [make_sample(n) for n in range(number, number + size)]
        write_tar(folder / f"{tar:05d}.tar", [spoil(*sample) for sample in samples])
        number += size
    return folder


def spoil(key: str, fields: dict[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """Remove the JSON of sample 3, and make that of sample 9 invalid; leave other samples unchanged."""
    if int(key) == 3:
        return key, {e: data for e, data in fields.items() if e != "json"}
    return key, fields | {"json": b"{"} if int(key) == 9 else fields


def arguments(folder, path, *more, filters=FILTERS, select=None, **config):
    """Write the configuration to a file; return the arguments of the command."""
    file, values = folder / "reshard.yaml", {"path": str(path), "samples_per_shard": 4, **config}
    file.write_text(yaml.safe_dump(values | {"select": {"filters": filters, **(select or {})}}))
    return [f"config={file}", f"output={folder}/resharded/0-of-1.json", *more]


def reshard(folder, path, *more, **config):
    """Run the command and assert success; return its manifest."""
    folder.mkdir(exist_ok=True)
    given = arguments(folder, path, *more, **config)
    SCRIPT.main(["reshard.py", *given])
    output = [a.removeprefix("output=") for a in given if a.startswith("output=")][-1]
    assert find_faults(output) == []
    return read_manifest(output)


def refused(folder, path, *more, **config):
    """Run the command and assert failure; return its error message."""
    with pytest.raises(SystemExit, match="^error: ") as error:
        SCRIPT.main(["reshard.py", *arguments(folder, path, *more, **config)])
    return str(error.value)


def contents(tars):
    """Return [(key, fields)] of tars, in order."""
    return [(s.key, {e: s.read(e) for e in s.fields}) for tar in tars for s in index_tar(tar)]


def paths(manifest):
    """Return the paths of the shards of a manifest."""
    return [row["path"] for row in manifest["shards"]]


def expected(keep, numbers=range(25)):
    """Return the samples of the source whose metadata pass `keep`."""
    samples = [spoil(*make_sample(n)) for n in numbers if n not in (3, 9)]
    return [sample for sample in samples if keep(json.loads(sample[1]["json"]))]


def passes(meta):
    """Return whether metadata pass FILTERS, in plain Python."""
    return meta["original_width"] >= 45 and meta["pwatermark"] < 0.8


def digests(manifest):
    """Return the digests of a manifest's shards."""
    return [row["sha256"] for row in manifest["shards"]]


# ---------------------------------------------------------------- what is kept
def test_selected_samples_are_kept_in_order_in_equal_shards(tmp_path, source):
    manifest, wanted = reshard(tmp_path, f"{source}/*.tar"), expected(passes)
    assert contents(paths(manifest)) == wanted and 8 < len(wanted) < 23
    assert [row["samples"] for row in manifest["shards"]][:-1] == [4] * ((len(wanted) - 1) // 4)
    assert manifest["dropped"] == {"no readable json": 2, "filters": 23 - len(wanted)}
    wide = len(expected(lambda meta: meta["original_width"] >= 45))
    assert [(y["column"], y["alone_kept"], y["kept"]) for y in manifest["yields"]] == [
        ("original_width", wide, wide),
        ("pwatermark", len(expected(lambda meta: meta["pwatermark"] < 0.8)), len(wanted)),
    ]


def test_the_command_prints_the_yields(tmp_path, source):
    done = run_script("reshard", *arguments(tmp_path, f"{source}/*.tar"))
    assert done.returncode == 0, done.stderr
    assert "original_width >= 45 " in done.stdout and "dropped, no readable json: 2" in done.stdout


def test_without_filters_everything_is_kept(tmp_path, source):
    manifest = reshard(tmp_path, f"{source}/*.tar", filters={}, samples_per_shard=100)
    assert contents(paths(manifest)) == contents(sorted(source.glob("*.tar"))) and manifest["dropped"] == {}


def test_partitions_divide_the_source(tmp_path, source):
    outputs = [tmp_path / f"resharded/{part}-of-3.json" for part in range(3)]
    found = []
    for part, output in enumerate(outputs):
        found += contents(paths(reshard(tmp_path, f"{source}/*.tar", f"part={part}", "parts=3", f"output={output}")))
    assert found == expected(passes)
    manifest = gather_manifests(outputs, tmp_path / "shards/manifest.json")
    assert manifest["samples"] + sum(manifest["dropped"].values()) == 25
    assert manifest["yields"] == reshard(tmp_path, f"{source}/*.tar")["yields"]
    assert find_faults(tmp_path / "shards/manifest.json") == []


def test_partition_without_selected_samples_is_empty(tmp_path, source):
    output = tmp_path / "resharded/2-of-5.json"
    assert reshard(tmp_path, f"{source}/*.tar", "part=2", "parts=5", f"output={output}")["shards"] == []


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    per_shard=st.integers(1, 7),
    seed=st.integers(0, 999),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=40, deadline=None)
def test_any_selection_is_copied_completely(tmp_path_factory, sizes, per_shard, seed, form):
    folder, rng, number, wanted = tmp_path_factory.mktemp("choice"), random.Random(seed), 0, []
    for tar, size in enumerate(sizes):
        with tarfile.open(folder / f"{tar}.tar", "w", format=form) as file:
            for _ in range(size):
                key = "k" * rng.choice([1, 90, 120]) + f"{number}" if form != tarfile.USTAR_FORMAT else f"{number}"
                number += 1
                keep, fields = rng.random() < 0.5, {"bin": rng.randbytes(rng.randrange(1200))}
                fields["json"] = json.dumps({"keep": keep}).encode()
                if rng.random() < 0.2:
                    lone = tarfile.TarInfo("folder")
                    lone.type = tarfile.DIRTYPE
                    file.addfile(lone)
                for extension, data in fields.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mtime = len(data), rng.choice([0, 1.25]) if form == tarfile.PAX_FORMAT else 9
                    file.addfile(info, io.BytesIO(data))
                wanted += [(key, fields)] if keep else []
    if not wanted:
        assert "no sample is left" in refused(folder, f"{folder}/*.tar", filters={"keep": True})
        return
    manifest = reshard(folder, f"{folder}/*.tar", filters={"keep": True}, samples_per_shard=per_shard)
    assert contents(paths(manifest)) == wanted
    counts = [row["samples"] for row in manifest["shards"]]
    assert all(count == per_shard for count in counts[:-1]) and 0 < counts[-1] <= per_shard


# ---------------------------------------------------------------- where from
def test_every_kind_of_source_gives_the_same_shards(tmp_path, source, s3):
    tars = sorted(source.glob("*.tar"))
    for tar in tars:
        s3.put(f"reshard/{tar.name}", tar.read_bytes())
    write_manifest(tmp_path / "indexed.json", "images", tars, {}, {})
    wanted = digests(reshard(tmp_path / "glob", f"{source}/*.tar"))
    for name, path in {
        "braces": f"{source}/{{00000..00004}}.tar",
        "s3": "s3://tests/reshard/*.tar",
        "pipe": f"pipe:cat {source}/{{00000..00004}}.tar",
        "manifest": tmp_path / "indexed.json",
    }.items():
        assert digests(reshard(tmp_path / name, path)) == wanted, name


def test_shards_of_a_manifest_are_filtered_by_its_indices(tmp_path, source):
    tars = sorted(source.glob("*.tar"))
    manifest = write_manifest(tmp_path / "in/manifest.json", "latents", tars, {}, {})
    assert reshard(tmp_path, tmp_path / "in/manifest.json")["kind"] == "latents"
    (tmp_path / "in" / manifest["shards"][0]["index"]).unlink()
    assert "not a readable index of" in refused(tmp_path, tmp_path / "in/manifest.json")


def numbered(path, numbers):
    """Write a tar whose size does not depend on the numbers in it."""
    fields = [{"bin": b"%03d" % n, "json": json.dumps({"n": n % 10}).encode()} for n in numbers]
    return write_tar(path, [(f"{n:05d}", f) for n, f in zip(numbers, fields, strict=True)])


@pytest.mark.parametrize("how", ["written", "renamed", "copied"])
def test_a_shard_that_was_replaced_by_one_of_equal_size_is_indexed_anew(tmp_path, how):
    shard = numbered(tmp_path / "0.tar", range(10, 30))
    manifest = tmp_path / "manifest.json"
    write_manifest(manifest, "images", [shard], {}, {})
    old = shard.stat()
    if how == "written":
        numbered(shard, range(39, 19, -1))
    else:  # with the times of the old file, which rsync and cp -p preserve
        other = numbered(tmp_path / "other", range(39, 19, -1))
        os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
        os.replace(other, shard) if how == "renamed" else shutil.copy2(other, shard)
        assert shard.stat().st_mtime_ns == old.st_mtime_ns
    assert shard.stat().st_size == old.st_size
    kept = contents(paths(reshard(tmp_path, manifest, filters={"n": "==3"})))
    assert [(key, fields["bin"]) for key, fields in kept] == [("00033", b"033"), ("00023", b"023")]


def test_unchanged_shard_is_not_indexed_again(tmp_path):
    shard = numbered(tmp_path / "0.tar", range(10, 30))
    write_manifest(tmp_path / "manifest.json", "images", [shard], {}, {})
    (row,) = read_manifest(tmp_path / "manifest.json")["shards"]
    index = read_index(row["index_path"], row["path"])
    write_index(row["index_path"], index.take(np.arange(5)))  # a shortened index shows whether the index is read
    assert read_source(row, row["path"], ["n"]) == index[:5]
    os.utime(shard)  # as in a copied or restored folder
    assert read_source(row, row["path"], ["n"]) == index


def test_the_indices_of_the_result_are_those_of_its_tars(tmp_path, source):
    for row in reshard(tmp_path, f"{source}/*.tar")["shards"]:
        index = read_index(row["index_path"], row["path"])
        assert index == index_tar(row["path"]) and index.readable.all() and "group" in index.metadata.column_names
        describe_shard(row["path"], tmp_path / "anew.index.parquet")
        assert (tmp_path / "anew.index.parquet").read_bytes() == Path(row["index_path"]).read_bytes()
        (tmp_path / "anew.index.parquet").unlink()


# ---------------------------------------------------------------- the held-out split
def side(value, fraction=0.4, seed=5):
    """Return whether the selection puts a value into the held-out split."""
    digest = hashlib.sha256(f"{seed}:{value}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


@pytest.mark.parametrize("column", ["caption", "pwatermark", "original_width"])
def test_the_splits_are_those_of_the_selection(tmp_path, source, column):
    select = {"held_out": {"column": column, "fraction": 0.4, "seed": 5}}
    found = {}
    for split in ("train", "held_out"):
        manifest = reshard(tmp_path / split, f"{source}/*.tar", f"split={split}", select=select)
        found[split] = contents(paths(manifest))
        assert manifest["samples"] + sum(manifest["dropped"].values()) == 25
    assert found["held_out"] == expected(lambda meta: passes(meta) and side(meta[column]))
    assert found["train"] == expected(lambda meta: passes(meta) and not side(meta[column]))


def test_split_of_a_value_does_not_depend_on_other_values_of_its_shard(tmp_path):
    values = [[1, 2, 3, None], [1, 2.5, "a", 2], ["3", [1], 3, "\ud800"]]
    for tar, row in enumerate(values):
        samples = [(f"{tar}{n}", {"json": json.dumps({"v": value}).encode()}) for n, value in enumerate(row)]
        write_tar(tmp_path / f"{tar}.tar", samples)
    sides = {}
    for split in ("train", "held_out"):
        select = {"held_out": {"column": "v", "fraction": 0.5, "seed": 1}}
        manifest = reshard(tmp_path / split, f"{tmp_path}/*.tar", f"split={split}", filters={}, select=select)
        for _, fields in contents(paths(manifest)):
            assert sides.setdefault(str(json.loads(fields["json"])["v"]), split) == split
    assert set(sides.values()) == {"train", "held_out"} and len(sides) == 8


def test_held_out_split_can_have_separate_shards(tmp_path, source):
    config = {
        "held_out_path": str(source / "00003.tar"),
        "select": {"held_out": {"column": "caption", "fraction": 0.4}},
    }
    held_out = reshard(tmp_path / "held_out", f"{source}/*.tar", "split=held_out", **config)
    assert contents(paths(held_out)) == expected(passes, range(8, 20))
    assert contents(paths(reshard(tmp_path / "train", f"{source}/*.tar", **config))) == expected(passes)


# ---------------------------------------------------------------- what is refused
def test_a_key_that_no_sample_of_a_shard_has_counts_as_null(tmp_path):
    write_tar(tmp_path / "0.tar", [("a", {"json": b'{"w": 1}'}), ("b", {"json": b"{}"})])
    write_tar(tmp_path / "1.tar", [("c", {"json": b"{}"})])
    manifest = reshard(tmp_path, f"{tmp_path}/*.tar", filters={"w": ">=1"})
    assert [key for key, _ in contents(paths(manifest))] == ["a"] and manifest["yields"][0]["null"] == 2
    manifest = reshard(tmp_path, f"{tmp_path}/*.tar", filters={"w": None})
    assert [key for key, _ in contents(paths(manifest))] == ["b", "c"]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_held_out_column_that_no_sample_has_is_refused(tmp_path, source, split):
    select = {"held_out": {"fraction": 0.4}}  # by url, which these samples do not have
    message = refused(tmp_path, f"{source}/*.tar", f"split={split}", select=select)
    assert "select.held_out.column: no sample of" in message and "has url" in message
    assert not list(tmp_path.glob("resharded/*.json"))
    samples = [(f"{n}", {"json": json.dumps({"url": n} if n else {}).encode()}) for n in range(9)]
    write_tar(tmp_path / "0.tar", samples)  # one shard with the column suffices
    manifest = reshard(
        tmp_path, f"{{{source}/00000.tar,{tmp_path}/0.tar}}", f"split={split}", filters={}, select=select
    )
    assert manifest["samples"] + sum(manifest["dropped"].values()) == 16


def test_repeated_key_is_refused(tmp_path):
    fields = {"json": b'{"keep": true}'}
    write_tar(tmp_path / "0.tar", [("x", fields), ("same", fields)])
    write_tar(tmp_path / "1.tar", [("dropped", {"json": b"{}"}), ("same", fields)])
    message = refused(tmp_path, f"{tmp_path}/*.tar", filters={"keep": True})
    assert (
        f"{tmp_path}/1.tar: sample same would be the neighbour of a sample of the same key from {tmp_path}/0.tar"
        in message
    )
    write_tar(tmp_path / "2.tar", [("twice", fields), ("dropped", {"json": b"{}"}), ("twice", fields)])
    message = refused(tmp_path, f"{tmp_path}/2.tar", filters={"keep": True})
    assert "2.tar: sample twice would be the neighbour" in message
    assert len(reshard(tmp_path, f"{tmp_path}/2.tar", filters={})["shards"]) == 1


def test_invalid_configuration_is_refused(tmp_path, source):
    everything = f"{source}/*.tar"
    message = refused(tmp_path, everything, filters={"original_width": ">=9000"})
    assert "no sample is left for train" in message and "original_width >= 9000" in message
    assert "select.deduplicate: is for tables only" in refused(tmp_path, everything, select={"deduplicate": "url"})
    assert "select.rows: is for tables only" in refused(tmp_path, everything, select={"rows": 5})
    message = refused(tmp_path, everything, select={"held_out": {"fraction": 2}})
    assert "select.held_out.fraction: must be at least 0 and less than 1, got 2.0" in message
    assert "shards.held_out_path: name the shards" in refused(tmp_path, everything, "split=held_out")
    assert "samples_per_shard: must be at least 1, got 0" in refused(tmp_path, everything, samples_per_shard=0)
    assert "filters.a: cannot parse the predicate" in refused(tmp_path, everything, filters={"a": ">=="})
    assert "part=1 parts=1" in refused(tmp_path, everything, "part=1")
    assert "9.tar: shard is missing" in refused(tmp_path, tmp_path / "9.tar")
    assert not list(tmp_path.glob("resharded/*.json"))


def test_damaged_source_is_named(tmp_path, source):
    (tmp_path / "cut.tar").write_bytes((source / "00000.tar").read_bytes()[:3000])
    assert "cut.tar: not a whole tar" in refused(tmp_path, tmp_path / "cut.tar")


def test_second_process_in_the_same_folder_is_refused(tmp_path, source):
    manifest = reshard(tmp_path, f"{source}/*.tar")
    with hold_lock((tmp_path / "resharded" / manifest["shards"][0]["name"]).parent / ".lock"):
        assert "another process writes these shards" in refused(tmp_path, f"{source}/*.tar")


# ---------------------------------------------------------------- interruptions
def test_killed_resharding_ends_with_the_same_bytes(tmp_path):
    """Kill -9 at an early and a late shard and just before the manifest, at points that random kills rarely hit."""
    (tmp_path / "in").mkdir()
    for tar in range(20):
        samples = [(f"{tar:03d}{n:03d}", {"json": json.dumps({"n": n}).encode()}) for n in range(10)]
        write_tar(tmp_path / f"in/{tar:05d}.tar", samples)
    config = {"filters": {"n": "not in [3, 5]"}, "samples_per_shard": 16}  # 10 shards
    reshard(tmp_path / "whole", f"{tmp_path}/in/*.tar", **config)
    killed = tmp_path / "killed"
    killed.mkdir()
    for replaces in (0, 3, 14, 20):  # two renames per shard: tar and index
        assert kill_script("reshard", arguments(killed, f"{tmp_path}/in/*.tar", **config), replaces=replaces)
        assert not (killed / "resharded/0-of-1.json").exists()
    reshard(killed, f"{tmp_path}/in/*.tar", **config)
    assert files(killed) == files(tmp_path / "whole")


def files(folder) -> dict:
    """Return the bytes of every result file; of the manifest, without the code digest."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.glob("resharded/**/[!.]*") if f.is_file()}
    return {name: re.sub(rb'"code": "\w+"', b"", data) for name, data in found.items()}
