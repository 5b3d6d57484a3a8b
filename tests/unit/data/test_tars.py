"""Tests of tars: the fast scan against tarfile, the index file, metadata in columns, and the shard writer."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import make_sample, write_tar

from sdtrain.data import predicates, tars
from sdtrain.data.indices import read_facts, read_index, read_metadata, write_index
from sdtrain.data.tars import index_tar
from sdtrain.errors import DataError

SAMPLES = [make_sample(n) for n in range(5)]


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "00000.tar", SAMPLES)


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
    whole = -(-sum(end) // 512) * 512  # the end of the last member and its padding
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
        with pytest.raises(DataError, match=r"cut\.tar: not a whole tar \(.*\); delete it and rebuild the shards"):
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
    except DataError:
        pass


def test_damaged_header_is_not_the_end_of_a_tar(tar):
    data = bytearray(tar.read_bytes())
    header = index_tar(tar)[2].fields["jpg"][0] - 512
    data[header + 148] ^= 0xFF  # a digit of its checksum
    tar.write_bytes(data)
    with pytest.raises(DataError, match="no end-of-archive mark after"):
        index_tar(tar)


def test_foreign_and_missing_files_are_named(tmp_path):
    (tmp_path / "text.tar").write_text("not a tar at all\n" * 100)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.txt"))
    (tmp_path / "folder.tar").mkdir()
    for name in ("text.tar", "zipped.tar", "folder.tar"):
        with pytest.raises(DataError, match=f"{name}: not a whole tar"):
            index_tar(tmp_path / name)
    with pytest.raises(DataError, match="absent.tar: shard is missing; rebuild it"):
        index_tar(tmp_path / "absent.tar")


# ---------------------------------------------------------------- the fast scan against tarfile
NAMES = st.one_of(
    st.text("ab./", min_size=1, max_size=6),
    st.text("abé.", min_size=1, max_size=5).map(lambda name: "folder/" * 15 + name),
    st.builds(lambda name, length: "x" * length + name, st.text("ab.", min_size=1, max_size=5), st.integers(90, 300)),
)
MEMBERS = st.lists(
    st.tuples(NAMES, st.integers(0, 1500), st.sampled_from([0, 7, 1.5]), st.integers(0, 9).map(lambda n: n == 0)),
    max_size=8,
)


def write_members(path, members, form):
    """Write a tar of (name, bytes, time, is a folder); skip names that the format cannot store."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, size, mtime, folder in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = (0, 0) if folder else (size, mtime if form == tarfile.PAX_FORMAT else int(mtime))
            info.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
            try:
                tar.addfile(info, io.BytesIO(b"d" * size))
            except ValueError:
                assert form == tarfile.USTAR_FORMAT
    return path


def by_tarfile(path):
    """Return the expected index, read with tarfile: [(key, {extension: (offset, size)})]."""
    samples = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][extension.lower()] = (member.offset_data, member.size)
    return samples


def test_files_added_by_macos_are_skipped(tmp_path):
    members = [
        (name, {ext: data}) for key, fields in SAMPLES for ext, data in fields.items() for name in (f"._{key}", key)
    ]
    hidden = index_tar(write_tar(tmp_path / "mac.tar", members))
    assert [(s.key, {e: s.read(e) for e in s.fields}) for s in hidden] == SAMPLES


def test_keys_of_any_length_are_written(tmp_path):
    keys = ["a" * 120, "b/" * 90 + "c", "übung"]
    with tars.write_tar(tmp_path / "a.tar") as add:
        for key in keys:
            add(key, {"txt": key.encode()})
    assert [(s.key, s.read("txt").decode()) for s in index_tar(tmp_path / "a.tar")] == [(key, key) for key in keys]


@given(members=MEMBERS, form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(max_examples=150, deadline=None)
def test_the_index_is_what_tarfile_reads(tmp_path_factory, members, form):
    tar = write_members(tmp_path_factory.mktemp("scan") / "a.tar", members, form)
    index = index_tar(tar)
    assert [(s.key, s.fields) for s in index] == by_tarfile(tar)
    for sample, begin, end in zip(index, index.begin, index.end, strict=True):  # these bytes alone are a valid tar
        alone = tar.with_name("alone.tar")
        alone.write_bytes(tar.read_bytes()[begin:end] + bytes(1024))
        (found,) = index_tar(alone)
        assert (found.key, set(found.fields)) == (sample.key, set(sample.fields))
        assert all(found.read(e) == sample.read(e) for e in sample.fields)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_byte_never_shows_other_samples_than_tarfile_would(tmp_path_factory, data):
    tar = write_tar(tmp_path_factory.mktemp("flip") / "a.tar", SAMPLES[:2])
    content = bytearray(tar.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    tar.write_bytes(content)
    try:
        found = [(s.key, s.fields) for s in index_tar(tar)]
    except DataError:
        return
    assert found == by_tarfile(tar)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_common_tars_use_the_fast_scan(tmp_path, monkeypatch, form):
    def slow(*_):
        raise AssertionError("tarfile was asked")

    monkeypatch.setattr(tars, "_scan_with_tarfile", slow)
    members = [
        ("a/1.jpg", 9, 1.5, False),
        ("a", 0, 0, True),
        ("a/1.txt", 0, 3, False),
        ("b" * 80 + "/2.jpg", 5, 0, False),
    ]
    index = index_tar(write_members(tmp_path / "a.tar", members, form))
    assert [sorted(s.fields) for s in index] == [["jpg", "txt"], ["jpg"]]


def test_an_index_of_many_samples_is_small(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [(f"{n:09d}", {"jpg": b"", "txt": b"", "json": b""}) for n in range(2000)])
    index = index_tar(tar)
    arrays = [index.keys, index.begin, index.end, *index.fields.values()]
    assert sum(array.nbytes for array in arrays) <= 100 * len(index)


def test_an_index_is_a_sequence(tar):
    index = index_tar(tar, shard="s3://bucket/00000.tar")
    assert index[0].shard == "s3://bucket/00000.tar" and index[-1] == index[4] and index[1:3] == [index[1], index[2]]
    assert index.take(index.keys == SAMPLES[3][0]) == [index[3]] and list(reversed(index))[0] == index[4]
    with pytest.raises(IndexError):
        index[5]


def test_names_that_are_not_utf8_are_readable(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        tar.addfile(tarfile.TarInfo("\udcff.txt"))
    index = read_metadata(index_tar(tmp_path / "a.tar"), tmp_path / "a.tar")
    assert [(s.key, set(s.fields)) for s in index] == [("\\xff", {"txt"})]
    write_index(tmp_path / "a.parquet", index)
    assert read_index(tmp_path / "a.parquet", index.shard) == index


# ---------------------------------------------------------------- metadata and the index's file
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, 2**63, 10**30, 1.0, 2.5, math.nan, math.inf, "", "a", "2", "\ud800", "é"]),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text("a", max_size=1), SCALARS, max_size=1)
)
KEYS = st.sampled_from(["a", "b", "a.b", "json:a", "", "key", "\0", "é", "\ud800"])
DOCUMENTS = st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=6)
PREDICATES = st.sampled_from(
    [
        "==2",
        "!=2",
        ">=1",
        "<2.5",
        1.0,
        True,
        None,
        "a",
        "in [a, 2, null]",
        "not in [1, é]",
        f"=={2**53 + 1}",
        f"<{2**63}",
    ]
)


@given(documents=DOCUMENTS, filters=st.dictionaries(KEYS.filter(str.isprintable), PREDICATES, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_filters_on_a_stored_index_equal_filters_on_the_json(tmp_path_factory, documents, filters):
    folder = tmp_path_factory.mktemp("verdicts")
    texts = [json.dumps(document).encode() for document in documents]
    tar = write_tar(folder / "a.tar", [(str(n), {"json": text}) for n, text in enumerate(texts)])
    write_index(folder / "a.parquet", read_metadata(index_tar(tar), tar))
    chosen = predicates.parse(filters)
    values = [json.loads(text) for text in texts]
    for columns in (chosen.columns, None):
        index = read_index(folder / "a.parquet", str(tar), columns)
        assert index == index_tar(tar) and index.readable.all()
        if columns is None and not set(chosen.columns) <= set(index.metadata.column_names):
            continue  # no sample has the key
        verdicts = chosen.mask(index.metadata).tolist()
        assert verdicts == [all(item.passes(v.get(item.column)) for item in chosen.items) for v in values]


def test_columns_are_typed_where_all_values_agree(tmp_path):
    rows = [{"n": 1, "f": 1.5, "s": "a", "b": True, "mixed": 1}, {"n": None, "mixed": 2.5}]
    tar = write_tar(tmp_path / "a.tar", [(str(n), {"json": json.dumps(row).encode()}) for n, row in enumerate(rows)])
    schema = read_metadata(index_tar(tar), tar).metadata.schema
    assert {f.name: str(f.type) for f in schema} == {
        "n": "int64",
        "f": "double",
        "s": "string",
        "b": "bool",
        "mixed": "string",
    }
    assert [f.name for f in schema if f.metadata] == ["mixed"] and schema.field("mixed").metadata == {b"json": b"1"}


def test_json_that_is_not_an_object_counts_as_unreadable(tmp_path):
    texts = [b"{}", b"[1]", b"{", b"\xff", b"[" * 100_000, b"", b'{"a": ' + b"9" * 5000 + b"}"]
    samples = [(str(n), {"json": text}) for n, text in enumerate(texts)] + [("last", {"txt": b"x"})]
    tar = write_tar(tmp_path / "a.tar", samples)
    index = read_metadata(index_tar(tar), tar)
    assert index.readable.tolist() == [True] + [False] * 7
    assert read_metadata(index, tar, ["absent"]).metadata["absent"].to_pylist() == [None] * 8


def test_the_same_index_gives_the_same_bytes(tar, tmp_path):
    for name in ("one", "two"):
        write_index(tmp_path / name, read_metadata(index_tar(tar), tar), {"bytes": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read_facts(tmp_path / "one") == {"version": 1, "samples": 5, "bytes": 1}


def test_missing_and_damaged_index_are_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pq.read_table(io.BytesIO(_table())), tmp_path / "b.parquet")
    for name in ("a", "b", "absent"):
        with pytest.raises(DataError, match=rf"{name}.parquet: not a readable index of x.tar .*index the shards"):
            read_index(tmp_path / f"{name}.parquet", "x.tar")


def _table() -> bytes:
    file = io.BytesIO()
    pq.write_table(tars.pa.table({"key": ["a"]}), file)
    return file.getvalue()


# ---------------------------------------------------------------- writing
def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one.tar", "two.tar"):
        with tars.write_tar(tmp_path / name) as add:
            for key, fields in SAMPLES:
                add(key, fields)
    assert sorted(os.listdir(tmp_path)) == ["one.tar", "two.tar"]
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert [(s.key, {e: s.read(e) for e in s.fields}) for s in index_tar(tmp_path / "one.tar")] == SAMPLES


def test_a_failure_leaves_no_shard(tmp_path):
    with pytest.raises(KeyError), tars.write_tar(tmp_path / "a.tar") as add:
        add(*SAMPLES[0])
        raise KeyError
    assert os.listdir(tmp_path) == []
