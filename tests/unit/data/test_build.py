"""Tests of build_shards as a command: img2dataset downloads a partition of a selection into shards and a manifest."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import downloads
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from downloads import Work
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from sdtrain.config import schema_data
from sdtrain.data import build, img2dataset
from sdtrain.data.tars import index_tar
from sdtrain.io.files import LockedError, hold_lock

pytestmark = pytest.mark.usefixtures("reset")


@pytest.fixture(scope="module")
def built(tmp_path_factory, server):
    """Build ten images, of which 1, 2 and 5 fail. Tests that change something use a copy."""
    work = Work(tmp_path_factory.mktemp("built"), server)
    work.select([f"{'404/' * (i in (1, 5)) + 'html/' * (i == 2)}{i}.png" for i in range(10)])
    manifest, said = work.run()
    return work, manifest, said


@pytest.fixture
def copy(built, tmp_path, server):
    shutil.copytree(built[0].folder, tmp_path, dirs_exist_ok=True)
    work = Work(tmp_path, server)
    work.output.unlink()
    return work


def samples(manifest: dict, extension="jpg") -> list[dict]:
    """Return the metadata of each sample, with its image and caption, in order."""
    found = []
    for row in manifest["shards"]:
        for sample in index_tar(row["path"]):
            image = Image.open(io.BytesIO(sample.read(extension)))
            meta = json.loads(sample.read("json"))
            assert meta["key"] == sample.key
            found.append(meta | {"image": image, "txt": sample.read("txt").decode()})
    return found


def test_shards_do_not_depend_on_the_order_of_downloads(built):
    _, manifest, said = built
    assert manifest["samples"] == 7 and [row["samples"] for row in manifest["shards"]] == [2, 3, 2], said
    for number, sample in zip([0, 3, 4, 6, 7, 8, 9], samples(manifest), strict=True):
        assert (sample["txt"], sample["caption"]) == (f"caption {number}", f"caption {number}")
        assert sample["group"] == ("even", "odd")[number % 2]
        assert (sample["original_width"], sample["original_height"]) == (24, 16)
        image = sample["image"]
        assert image.mode == "RGB" and image.size == (24, 16)  # the shorter side already is 16
        left, right = image.getpixel((4, 8)), image.getpixel((20, 8))
        assert max(abs(a - b) for a, b in zip(left, (10 * number, 200, 40), strict=True)) < 12
        assert min(right) > 245, "transparent parts come out white"


def test_failures_are_counted_by_reason(built):
    _, manifest, said = built
    assert manifest["dropped"] == {"HTTP Error 404: Not Found": 2, "not a readable image": 1} and "3 dropped" in said


def test_damaged_shards_are_rebuilt_with_the_same_bytes(copy, built, server):
    """Damage a shard, statistics and temporary files, as a kill may do; then make a tar unwritable."""
    folder = copy.output.parent / Path(built[1]["shards"][1]["name"]).parent
    tar, stats = folder / "00001.tar", folder / "download/00002_stats.json"
    tar.write_bytes(tar.read_bytes()[:2000])
    stats.write_text(stats.read_text()[:30])
    for litter in (".00001.tar.tmp", "download/_tmp/1.feather", "download/00001.tar"):
        (folder / litter).parent.mkdir(exist_ok=True)
        (folder / litter).write_bytes(b"half")
    (copy.output.parent / ".manifest.rows.tmp").write_bytes(b"half")
    in_the_way = folder / "download/00001.tar"
    in_the_way.unlink()
    in_the_way.mkdir()
    manifest, said = copy.run()
    assert manifest is None and "img2dataset gave up shards of 4 of 10 rows" in said
    in_the_way.rmdir()
    copy.run()
    assert downloads.content(copy.output) == downloads.content(built[0].output)
    assert sorted(Path(path).stem for path in server.asked) == list("456789"), "whole shards are left as they are"
    assert not (folder / ".00001.tar.tmp").exists() and not (folder / "download/_tmp").exists()


def test_options_are_passed_to_img2dataset_and_change_the_folder(copy, built, server):
    unlike_json = [[], [], [], [datetime.date(2020, 1, 1)]]
    copy.select(["opaque/0.png", "small/1.png", "2.png", "opaque/3.png"], thing=unlike_json)
    manifest, said = copy.run(
        columns=["thing"],
        encode_format="png",
        encode_quality=1,
        skip_reencode=True,
        min_image_size=10,
        min_success_rate=0.2,
        user_agent_token="123",  # a text that looks like a number
        options={"compute_hash": "md5", "extract_exif": False, "max_image_area": 300},
    )
    reasons = {"image area too large": 1, "image too small": 1, "not written; see img2dataset.log": 1}
    assert manifest["dropped"] == reasons and manifest["samples"] == 1, said
    (sample,) = index_tar(manifest["shards"][0]["path"])
    assert sample.read("png") == downloads.png(0, (16, 16), (0, 0, 0, 255)), "the server's own bytes"
    (sample,) = samples(manifest, "png")
    assert "md5" in sample and "exif" not in sample
    assert all("; 123;" in agent for agent in server.agents), server.agents
    assert manifest["made_by"]["encode_format"] == "png" and manifest["made_by"]["options"]["compute_hash"] == "md5"
    assert Path(manifest["shards"][0]["name"]).parent != Path(built[1]["shards"][0]["name"]).parent


def test_empty_partition_is_valid_and_keys_contain_the_partition(work, server):
    work.select(1)
    empty, said = work.run(part=0, parts=2, output=work.output.with_name("0-of-2.json"))
    assert (empty["samples"], empty["shards"], empty["dropped"]) == (0, [], {}), said
    manifest, said = work.run(part=1, parts=2, output=work.output.with_name("1-of-2.json"))
    (sample,) = samples(manifest)
    assert (sample["key"], sample["txt"], sample["status"]) == ("001-000000", "caption 0", "success")
    assert server.asked == Counter({"/0.png": 1})


@given(st.integers(0, 30), st.integers(1, 9), st.integers(1, 7))
def test_partitions_together_contain_the_selection(tmp_path_factory, n, parts, group):
    folder = tmp_path_factory.mktemp("rows")
    table = pa.table({"url": [str(i) for i in range(n)], "more": range(n), "caption": ["x"] * n})
    pq.write_table(table, folder / "selected.parquet", row_group_size=group)
    found = []
    for part in range(parts):
        begin, end = part * n // parts, (part + 1) * n // parts
        build.write_rows(folder / "selected.parquet", begin, end, ["url", "caption"], folder / "rows.parquet")
        rows = pq.read_table(folder / "rows.parquet")
        assert rows.num_rows == end - begin and rows.column_names == ["url", "caption"]
        found += rows["url"].to_pylist()
    assert found == table["url"].to_pylist()


def test_times_and_decimals_become_texts(tmp_path):
    values = {"url": ["u"], "caption": ["c"], "at": [datetime.datetime(2020, 1, 2)], "cost": [decimal.Decimal("1.50")]}
    pq.write_table(pa.table(values), tmp_path / "selected.parquet")
    build.write_rows(tmp_path / "selected.parquet", 0, 1, list(values), tmp_path / "rows.parquet")
    (row,) = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert row["cost"] == "1.50" and row["at"].startswith("2020-01-02")


def test_second_build_of_the_same_partition_is_refused(work, monkeypatch):
    monkeypatch.setattr(build, "PATIENCE", 0)
    config = OmegaConf.structured(schema_data.ShardsConfig)
    work.select(1)
    work.output.parent.mkdir()
    with hold_lock(work.output.with_name(".manifest.lock")):
        with pytest.raises(LockedError, match=r"another build writes manifest\.json .*; wait for it or end it"):
            build.build_shards(config, str(work.folder / "selected.parquet"), 0, 1, work.output)


def test_low_success_rate_is_an_error_and_downloads_are_retried(work, server):
    server.absent = set(range(4, 10))
    work.select(10)
    manifest, said = work.run()
    assert manifest is None and "4 of 10 images arrived" in said and "6  HTTP Error 404" in said
    server.absent = set()
    manifest, said = work.run()
    assert manifest["samples"] == 10, said
    assert [server.asked[f"/{i}.png"] for i in range(10)] == 4 * [1] + 6 * [2]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"columns": ["grup"]}, "has no column grup; did you mean group?"),
        ({"columns": ["width"]}, "shards.columns: width is written by img2dataset itself"),
        ({"columns": ["bytes"]}, "shards.columns: bytes holds bytes"),
        ({"resize_mode": "stretch"}, "img2dataset failed: ValueError: Invalid option for resize_mode: stretch"),
        ({"environment": {"IMG2DATASET": "/none/img2dataset"}}, "img2dataset is not there (/none/img2dataset)"),
        ({"colums": []}, "unknown key colums; did you mean columns?"),
        ({"encode_format": "png"}, "shards.encode_quality: must be between 0 and 9 for png"),
        ({"options": {"thread_count": 3}}, "shards.options.thread_count: set shards.threads instead"),
        ({"options": {"timeout": 3}}, "shards.options.timeout: set shards.timeout instead"),
        ({"options": {"output_format": "files"}}, "shards.options.output_format: not an option to set here"),
        (
            {"options": {"compute_hsah": "md5"}},
            "shards.options.compute_hsah: not an option to set here; did you mean comp",
        ),
        ({"options": {"bbox_col": "boxes"}}, "has no column boxes"),
        ({"part": 2, "parts": 2}, "part=2 parts=2: expected a part from 0 to parts - 1"),
    ],
)
def test_invalid_input_is_an_error_and_leaves_no_file(work, config, message):
    work.select(4, bytes=[b"x"] * 4)
    manifest, said = work.run(**config)
    assert manifest is None and message in said


def test_missing_and_empty_selections_are_refused(work):
    manifest, said = work.run()
    assert manifest is None and "selected.parquet: no table there" in said
    work.select(0)
    manifest, said = work.run()
    assert manifest is None and "no rows" in said and "select.held_out.fraction" in said


@pytest.mark.parametrize(
    "said, reason",
    [
        ("<urlopen error [Errno -2] Name or service not known>", "Name or service not known"),
        ("<urlopen error timed out>", "timed out"),
        ("HTTP Error 404: no such thing as /1.png", "HTTP Error 404: Not Found"),
        ("HTTP Error 799: Denied to 10.0.0.1", "HTTP Error 799"),
        ("unknown url type: 'ftq://a b'", "unknown url type: …"),
        (
            "OpenCV(4.1) /io/x.cpp:7: error: (-2:Unspecified error) bad\n in function",
            "(-2:Unspecified error) bad in function",
        ),
        ("", "unknown"),
    ],
)
def test_reasons_are_few_and_readable(said, reason):
    assert img2dataset.explain(said) == reason
