"""Put one component of configs/components.yaml under resources/components, whole or not at all, with a record of it."""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from sdtrain.config import schema_data
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.errors import SDTrainError
from sdtrain.io.files import write_json

RECORD = ".snapshot.json"  # inside the snapshot: says that it is whole, and of which slice
TRIES = 4  # attempts at a URL, each going on where the last one broke off
CHUNK = 1 << 20  # bytes


class ComponentError(SDTrainError, RuntimeError):
    """A component that cannot be had; the message says what, where and the remedy."""


# ---------------------------------------------------------------- four sources: each fills `folder`, returns a version
def from_package(component: DictConfig, folder: Path, timeout: float) -> str:
    """Copy files of an installed package (`requirement: name==version`), without importing it."""
    name, equals, version = needed(component, "requirement").partition("==")
    if not equals:
        raise ComponentError(f"requirement: {component.requirement!r} is not pinned; write name==version")
    remedy = f"install it: pip install {component.requirement}"
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ComponentError(f"requirement: package {name} is not installed; {remedy}") from None
    if package.version != version:
        raise ComponentError(f"requirement: package {name} is {package.version} here, not {version}; {remedy}")
    root = PurePosixPath(inside(needed(component, "path"), "path"))
    files = [PurePosixPath(str(f)) for f in package.files or []]
    found = {str(f.relative_to(root)): package.locate_file(f) for f in files if root in f.parents}
    if root in files:
        found = {root.name: package.locate_file(root)}
    copy(chosen(found, component.patterns, f"{component.requirement}, {root}"), folder)
    return version


def from_folder(component: DictConfig, folder: Path, timeout: float) -> str:
    """Copy a local folder; the version is a digest of what was in it."""
    found = local_files(component)
    copy(chosen(found, component.patterns, component.path), folder)
    return fingerprint({name: sha256(path) for name, path in found.items()})


def from_url(component: DictConfig, folder: Path, timeout: float) -> str:
    """Download one file and compare its sha256."""
    url, expected = needed(component, "url"), needed(component, "sha256").lower()
    if urlsplit(url).scheme not in ("http", "https"):
        raise ComponentError(f"url: {url} is neither http nor https; a local file is `source: folder`")
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise ComponentError(f"sha256: {expected!r} is not 64 hex digits")
    name = inside(PurePosixPath(unquote(urlsplit(url).path)).name, "url")
    target = folder / inside(name, "url")
    download(url, target, timeout)
    actual = sha256(target)
    if actual != expected:
        raise ComponentError(
            f"{url}: sha256 is {actual}, expected {expected}; the file changed or the transfer was altered: "
            "check the source, then the sha256 in configs/components.yaml"
        )
    return expected


def from_hub(component: DictConfig, folder: Path, timeout: float) -> str:
    """Download a commit of a hub repository (HF_ENDPOINT and HF_TOKEN are respected) and compare it with the commit."""
    repo, revision = needed(component, "repo"), needed(component, "revision")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise ComponentError(
            f"revision: {revision!r} is not a commit of 40 hex digits; branches and tags move, "
            "so a result could not be made again. The repository's history page shows its commits"
        )
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(max(1, round(timeout))))  # read once, by the import
    import httpx2  # what huggingface_hub speaks HTTP with
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout).siblings or []
        root = PurePosixPath(inside(component.path, "path")) if component.path else PurePosixPath()
        paths = [PurePosixPath(inside(f.rfilename, f"{repo}: file name")) for f in files]
        found = {str(p.relative_to(root)): str(p) for p in paths if p.is_relative_to(root)}
        names = chosen(found, component.patterns, f"{repo} at {revision}{f', {root}' if component.path else ''}")
        snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=list(names.values()))
    except OfflineModeIsEnabled:
        raise ComponentError(
            f"{repo}: HF_HUB_OFFLINE is set; unset it, or make the component on a connected machine"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, ValueError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ComponentError(
            f"{repo} at {revision}: {said}. Check repo, revision, the network (HF_ENDPOINT), "
            "and HF_TOKEN where the repository is gated"
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's own notes
    check_commit(folder, {f.rfilename: f for f in files if f.rfilename in names.values()}, repo)
    if component.path:
        lift(folder, root)
    return revision


SOURCES = {"package": from_package, "folder": from_folder, "url": from_url, "hub": from_hub}


# ---------------------------------------------------------------- the snapshot
def make_snapshot(component: DictConfig, name: str, output: Path, timeout: float) -> dict:
    """Make `output` without .json a whole snapshot of the component, or leave it as it was; return its record.

    A snapshot that is whole and of the same slice (the same source files, for a folder) is not fetched again.
    """
    if output.suffix != ".json" or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ComponentError(f"output={output} must end in .json, and name={name} be letters, digits and . _ + -")
    if component.source not in SOURCES:
        raise ComponentError(
            f"source: {component.source}: this command does not train; the rule train_autoencoder does"
        )
    folder = output.with_suffix("")
    mark = fingerprint({k: v for k, v in OmegaConf.to_container(component).items() if k != "train"})
    if component.source == "folder":
        mark = fingerprint(mark, {file: sha256(path) for file, path in local_files(component).items()})
    record = whole(folder, mark)
    if record is not None:
        return record
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        version = SOURCES[component.source](component, aside, timeout)
        apply_settings(aside, OmegaConf.to_container(component.settings))
        record = {
            "name": name,
            "source": component.source,
            "from": component.requirement or component.repo or component.url or component.path,
            "version": version,
            "files": describe(aside),
            "fingerprint": mark,
            "code": code_digest(),
        }
        write_json(aside / RECORD, record)
        replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return record


def whole(folder: Path, mark: str) -> dict | None:
    """The record of a snapshot that has this fingerprint and all of its files unchanged, else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if record["fingerprint"] == mark and record["files"] == describe(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(folder: Path) -> dict[str, dict]:
    """Relative path -> size in bytes and sha256, for every file of a snapshot."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def apply_settings(folder: Path, settings: dict) -> None:
    """Set keys in the JSON files of the copy."""
    for name, values in settings.items():
        path = folder / inside(name, "settings")
        if not path.is_file():
            raise ComponentError(f"settings: {name}: the component has no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**content, **values})
        except (ValueError, TypeError) as error:
            raise ComponentError(
                f"settings: {name}: a JSON object and a mapping of its keys are expected ({error})"
            ) from None


def replace(new: Path, folder: Path) -> None:
    """Put the folder `new` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------- small parts
def needed(component: DictConfig, key: str) -> str:
    """The value of a key that this source cannot do without."""
    if not component[key]:
        raise ComponentError(f"{key}: needed where source is {component.source}")
    return component[key]


def inside(name: str, key: str) -> str:
    """A relative path that stays inside the folder it is joined to."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ComponentError(f"{key}: {name!r} must be a relative path without '..'")
    return name


def chosen(found: dict, patterns: list[str], where: str) -> dict:
    """The entries of {relative path: …} that any pattern matches (all without patterns); each pattern must match."""
    if not found:
        raise ComponentError(f"path: {where}: no files there")
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise ComponentError(
                f"patterns: {pattern!r} matches no file of {where}; files: {', '.join(list(found)[:12])}"
            )
    return {k: v for k, v in found.items() if not patterns or any(fnmatch.fnmatchcase(k, p) for p in patterns)}


def local_files(component: DictConfig) -> dict[str, Path]:
    """Relative path -> file, for the folder that `path` names; links to files count as their content."""
    root = Path(needed(component, "path"))
    if not root.is_dir():
        raise ComponentError(f"path: {root}: no such folder (seen from {Path.cwd()})")
    return {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}


def copy(files: dict[str, Path], folder: Path) -> None:
    """Copy {relative path: file} into a folder: contents only, never links."""
    for name, source in files.items():
        target = folder / inside(name, "path")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def lift(folder: Path, root: PurePosixPath) -> None:
    """Make the subfolder `root` of `folder` its whole content."""
    aside = folder.with_name(f"{folder.name}.root")
    os.replace(folder / root, aside)
    shutil.rmtree(folder)
    os.replace(aside, folder)


def check_commit(folder: Path, entries: dict, repo: str) -> None:
    """Compare downloaded files with the commit: git's blob id, or the sha256 of a large file."""
    for name, entry in entries.items():
        path = folder / name
        if entry.lfs is not None:
            expected, actual = entry.lfs.sha256, sha256(path)
        else:
            content = path.read_bytes()
            expected, actual = entry.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if actual != expected:
            raise ComponentError(
                f"{repo}: {name}: digest is {actual}, the commit has {expected}; the transfer was altered: try again"
            )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, target: Path, timeout: float) -> None:
    """Stream a URL to a file; a broken transfer goes on where it stopped (HTTP Range), `TRIES` times in all."""
    for attempt in range(TRIES):
        try:
            return transfer(url, target, timeout)
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == TRIES - 1:
                raise ComponentError(f"{url}: HTTP {error.code} {error.reason}; check the url") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == TRIES - 1:
                said = getattr(error, "reason", None) or error
                said = f"no answer within {timeout:g} s" if isinstance(said, TimeoutError) else said
                raise ComponentError(f"{url}: {said} ({TRIES} tries); check the network, then run again") from None
        time.sleep(0.2 * 4**attempt)  # 0.2, 0.8, 3.2 s


def transfer(url: str, target: Path, timeout: float) -> None:
    """One attempt at a URL, from the end of what `target` already holds; raises OSError where it breaks off."""
    have = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != 206:  # the whole file, asked for or not
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name, mininterval=2)
        with bar, open(target, "ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and target.stat().st_size != total:
        raise OSError(f"broke off after {target.stat().st_size} of {total} bytes")


def main() -> None:
    component, own = command_line(sys.argv, schema_data.ComponentConfig, __doc__, name=None, output=None, timeout="30")
    try:
        record = make_snapshot(component, own["name"], Path(own["output"]), float(own["timeout"]))
        write_json(own["output"], record)
    except (ComponentError, OSError, ValueError) as error:
        raise SystemExit(f"error: component {own['name']}: {error}") from None
    size = sum(f["bytes"] for f in record["files"].values())
    print(
        f"{own['name']}: {len(record['files'])} files, {size / 1e6:.1f} MB, from {record['from']} ({record['version']})"
    )


if __name__ == "__main__":
    main()
