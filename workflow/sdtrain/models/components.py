"""Download of model components: from a package, a folder, a URL or the hub into a verified snapshot."""

from __future__ import annotations

import fnmatch
import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from sdtrain.config.fingerprint import code_digest, fingerprint
from sdtrain.errors import SDTrainError
from sdtrain.io.files import atomic_folder, sha256_file, write_json

RECORD = ".snapshot.json"  # inside the snapshot: its record, written last
TRIES = 4  # attempts at a URL, each resumes where the previous one stopped
CHUNK = 1 << 20  # bytes downloaded at once


# ---------------------------------------------------------------- sources: each fills `folder` and returns a version
def from_package(component: DictConfig, folder: Path, timeout: float) -> str:
    """Copy files of an installed package (`requirement: name==version`) without importing it."""
    name, equals, version = needed(component, "requirement").partition("==")
    if not equals:
        raise SDTrainError(f"requirement: {component.requirement!r} is not pinned; write name==version")
    remedy = f"install it: pip install {component.requirement}"
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise SDTrainError(f"requirement: package {name} is not installed; {remedy}") from None
    if package.version != version:
        raise SDTrainError(f"requirement: package {name} is {package.version} here, not {version}; {remedy}")
    root = PurePosixPath(inside(needed(component, "path"), "path"))
    files = [PurePosixPath(str(f)) for f in package.files or []]
    found = {str(f.relative_to(root)): package.locate_file(f) for f in files if root in f.parents}
    if root in files:
        found = {root.name: package.locate_file(root)}
    copy(chosen(found, component.patterns, f"{component.requirement}, {root}"), folder)
    return version


def from_folder(component: DictConfig, folder: Path, timeout: float) -> str:
    """Copy a local folder. The version is a digest of its files."""
    found = local_files(component)
    copy(chosen(found, component.patterns, component.path), folder)
    return fingerprint({name: sha256_file(path) for name, path in found.items()})


def from_url(component: DictConfig, folder: Path, timeout: float) -> str:
    """Download one file and verify its SHA-256."""
    url, expected = needed(component, "url"), needed(component, "sha256").lower()
    if not re.match("https?://[^/]+/", url, re.IGNORECASE):
        raise SDTrainError(f"url: {url} must be the http or https address of a file; a local file is `source: folder`")
    if not re.fullmatch("[0-9a-f]{64}", expected):
        raise SDTrainError(f"sha256: {expected!r} is not 64 hex digits")
    target = folder / inside(PurePosixPath(unquote(urlsplit(url).path)).name, "url")
    download(url, target, timeout)
    actual = sha256_file(target)
    if actual != expected:
        raise SDTrainError(
            f"{url}: sha256 is {actual}, expected {expected}; the file changed or the transfer was altered: "
            "check the source, then the sha256 in configs/components.yaml"
        )
    return expected


def from_hub(component: DictConfig, folder: Path, timeout: float) -> str:
    """Download a commit of a hub repository and verify each file. HF_ENDPOINT and HF_TOKEN are respected."""
    repo, revision = needed(component, "repo"), needed(component, "revision")
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise SDTrainError(
            f"revision: {revision!r} is not a commit of 40 hex digits; branches and tags move, "
            "so results would not be reproducible. The repository's history page shows its commits"
        )
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(max(1, round(timeout))))  # the import below reads it once
    import httpx2  # the HTTP client of huggingface_hub
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
        raise SDTrainError(
            f"{repo}: HF_HUB_OFFLINE is set; unset it, or download the component on a machine with internet access"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.HTTPError, ValueError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise SDTrainError(
            f"{repo} at {revision}: {said}. Check repo, revision, the network (HF_ENDPOINT), "
            "and HF_TOKEN where the repository is gated"
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # metadata of the hub client
    check_commit(folder, {f.rfilename: f for f in files if f.rfilename in names.values()}, repo)
    if component.path:
        lift(folder, root)
    return revision


SOURCES = {"package": from_package, "folder": from_folder, "url": from_url, "hub": from_hub}


# ---------------------------------------------------------------- the snapshot
def make_snapshot(component: DictConfig, name: str, output: Path, timeout: float) -> dict:
    """Write the snapshot of a component atomically to `output` without `.json`, and return its record.

    A complete snapshot of the same slice (and, for a folder, of the same source files) is not downloaded again.
    """
    if output.suffix != ".json" or not re.fullmatch(r"\w[\w.+-]*", name):
        raise SDTrainError(f"output={output} must end in .json, name={name} must be letters, digits and . _ + -")
    if component.source not in SOURCES:
        raise SDTrainError(f"source: {component.source}: this command does not train; the rule train_autoencoder does")
    folder = output.with_suffix("")
    keys: Any = OmegaConf.to_container(component)
    mark = fingerprint({k: v for k, v in keys.items() if k != "train"})
    if component.source == "folder":
        mark = fingerprint(mark, {file: sha256_file(path) for file, path in local_files(component).items()})
    record = complete_record(folder, mark)
    if record is not None:
        return record
    with atomic_folder(folder) as temporary:
        version = SOURCES[component.source](component, temporary, timeout)
        apply_settings(temporary, keys["settings"])
        record = {
            "name": name,
            "source": component.source,
            "from": component.requirement or component.repo or component.url or component.path,
            "version": version,
            "files": describe(temporary),
            "fingerprint": mark,
            "code": code_digest(),
        }
        write_json(temporary / RECORD, record)
    return record


def complete_record(folder: Path, mark: str) -> dict | None:
    """Return the record of a snapshot with this fingerprint and all of its files unchanged, else None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if record["fingerprint"] == mark and record["files"] == describe(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(folder: Path) -> dict[str, dict]:
    """Return the size in bytes and the SHA-256 of every file of a snapshot, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}


def apply_settings(folder: Path, settings: dict) -> None:
    """Set keys in JSON files of the snapshot."""
    for name, values in settings.items():
        path = folder / inside(name, "settings")
        if not path.is_file():
            raise SDTrainError(f"settings: {name}: the component has no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, {**content, **values})
        except (ValueError, TypeError) as error:
            raise SDTrainError(
                f"settings: {name}: a JSON object and a mapping of its keys are expected ({error})"
            ) from None


# ---------------------------------------------------------------- paths and files
def needed(component: DictConfig, key: str) -> str:
    """Return the value of a key that the source requires. Raise SDTrainError if it is empty."""
    if not component[key]:
        raise SDTrainError(f"{key}: must be set if source is {component.source}")
    return component[key]


def inside(name: str, key: str) -> str:
    """Return a relative path. Raise SDTrainError if it could leave the folder that it is joined to."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise SDTrainError(f"{key}: {name!r} must be a relative path without '..'")
    return name


def chosen(found: dict, patterns: list[str], where: str) -> dict:
    """Return the entries that match any pattern, or all without patterns. Raise SDTrainError if one matches none."""
    if not found:
        raise SDTrainError(f"path: {where}: no files there")
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise SDTrainError(
                f"patterns: {pattern!r} matches no file of {where}; files: {', '.join(list(found)[:12])}"
            )
    return {k: v for k, v in found.items() if not patterns or any(fnmatch.fnmatchcase(k, p) for p in patterns)}


def local_files(component: DictConfig) -> dict[str, Path]:
    """Return the files of the folder that `path` names, by relative path; links count as their content."""
    root = Path(needed(component, "path"))
    if not root.is_dir():
        raise SDTrainError(f"path: {root}: no such folder (relative to {Path.cwd()})")
    return {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}


def copy(files: dict[str, Path], folder: Path) -> None:
    """Copy files, given by relative path, into a folder; links are copied as their content."""
    for name, source in files.items():
        target = folder / inside(name, "path")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def lift(folder: Path, root: PurePosixPath) -> None:
    """Replace the content of `folder` by that of its subfolder `root`."""
    content = folder.with_name(f"{folder.name}.root")
    os.replace(folder / root, content)
    shutil.rmtree(folder)
    os.replace(content, folder)


def check_commit(folder: Path, entries: dict, repo: str) -> None:
    """Verify downloaded files against the commit: git's blob id, or the SHA-256 of a large file."""
    for name, entry in entries.items():
        path = folder / name
        if entry.lfs is not None:
            expected, actual = entry.lfs.sha256, sha256_file(path)
        else:
            content = path.read_bytes()
            expected, actual = entry.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if actual != expected:
            raise SDTrainError(
                f"{repo}: {name}: digest is {actual}, the commit has {expected}; the transfer was altered: try again"
            )


def download(url: str, target: Path, timeout: float) -> None:
    """Download a URL to a file. An interrupted transfer resumes (HTTP Range); `TRIES` attempts in all."""
    for attempt in range(TRIES):
        try:
            return transfer(url, target, timeout)
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == TRIES - 1:
                raise SDTrainError(f"{url}: HTTP {error.code} {error.reason}; check the url") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == TRIES - 1:
                said = getattr(error, "reason", None) or error
                said = f"no answer within {timeout:g} s" if isinstance(said, TimeoutError) else said
                raise SDTrainError(f"{url}: {said} ({TRIES} tries); check the network, then run again") from None
        time.sleep(0.2 * 4**attempt)  # 0.2, 0.8, 3.2 s


def transfer(url: str, target: Path, timeout: float) -> None:
    """Download a URL once, from the end of what `target` already holds. Raise OSError if the transfer is incomplete."""
    have = target.stat().st_size if target.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != 206:  # the server sends the whole file
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=target.name, mininterval=2)
        with bar, open(target, "ab" if have else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and target.stat().st_size != total:
        raise OSError(f"the transfer ended after {target.stat().st_size} of {total} bytes")
