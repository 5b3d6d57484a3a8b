"""Tests of sample sources: tars and tables on disk, on web servers, on S3, behind commands; filters and fields."""

from __future__ import annotations

import functools
import http.server
import json
import multiprocessing
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import SHARD_SIZES, draw, jpeg, make_sample, write_tar

from sdtrain.data import predicates, table_source
from sdtrain.data.manifest import write_manifest
from sdtrain.data.table_source import TableSource
from sdtrain.data.tar_source import TarSource
from sdtrain.errors import DataError
from sdtrain.io import storage

WANTED = {"image": ("jpg", "png"), "caption": ("txt",)}
COLUMNS = {"image": ("jpg", "image", "path", "url"), "caption": ("txt", "caption")}


def keys(source) -> list[str]:
    shards = [source.load(number) for number in range(source.shards)]
    return [shard.key(row) for shard in shards for row in range(len(shard))]


def read_all(source) -> list[tuple[bytes, bytes]]:
    fields = [fields for number in range(source.shards) for fields in read_shard(source.load(number))]
    return [(field["image"], field["caption"]) for field in fields]


def read_shard(shard) -> list[dict[str, bytes]]:
    return [shard.read(row) for row in range(len(shard))]


def total(source) -> int:
    return int(source.count(range(source.shards)).sum())


def blank(path: Path) -> None:
    """Overwrite a file with zeros of the same size."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)


# ---------------------------------------------------------------- which samples
@pytest.mark.parametrize("manifest", [True, False])
def test_samples_without_a_field_or_outside_a_filter_are_counted(tmp_path, manifest):
    samples = [make_sample(n) for n in range(10)]  # pwatermark 0.0, 0.1 … 0.9
    del samples[0][1]["txt"], samples[1][1]["jpg"], samples[2][1]["json"]
    samples[3][1]["json"] = b"{cut"
    samples[4][1]["json"] = b"[1]"
    path = write_tar(tmp_path / "a.tar", samples)
    if manifest:
        write_manifest(tmp_path / "m.json", "images", [path], {}, {})
    path = str(tmp_path / "m.json" if manifest else path)
    source = TarSource(path, WANTED, {"pwatermark": "<=0.7"}, cache=str(tmp_path / "c"))
    assert [int(key) for key in keys(source)] == [5, 6, 7] and source.count([0]).tolist() == [3]
    assert source.dropped == {"no txt": 1, "no jpg/png": 1, "no readable json": 3, "filters": 2}
    assert (source.seen, source.kept, source.counted) == (10, 3, 1) and source.cheap == manifest
    source = TarSource(path, {"image": WANTED["image"]}, cache=str(tmp_path / "c"))
    assert total(source) == 9 == len(source.load(0)) and source.dropped == {"no jpg/png": 1}


def test_first_present_extension_of_alternatives_is_read(tmp_path):
    fields = [{"png": b"p", "jpg": b"j"}, {"png": b"p"}, {"webp": b"w"}, {"gif": b"g"}]
    path = write_tar(tmp_path / "a.tar", [(str(n), f) for n, f in enumerate(fields)])
    source = TarSource(str(path), {"image": ("jpg", "png", "webp")}, cache=str(tmp_path / "c"))
    assert read_shard(source.load(0)) == [{"image": b"j"}, {"image": b"p"}, {"image": b"w"}]


def test_a_key_that_a_shard_lacks_counts_as_null(image_shards):
    assert total(TarSource(str(image_shards / "manifest.json"), WANTED, {"score": ">1"})) == 0
    assert total(TarSource(str(image_shards / "manifest.json"), WANTED, {"score": None})) == sum(SHARD_SIZES)


@given(
    values=st.lists(
        st.one_of(st.integers(-3, 3), st.floats(-3, 3), st.sampled_from(["a", "2", None, True])), min_size=1
    )
)
@settings(deadline=None, max_examples=25)
def test_filters_on_the_index_equal_filters_on_each_sample(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("values")
    samples = [(f"{n}", {"jpg": b"", "json": json.dumps({"v": v}).encode()}) for n, v in enumerate(values)]
    path = write_tar(folder / "a.tar", samples)
    for predicate in (">=1", "in [a, 2]", "!=2", None):
        source = TarSource(str(path), {"image": ("jpg",)}, {"v": predicate}, cache=str(folder / "c"))
        verdicts = predicates.parse({"v": predicate})
        assert keys(source) == [str(n) for n, v in enumerate(values) if all(item.passes(v) for item in verdicts.items)]


def test_a_malformed_filter_and_a_wrong_path_are_named(image_shards, tmp_path):
    with pytest.raises(DataError, match=r"^dataset\.params\.filters\.original_width: cannot parse the predicate '=>5'"):
        TarSource(str(image_shards / "manifest.json"), WANTED, {"original_width": "=>5"})
    with pytest.raises(DataError, match="00003.tar: shard is missing"):
        TarSource(f"{image_shards}/{{00000..00003}}.tar", WANTED)
    with pytest.raises(DataError, match=r"dataset\.params\.path: .*no file matches"):
        TarSource(f"{tmp_path}/*.tar", WANTED)


# ---------------------------------------------------------------- tars, wherever they are
@pytest.fixture(scope="module")
def local(image_shards):
    source = TarSource(str(image_shards / "manifest.json"), WANTED)
    return keys(source), read_all(source)


class Requests(http.server.SimpleHTTPRequestHandler):
    """Serve files of a folder, with ranges, and record the requested paths."""

    seen: Counter = Counter()

    def do_GET(self):
        self.seen[self.path] += 1
        if "Range" not in self.headers:
            return super().do_GET()
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Return serve(folder), which starts a web server of the folder and returns its address."""
    servers = []

    def start(folder: Path) -> str:
        Requests.seen.clear()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Requests, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["braces", "glob", "pipe", "s3", "s3 glob", "http"])
def test_samples_are_the_same_wherever_the_shards_are(kind, image_shards, tmp_path, local, request):
    braces = "{00000..00002}.tar"
    if kind.startswith("s3"):
        s3 = request.getfixturevalue("s3")
        for number in range(3):
            s3.put(f"wherever/{number:05d}.tar", (image_shards / f"{number:05d}.tar").read_bytes())
        path = s3.url("wherever/" + (braces if kind == "s3" else "*.tar"))
    elif kind == "http":
        path = f"{request.getfixturevalue('serve')(image_shards)}/{braces}"
    else:
        path = {
            "braces": f"{image_shards}/{braces}",
            "glob": f"{image_shards}/*.tar",
            "pipe": f"pipe:cat {image_shards}/{braces}",
        }[kind]
    for _ in range(2):  # the second time with the indices of the first
        source = TarSource(path, WANTED, cache=str(tmp_path / "c"))
        assert not source.cheap and source.shards == 3 and (keys(source), read_all(source)) == local
    filtered = TarSource(path, WANTED, {"group": "==even"}, cache=str(tmp_path / "c"))
    assert [int(key) for key in keys(filtered)] == list(range(0, sum(SHARD_SIZES), 2))


def test_shard_of_a_web_server_is_read_once_then_by_ranges(image_shards, tmp_path, serve):
    address = serve(image_shards)
    source = TarSource(f"{address}/00001.tar", WANTED, cache=str(tmp_path / "c"))
    assert len(read_all(source)) == SHARD_SIZES[1]
    assert Requests.seen["/00001.tar"] == 1 + SHARD_SIZES[1]
    assert total(TarSource(f"{address}/00001.tar", WANTED, cache=str(tmp_path / "c"))) == SHARD_SIZES[1]
    assert Requests.seen["/00001.tar"] == 1 + SHARD_SIZES[1]


def test_tars_with_an_index_are_not_read_for_it(tmp_path):
    tars = [write_tar(tmp_path / f"{i}.tar", [make_sample(10 * i + n) for n in range(10)]) for i in range(3)]
    write_manifest(tmp_path / "m.json", "images", tars, {}, {})
    for tar in tars:
        blank(tar)
    source = TarSource(str(tmp_path / "m.json"), WANTED, {"pwatermark": "<0.5"})
    assert source.cheap and total(source) == 15 and [int(k) % 10 for k in keys(source)] == [0, 1, 2, 3, 4] * 3


def test_a_shard_that_changed_is_indexed_anew(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(3)])
    assert len(keys(TarSource(str(tar), WANTED, cache=str(tmp_path / "c")))) == 3
    write_tar(tar, [make_sample(n) for n in range(10, 15)])
    source = TarSource(str(tar), WANTED, cache=str(tmp_path / "c"))
    assert [int(k) for k in keys(source)] == [10, 11, 12, 13, 14] and read_all(source)[0][0] == make_sample(10)[1][
        "jpg"
    ]


def test_a_damaged_or_shortened_shard_is_named(tmp_path, serve):
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(3)])
    shard = TarSource(str(tar), WANTED, cache=str(tmp_path / "c")).load(0)
    os.truncate(tar, shard.spans["caption"][2, 0])
    with pytest.raises(DataError, match=r"a.tar: cut off before byte \d+"):
        shard.read(2)
    for path in (str(tar), f"{serve(tmp_path)}/a.tar", f"pipe:cat {tar}"):
        with pytest.raises(DataError, match=r"a.tar: .*not a whole tar"):
            total(TarSource(path, WANTED, cache=str(tmp_path / "d")))
    with pytest.raises(DataError, match=r"pipe:exit 3: the command failed with exit code 3"):
        total(TarSource("pipe:exit 3", WANTED, cache=str(tmp_path / "d")))


def test_local_copies_of_pipe_shards_are_bounded_and_renewed(tmp_path):
    for i in range(7):
        write_tar(tmp_path / f"{i}.tar", [make_sample(n) for n in range(3 * i, 3 * i + 3)])
    log = tmp_path / "log"
    path = f"pipe:echo x >> {log}; cat {tmp_path}/{{0..6}}.tar"
    source = TarSource(path, WANTED, cache=str(tmp_path / "c"), window=2)
    loaded = [source.load(number) for number in range(7)]
    assert log.read_text().count("x") == 7
    copies = [p for p in tmp_path.glob("c/*/passing/*") if not p.suffix]
    assert len(copies) == 4  # of two windows
    assert total(TarSource(path, WANTED, cache=str(tmp_path / "c"), window=2)) == 21 and log.read_text().count("x") == 7
    assert loaded[0].read(1)["image"] == make_sample(1)[1]["jpg"] and log.read_text().count("x") == 8


def read_at_random(path: str, cache: str, seed: int) -> None:
    source = TarSource(path, WANTED, cache=cache, window=1)
    truth = TarSource(path.removeprefix("pipe:cat "), WANTED, cache=cache)
    loaded, local = ([s.load(number) for number in range(s.shards)] for s in (source, truth))
    for number in np.random.default_rng(seed).integers(len(loaded), size=150):
        assert loaded[number].read(0) == local[number].read(0)


def test_processes_can_share_a_small_cache(tmp_path):
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", [make_sample(i)])
    arguments = f"pipe:cat {tmp_path}/{{0..5}}.tar", str(tmp_path / "c")
    processes = [multiprocessing.Process(target=read_at_random, args=(*arguments, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_a_shard_of_a_web_server_that_changed_is_indexed_anew(tmp_path, serve):
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(3)])
    path, cache = f"{serve(tmp_path)}/a.tar", str(tmp_path / "c")
    assert total(TarSource(path, WANTED, cache=cache)) == 3
    write_tar(tar, [make_sample(n) for n in range(10, 15)])
    source = TarSource(path, WANTED, cache=cache)
    assert total(source) == 5 and read_all(source)[0][0] == make_sample(10)[1]["jpg"]


def test_changed_pipe_shard_ends_the_run_and_the_next_run_indexes_it(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [make_sample(n) for n in range(3)])
    path, cache = f"pipe:cat {tar}", str(tmp_path / "c")
    shard = TarSource(path, WANTED, cache=cache).load(0)
    write_tar(tar, [make_sample(n) for n in range(10, 35)])
    for copy in tmp_path.glob("c/*/passing/*"):
        copy.unlink()
    with pytest.raises(DataError, match=r"a.tar: the source has changed: .*; delete .*c/"):
        shard.read(0)
    assert [int(key) for key in keys(TarSource(path, WANTED, cache=cache))] == list(range(10, 35))


def test_cache_in_a_shared_folder_is_a_private_subfolder(tmp_path, monkeypatch):
    (tmp_path / "c" / f"sdtrain-{os.getuid()}").mkdir(parents=True)
    stat = Path.stat

    def foreign(path, **options):  # like /tmp, which belongs to root
        found = stat(path, **options)
        if path == tmp_path / "c":
            return os.stat_result([*found[:4], found.st_uid + 1, *found[5:]])
        return found

    monkeypatch.setattr(Path, "stat", foreign)
    tar = write_tar(tmp_path / "a.tar", [make_sample(0)])
    folder = TarSource(str(tar), WANTED, cache=str(tmp_path / "c")).folder
    assert folder.parent == tmp_path / "c" / f"sdtrain-{os.getuid()}"


def test_a_cache_of_another_user_is_refused(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", [make_sample(0)])
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(DataError, match=r"belongs to another user; set dataset\.params\.cache"):
        total(TarSource(str(tar), WANTED, cache=str(tmp_path / "c")))


# ---------------------------------------------------------------- tables
def pictures(count: int) -> list[bytes]:
    return [jpeg(draw(n)[0]) for n in range(count)]


def write_parquet(path: Path, columns: dict, rows: int = 4) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return str(path)


def test_a_parquet_of_bytes_is_read_by_row_groups(tmp_path):
    data = pictures(10)
    path = write_parquet(tmp_path / "a.parquet", {"caption": [f"c{n}" for n in range(10)], "jpg": data, "n": range(10)})
    source = TableSource(path, COLUMNS, {"n": ">=3"}, cache=str(tmp_path / "c"))
    assert source.shards == 3 and source.count([0, 1, 2]).tolist() == [1, 4, 2] and source.dropped == {"filters": 3}
    assert read_all(source) == [(data[n], f"c{n}".encode()) for n in range(3, 10)]
    assert keys(source) == [f"a.parquet:{n}" for n in range(3, 10)]


def test_rows_of_parquet_are_counted_without_their_images(tmp_path):
    """The count equals the number of loaded rows, also with missing images or captions."""
    images = [b"x" * 100_000] * 8
    images[5] = None
    columns = {"image": images, "caption": ["a", None, *"cdefgh"], "n": range(8)}
    for filters in (None, {"n": "!=3"}):
        source = TableSource(
            write_parquet(tmp_path / "a.parquet", columns), COLUMNS, filters, cache=str(tmp_path / "c")
        )
        counts = source.count([0, 1]).tolist()
        assert counts == [len(source.load(number)) for number in range(2)] == [3 - bool(filters), 3]
        assert source.dropped == {"no image": 1, "no caption": 1, **({"filters": 1} if filters else {})}
    source = TableSource(write_parquet(tmp_path / "b.parquet", columns), COLUMNS, cache=str(tmp_path / "d"))
    assert total(source) == 6 and not list(tmp_path.glob("d/*/passing/*"))


def test_structs_of_the_hub_hold_bytes_or_paths(tmp_path):
    data = pictures(3)
    (tmp_path / "x.jpg").write_bytes(data[1])
    images = [
        {"bytes": data[0], "path": "a.jpg"},
        {"bytes": None, "path": "x.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    path = write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["a", "b", "c", "d"]})
    source = TableSource(path, COLUMNS, columns={"caption": "text"}, cache=str(tmp_path / "c"))
    shard = source.load(0)
    assert [fields["image"] for fields in read_shard(shard)] == [data[0], data[1], b""]  # the last is undecodable
    assert shard.read(1, ["caption"]) == {"caption": b"b"}
    assert total(source) == 3 and source.dropped == {"no image": 1}


def test_row_groups_of_two_windows_are_kept_in_memory(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"jpg": pictures(12), "txt": ["t"] * 12}, rows=2)
    source = TableSource(path, COLUMNS, cache=str(tmp_path / "c"), window=1)
    loaded = [source.load(number) for number in range(6)]
    assert len([p for p in tmp_path.glob("c/*/passing/*") if not p.suffix]) == 2
    assert [fields["image"] for shard in loaded for fields in read_shard(shard)] == pictures(12)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_point_to_files_and_addresses(kind, tmp_path, serve, s3):
    data = pictures(4)
    (tmp_path / "images").mkdir()
    for n, image in enumerate(data):
        (tmp_path / f"images/{n}.jpg").write_bytes(image)
    places = [
        "images/0.jpg",
        (tmp_path / "images/1.jpg").as_uri(),
        f"{serve(tmp_path)}/images/2.jpg",
        s3.put("3.jpg", data[3]),
    ]
    captions = ["a, b", 'with "quotes"', "äöü", "d"]
    table = pa.table({"url": places, "caption": captions, "width": [1, 2, 3, 4]})
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        table.to_pandas().to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    source = TableSource(str(path), COLUMNS, {"width": "<=4"}, cache=str(tmp_path / "c"))
    assert read_all(source) == list(zip(data, [c.encode() for c in captions], strict=True))
    remote = TableSource(s3.put(f"t.{kind}", path.read_bytes()), COLUMNS, {"width": "==4"}, cache=str(tmp_path / "c"))
    assert read_all(remote) == [(data[3], b"d")]


def test_rows_of_text_come_in_blocks_of_ten_thousand(tmp_path):
    (tmp_path / "a.csv").write_text("path,caption\n" + "".join(f"{n}.jpg,c{n}\n" for n in range(25_001)))
    (tmp_path / "b.csv").write_text("path,caption\nx.jpg,b\n")
    source = TableSource(f"{tmp_path}/{{a,b}}.csv", COLUMNS, cache=str(tmp_path / "c"))
    assert source.count(range(4)).tolist() == [10_000, 10_000, 5_001, 1]
    shard = source.load(2)
    assert shard.key(5_000) == "a.csv:25000" and shard.read(0, ["caption"]) == {"caption": b"c20000"}
    (tmp_path / "a.csv").write_text("path,caption\nx.jpg,new\n")
    assert total(TableSource(str(tmp_path / "a.csv"), COLUMNS, cache=str(tmp_path / "c"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"image": "imag"}},
            r"dataset\.params\.columns\.image: .*a\.csv: no column imag; did you mean image\?",
        ),
        (
            {"filters": {"widht": ">1"}},
            r"dataset\.params\.filters\.widht: .*a\.csv: no column widht; did you mean width\?",
        ),
        (
            {"wanted": {"image": ("jpg", "path")}},
            r"a\.csv: none of the columns jpg, path; name the image in dataset\.params",
        ),
        ({"path": "nowhere.csv"}, r"dataset\.params\.path: .*nowhere\.csv"),
    ],
)
def test_wrong_columns_and_paths_are_named(options, message, tmp_path):
    (tmp_path / "a.csv").write_text("image,caption,width\nx.jpg,a,3\n")
    path, wanted = str(tmp_path / options.pop("path", "a.csv")), options.pop("wanted", COLUMNS)
    with pytest.raises(DataError, match=message):
        TableSource(path, wanted, **options, cache=str(tmp_path / "c"))


def test_tables_without_rows_and_of_web_servers_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match=r"a\.csv: a header, but no rows"):
        TableSource(str(tmp_path / "a.csv"), COLUMNS, cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/t.csv: .*copy them to a local folder"):
        TableSource("http://127.0.0.1:1/t.csv", COLUMNS, cache=str(tmp_path / "c"))


def test_tables_of_the_same_name_have_different_keys(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text("image,caption\nx.jpg,c\n")
    source = TableSource(f"{tmp_path}/{{a,b}}/t.csv", COLUMNS, cache=str(tmp_path / "c"))
    assert keys(source) == ["a/t.csv:0", "b/t.csv:0"]


def test_an_image_of_a_table_is_read_up_to_a_limit(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("image,caption\nx.jpg,a\npipe:cat x.jpg,b\n")
    (tmp_path / "x.jpg").write_bytes(b"x" * 1000)
    source = TableSource(str(tmp_path / "a.csv"), COLUMNS, cache=str(tmp_path / "c"))
    assert len(source.load(0).read(0)["image"]) == 1000
    monkeypatch.setattr(table_source, "MAX_BYTES", 999)
    with pytest.raises(storage.StorageError, match="x.jpg: .*more than 999 bytes"):
        source.load(0).read(0)
    with pytest.raises(storage.StorageError, match="expected the path or the s3"):
        source.load(0).read(1)


def test_arrays_of_counts(image_shards):
    source = TarSource(str(image_shards / "manifest.json"), WANTED)
    assert np.array_equal(source.count([2, 0]), [SHARD_SIZES[2], SHARD_SIZES[0]]) and source.counted == 2
    assert source.count(np.array([0, 1, 2])).sum() == source.kept == source.seen == sum(SHARD_SIZES)
