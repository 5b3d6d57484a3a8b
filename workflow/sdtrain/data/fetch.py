"""Fetch a table of image URLs and captions into one parquet file. Each form of table is one function in `FORMS`."""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig

from sdtrain.config.fingerprint import fingerprint
from sdtrain.data.formats import TableError
from sdtrain.data.tables import Table, write_parquet
from sdtrain.errors import ConfigError, SDTrainError
from sdtrain.io import storage
from sdtrain.io.files import atomic_path, sha256_file

TIMEOUT = 30  # seconds without an answer
SCHEME = "^[A-Za-z][A-Za-z0-9+.-]+:"  # how a URL begins
Form = Callable[[DictConfig, Path], int]  # write the table of a configuration to a parquet file; return its rows


def fetch_files(config: DictConfig, output: Path) -> int:
    """Read tables on disk or on S3, or behind http(s) URLs, of which copies are kept beside `output`."""
    if not config.path:
        raise ConfigError("table.path: missing; with kind: files it is a file, a folder, a glob or a URL")
    addresses: list[str] = [config.path]
    if config.sha256 or config.path.startswith(("http://", "https://")):
        addresses = [download(address, output.parent / "tables") for address in storage.expand(config.path)]
    if config.sha256:
        if len(addresses) > 1:
            raise ConfigError(f"table.sha256: must belong to a single file, but {config.path} names {len(addresses)}")
        check_sha256(Path(addresses[0]), config.sha256)
    return write_table(Table(addresses if len(addresses) > 1 else addresses[0], config.columns), output)


def fetch_hub(config: DictConfig, output: Path) -> int:
    """Read the tables of a Hugging Face dataset repository at a pinned commit; copies are kept beside `output`."""
    import httpx2  # the HTTP client of huggingface_hub
    from huggingface_hub import HfApi, snapshot_download

    if not config.repo or not re.fullmatch("[0-9a-f]{40}", config.revision or ""):
        raise ConfigError("table.repo, table.revision: with kind: hub, owner/name and a commit of 40 hex digits")
    pinned = {"repo_id": config.repo, "repo_type": "dataset", "revision": config.revision}
    patterns = list(config.patterns)
    folder = output.parent / "tables" / fingerprint(pinned, patterns)
    try:
        HfApi().repo_info(**pinned, timeout=TIMEOUT)  # snapshot_download alone accepts a partial folder when offline
        snapshot_download(**pinned, allow_patterns=patterns, local_dir=folder, etag_timeout=TIMEOUT)
    except (httpx2.HTTPError, OSError) as error:
        raise SDTrainError(
            f"{config.repo}@{config.revision}: cannot fetch the dataset ({str(error).splitlines()[0]}); check network "
            "and names (a gated dataset needs its terms accepted and HF_TOKEN set), then run the same command again"
        ) from None
    return write_table(Table(folder, config.columns), output)


FORMS: dict[str, Form] = {"files": fetch_files, "hub": fetch_hub}


def write_table(table: Table, output: Path) -> int:
    """Stream a table into one parquet file, with paths of images as URLs; return the number of rows.

    Raise TableError if the table has no url or caption column, or no rows.
    """
    table.require(["url", "caption"])
    url = table.schema.field("url")
    if not (pa.types.is_string(url.type) or pa.types.is_large_string(url.type)):
        raise TableError(f"{table.path}: the column url holds {url.type}, expected texts; correct table.columns")
    with write_parquet(output, table.schema) as rows:
        for source, batch in table.batches(label="fetch"):
            rows.write(to_urls(batch, source))
        if rows.rows == 0:
            raise TableError(f"{table.path}: the table has no rows")
    return rows.rows


def to_urls(table: pa.Table, source: str) -> pa.Table:
    """Return the table with a file:// URL for each plain path in its url column.

    Relative paths start at the folder of the table.
    """
    urls = table.column("url").combine_chunks()
    plain = pc.invert(pc.match_substring_regex(urls, SCHEME)).fill_null(False)
    if not storage.is_local(source) or not pc.any(plain).as_py():
        return table
    folder = os.path.dirname(os.path.abspath(source))
    paths = (os.path.normpath(os.path.join(folder, path)) for path in urls.filter(plain).to_pylist())
    found = pa.array([f"file://{urllib.parse.quote(path)}" for path in paths], urls.type)
    place = table.schema.get_field_index("url")
    return table.set_column(place, table.schema.field(place), pc.replace_with_mask(urls, plain, found))


def download(address: str, folder: Path) -> str:
    """Return a local path of an address: itself if local, else its copy in `folder`, which is made once."""
    if storage.is_local(address):
        return address
    target = folder / fingerprint(address) / Path(urllib.parse.unquote(address.partition("?")[0])).name
    if not target.exists():
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            storage.copy(address, file)
    return str(target)


def check_sha256(path: Path, expected: str) -> None:
    """Raise SDTrainError unless the file has this SHA-256."""
    if not path.is_file():
        raise SDTrainError(f"{path}: table.sha256 must belong to a single file, but this is not a file")
    found = sha256_file(path)
    if found != expected:
        raise SDTrainError(
            f"{path}: sha256 is {found}, expected {expected}; delete the file to fetch it again, or correct sha256"
        )
