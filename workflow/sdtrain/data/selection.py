"""Select the rows of a table: filters, then the first of equal values, a random subset, and the held-out split."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import DictConfig

from sdtrain.config.fingerprint import code_digest
from sdtrain.data.predicates import Predicates, add_yields, held_out_side, parse
from sdtrain.data.tables import RowWriter, Table, write_parquet
from sdtrain.data.yields import show_selection
from sdtrain.errors import ConfigError

BUCKETS = 16  # groups of hashes that are searched for equal ones in turn: sorting all at once takes memory
MAX_BYTES = 1e12  # of one file; a larger value is not a size


def select(config: DictConfig, path: str | Path, train: str | Path, held_out: str | Path) -> dict[str, Any]:
    """Stream the table at `path` into the selections `train` and `held_out`; return the yields. Row order is kept.

    The first pass reads the columns that decide, and keeps one bit a row. The second pass writes the chosen rows.
    """
    table, predicates = Table(path), parse(config.filters)
    check_config(config, table, predicates)
    passing, without_url, yields, hashes = judge(table, predicates, config.deduplicate)
    chosen, duplicates = choose(passing, hashes, config)
    with write_parquet(train, table.schema) as train_rows, write_parquet(held_out, table.schema) as held_rows:
        sizes = write_rows(table, chosen, config, train_rows, held_rows)
        result = {
            "rows": len(passing),
            "predicates": yields,
            "after_filters": passing.true_count + without_url,
            "without_url": without_url,
            "duplicates": {"column": config.deduplicate, "dropped": duplicates} if config.deduplicate else None,
            "rows_limit": config.rows,
            "kept": train_rows.rows + held_rows.rows,
            "train": train_rows.rows,
            "held_out": held_rows.rows,
            **sizes,
            "code": code_digest(),
        }
        check_result(result, config.held_out)  # an error here leaves neither file behind
    return result


def check_config(config: DictConfig, table: Table, predicates: Predicates) -> None:
    """Raise ConfigError, PredicateError or TableError, before the table is read, for what it cannot give."""
    predicates.judge(table.schema.empty_table())
    table.require(["url"])
    table.require([config.held_out.column] if config.held_out.fraction else [])
    table.require([config.deduplicate] if config.deduplicate else [])


# ---------------------------------------------------------------- first pass: which rows
def judge(table: Table, predicates: Predicates, unique: str | None) -> tuple[pa.BooleanArray, int, list, np.ndarray]:
    """Return which rows pass the predicates and have a url, how many pass without a url, and the yields.

    The last value holds, for each row that passes and has a url, the hash of its value of `unique`.
    """
    unsure = [] if table.is_full("url") else ["url"]
    columns = list(dict.fromkeys([*predicates.columns, *([unique] if unique else []), *unsure]))
    _, yields = predicates.judge(table.schema.empty_table())
    masks, hashes, passed, without_url = [], [np.zeros(0, np.uint64)], 0, 0
    for _, batch in table.batches(columns or ["url"], "filter"):
        mask, counts = predicates.judge(batch)
        yields = add_yields(yields, counts)
        has_url = batch.column("url").is_valid().to_numpy() if unsure else np.ones(len(batch), bool)
        without_url += int(np.count_nonzero(mask & ~has_url))
        masks.append(pa.array(mask & has_url))
        if unique:
            hashes.append(hash_values(batch.column(unique).filter(masks[-1]), passed))
            passed += len(hashes[-1])
    return pa.concat_arrays(masks or [pa.array([], pa.bool_())]), without_url, yields, np.concatenate(hashes)


def hash_values(values: pa.ChunkedArray, first: int) -> np.ndarray:
    """Return 64 bits a value, uint64, the same for equal values. A null equals nothing: its position is hashed."""
    texts = (f"\0{place}" if v is None else str(v) for place, v in enumerate(values.to_pylist(), first))
    digests = b"".join([hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, np.uint64)


def choose(passing: pa.BooleanArray, hashes: np.ndarray, config: DictConfig) -> tuple[pa.BooleanArray, int]:
    """Of the rows that pass, choose the first of each value, and of these `config.rows` at random.

    Return a bool for each row of the table, and the number of duplicates.
    """
    chosen = first_of_equal(hashes) if config.deduplicate else np.ones(passing.true_count, bool)
    left = int(np.count_nonzero(chosen))
    duplicates = len(chosen) - left
    if config.rows is not None and config.rows < left:
        dropped = np.random.default_rng(config.seed).choice(left, left - config.rows, replace=False, shuffle=False)
        chosen[np.flatnonzero(chosen)[dropped]] = False
    if chosen.all():
        return passing, duplicates
    keep = passing.to_numpy(zero_copy_only=False).copy()
    keep[keep] = chosen
    return pa.array(keep), duplicates


def first_of_equal(hashes: np.ndarray) -> np.ndarray:
    """Return for each hash whether it occurs for the first time."""
    first, bucket = np.zeros(len(hashes), bool), hashes.view(np.uint8)[::8] % BUCKETS
    for number in range(BUCKETS):
        places = np.flatnonzero(bucket == number)
        first[places[np.unique(hashes[places], return_index=True)[1]]] = True
    return first


# ---------------------------------------------------------------- second pass: write them
def write_rows(
    table: Table, chosen: pa.BooleanArray, config: DictConfig, train: RowWriter, held_out: RowWriter
) -> dict[str, Any]:
    """Write the chosen rows to their split; return the expected bytes of each, and what the estimate is based on."""
    columns, row, sizes = find_size_columns(config.size, table.schema), 0, np.zeros((2, 2), np.int64)
    for _, batch in table.batches(label="write"):
        inside, outside = split(batch, chosen.slice(row, batch.num_rows), config.held_out)
        row += batch.num_rows
        for side, (writer, mask) in enumerate(((train, inside), (held_out, outside))):
            rows = batch.filter(pa.array(mask))
            writer.write(rows)
            sizes[side] += measure(rows, columns)
    return estimate_bytes(sizes, columns, config.size)


def split(batch: pa.Table, chosen: pa.BooleanArray, held: DictConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return, as a bool for each row, which rows are chosen for training and which are chosen and held out."""
    inside, outside = chosen.to_numpy(zero_copy_only=False), np.zeros(len(chosen), bool)
    if held.fraction:
        outside[inside] = held_out_side(batch.column(held.column).filter(chosen), held.fraction, held.seed)
    return inside & ~outside, outside


def find_size_columns(size: DictConfig, schema: pa.Schema) -> list[str]:
    """Return the numeric columns that tell the size of a file: its bytes, else width and height, else none."""
    numbers = {f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}
    candidates = ([size.bytes], [size.width, size.height])
    return next((names for names in candidates if numbers.issuperset(names)), [])


def measure(table: pa.Table, columns: list[str]) -> np.ndarray:
    """Return the sum of the bytes or pixels of the rows, and the number of rows that tell none, as int64 (2,)."""
    if not columns:
        return np.array([0, table.num_rows])
    values = np.stack([table.column(name).to_numpy().astype(np.float64) for name in columns])
    product = values.prod(axis=0)
    known = (values > 0).all(axis=0) & (product < MAX_BYTES)  # false for NaN
    return np.array([product[known].astype(np.int64).sum(), np.count_nonzero(~known)])


def estimate_bytes(sizes: np.ndarray, columns: list[str], size: DictConfig) -> dict[str, Any]:
    """Return the expected bytes of all files of each split, from its counts of `measure`, and in words their source."""
    if len(columns) == 2:
        bytes_each = size.bytes_per_pixel
        source = f"{columns[0]} x {columns[1]} x {bytes_each:g} bytes a pixel"
    else:
        bytes_each = 1
        source = columns[0] if columns else f"{size.bytes_per_image:,} bytes an image"
    train, held_out = (round(known * bytes_each + unknown * size.bytes_per_image) for known, unknown in sizes.tolist())
    return {"bytes": {"train": train, "held_out": held_out}, "size_from": source}


def check_result(result: dict[str, Any], held: DictConfig) -> None:
    """Raise ConfigError, with the yields, if a split that needs rows has none."""
    if not result["train"]:
        raise ConfigError(f"the selection is empty; loosen the filter that drops most\n{show_selection(result)}")
    if held.fraction and not result["held_out"]:
        raise ConfigError(
            f"nothing is held out: too few values of {held.column}; raise select.held_out.fraction, change its seed, "
            f"or set fraction 0\n{show_selection(result)}"
        )
