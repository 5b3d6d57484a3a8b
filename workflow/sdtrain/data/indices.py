"""The metadata of a shard's samples, in columns, and the index file beside a shard that holds them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.tars import ShardIndex
from sdtrain.errors import DataError
from sdtrain.io.files import atomic_path

INDEX = ".index.parquet"  # {number}.parquet is img2dataset's
INDEX_VERSION = 1


# ---------------------------------------------------------------- metadata: the samples' JSON in columns
def read_metadata(index: ShardIndex, path: str | Path, columns: Iterable[str] | None = None) -> ShardIndex:
    """Fill `metadata` and `readable` from the JSON fields in the local tar at `path`; return the index.

    `columns` names the wanted keys, by default all; one that no sample has gives a column of nulls. A key that is not
    valid text (half of a surrogate pair) is left out, as no filter can name it.
    """
    documents: list[dict | None] = [None] * len(index)
    with open(path, "rb", buffering=0) as file:
        for row, (offset, size) in enumerate(index.fields.get("json", np.empty((0, 2), int)).tolist()):
            if offset >= 0:
                documents[row] = _parse_json(os.pread(file.fileno(), size, offset))
    found = [document for document in documents if document is not None]
    if columns is None:
        columns = filter(_is_text, dict.fromkeys(itertools.chain.from_iterable(found)))
    arrays = [_to_column(name, [None if d is None else d.get(name) for d in documents]) for name in columns]
    index.metadata = pa.Table.from_arrays([a for _, a in arrays], schema=pa.schema([f for f, _ in arrays]))
    index.readable = np.array([document is not None for document in documents], bool)
    return index


def from_json_column(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """Return the values of a metadata column as they are in the samples' JSON."""
    values = column.to_pylist()
    if (field.metadata or {}).get(b"json") != b"1":
        return values
    return [None if value is None else json.loads(value) for value in values]


def _parse_json(data: bytes) -> dict | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _to_column(name: str, values: list[Any]) -> tuple[pa.Field, pa.Array]:
    """Return a typed column if all values are of one type and fit it exactly, else a column of their JSON texts."""
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    kinds = set(map(type, values)) - {type(None)}
    with contextlib.suppress(KeyError, OverflowError, UnicodeEncodeError, pa.ArrowException):
        if len(kinds) < 2:
            kind = types[kinds.pop()] if kinds else pa.null()
            return pa.field(name, kind), pa.array(values, kind)
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.field(name, pa.string(), metadata={"json": "1"}), pa.array(texts, pa.string())


# ---------------------------------------------------------------- the index file
def write_index(path: str | Path, index: ShardIndex, facts: dict[str, Any] | None = None) -> None:
    """Write an index with its metadata as Parquet, atomically; the same index gives the same bytes.

    Columns: key, begin, end, readable; offset:EXTENSION and size:EXTENSION; json:KEY of the samples' JSON.
    """
    assert index.metadata is not None
    keys = pa.array(index.keys.tolist(), pa.string())
    table = pa.table({"key": keys, "begin": index.begin, "end": index.end, "readable": index.readable})
    for extension, spans in index.fields.items():
        for name, values in zip(("offset", "size"), spans.T, strict=True):
            table = table.append_column(f"{name}:{extension}", pa.array(np.ascontiguousarray(values)))
    for field, column in zip(index.metadata.schema, index.metadata.columns, strict=True):
        table = table.append_column(field.with_name(f"json:{field.name}"), column)
    about = {"version": INDEX_VERSION, "samples": len(index)} | (facts or {})
    table = table.replace_schema_metadata({"sdtrain": json.dumps(about, sort_keys=True)})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_index(path: str | Path, shard: str, columns: Iterable[str] | None = None) -> ShardIndex:
    """Return the index at `path` of the tar at `shard`, with all of its metadata or only the keys in `columns`.

    A key that no sample has gives a column of nulls. Raise DataError for an index that is missing or damaged.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        own = [name for name in names if not name.startswith("json:")]
        wanted = [name[5:] for name in names if name.startswith("json:")] if columns is None else list(columns)
        present = [f"json:{key}" for key in wanted if f"json:{key}" in names]
        table = file.read([*own, *present], use_threads=False).combine_chunks()
        keys = np.array(table["key"].to_pylist(), np.dtypes.StringDType())
        begin, end, readable = (table[name].to_numpy() for name in ("begin", "end", "readable"))
        extensions = [name[7:] for name in own if name.startswith("offset:")]
        fields = {e: np.stack([table[f"{part}:{e}"].to_numpy() for part in ("offset", "size")], 1) for e in extensions}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not a readable index of {shard} ({error}); delete it and index the shards again"
        ) from None
    metadata = table.select(present).rename_columns([name[5:] for name in present])
    for key in wanted:
        if key not in metadata.column_names:
            metadata = metadata.append_column(key, pa.nulls(len(table)))
    return ShardIndex(shard, keys, begin, end, fields, metadata, readable)


def read_facts(path: str | Path | None) -> dict[str, Any] | None:
    """Return what an index says of its shard (version, samples, bytes, sha256, source); None if it is not readable."""
    try:
        return json.loads(pq.read_schema(path).metadata[b"sdtrain"])
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None
