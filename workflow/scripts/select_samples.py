"""Select the rows of a table: those that pass the filters, each value once, so many at random, a part held out."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import DictConfig
from tqdm import tqdm

from sdtrain.config import schema
from sdtrain.config.cli import command_line
from sdtrain.config.fingerprint import code_digest
from sdtrain.data.predicates import PredicateError, Predicates, add_yields, held_out_side, parse
from sdtrain.data.tables import ParquetFile, Table, TableError, show
from sdtrain.errors import ConfigError, SDTrainError
from sdtrain.io.files import write_json

BUCKETS = 16  # parts in which equal hashes are looked for, one after the other: sorting all at once takes memory
MAX_BYTES = 1e12  # of one file: what says more is no size


class SelectionError(SDTrainError, ValueError):
    """A selection that cannot be used: nothing is left on a side that needs rows."""


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = command_line(argv, schema.SelectConfig, __doc__, table=None, train=None, held_out=None, yields=None)
    for stale in Path(own["yields"]).parent.glob(f".{Path(own['yields']).name}.*.tmp"):  # of a process that was killed
        stale.unlink()
    try:
        result = select(config, own["table"], own["train"], own["held_out"])
    except (ConfigError, PredicateError, TableError, SelectionError) as error:
        raise SystemExit(f"error: {error}") from None
    write_json(own["yields"], result)
    print(show(result))


def select(config: DictConfig, path: str, train: str, held_out: str) -> dict[str, Any]:
    """Stream the table at `path` into the selections `train` and `held_out`; returns the yields. Row order is kept.

    Two passes: the first reads the columns that decide, and leaves a bit a row; the second writes the rows chosen.
    """
    table, predicates = Table(path), parse(config.filters)
    check_config(config, table, predicates)
    passing, without_url, yields, hashes = judge(table, predicates, config.deduplicate)
    chosen, duplicates = choose(passing, hashes, config)
    with ParquetFile(train, table.schema) as train_file, ParquetFile(held_out, table.schema) as held_file:
        sizes = write(table, chosen, config, train_file, held_file)
        result = {
            "rows": len(passing),
            "predicates": yields,
            "after_filters": passing.true_count + without_url,
            "without_url": without_url,
            "duplicates": {"column": config.deduplicate, "dropped": duplicates} if config.deduplicate else None,
            "rows_limit": config.rows,
            "kept": train_file.rows + held_file.rows,
            "train": train_file.rows,
            "held_out": held_file.rows,
            **sizes,
            "code": code_digest(),
        }
        check(result, config.held_out)  # raising here leaves neither file behind
    return result


def check_config(config: DictConfig, table: Table, predicates: Predicates) -> None:
    """Raise ConfigError, PredicateError or TableError for what the table cannot give, before it is read."""
    if not 0 <= config.held_out.fraction < 1:
        raise ConfigError(f"select.held_out.fraction: {config.held_out.fraction} is not in [0, 1)")
    if config.rows is not None and config.rows < 1:
        raise ConfigError(f"select.rows: {config.rows} is not a number of rows above 0; leave it out to keep all")
    predicates.mask(table.schema.empty_table())
    table.require(["url"])
    table.require([config.held_out.column] if config.held_out.fraction else [])
    table.require([config.deduplicate] if config.deduplicate else [])


# ---------------------------------------------------------------- first pass: which rows
def judge(table: Table, predicates: Predicates, unique: str | None) -> tuple[pa.BooleanArray, int, list, np.ndarray]:
    """Which rows pass the predicates and have a url; how many of those that pass have none; the yields; and for each
    row that is left the hash of its value of `unique`.
    """
    unsure = [] if table.is_full("url") else ["url"]
    columns = list(dict.fromkeys([*predicates.columns, *([unique] if unique else []), *unsure]))
    masks, hashes, yields, passed = [], [np.zeros(0, np.uint64)], predicates.yields(table.schema.empty_table()), 0
    without_url = 0
    for batch in progress(table, columns or ["url"], "filter"):
        mask, counts = predicates.judge(batch)
        yields = add_yields(yields, counts)
        there = batch.column("url").is_valid().to_numpy() if unsure else np.ones(len(batch), bool)
        without_url += int(np.count_nonzero(mask & ~there))
        masks.append(pa.array(mask & there))
        if unique:
            hashes.append(hash_values(batch.column(unique).filter(masks[-1]), passed))
            passed += len(hashes[-1])
    return pa.concat_arrays(masks or [pa.array([], pa.bool_())]), without_url, yields, np.concatenate(hashes)


def hash_values(values: pa.ChunkedArray, first: int) -> np.ndarray:
    """64 bits a value, uint64; equal ones for equal values. A null equals nothing: its place is hashed."""
    texts = (f"\0{place}" if v is None else str(v) for place, v in enumerate(values.to_pylist(), first))
    digests = b"".join([hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, np.uint64)


def choose(passing: pa.BooleanArray, hashes: np.ndarray, config: DictConfig) -> tuple[pa.BooleanArray, int]:
    """Of the rows that pass, the first of each value, and of these `rows` at random; and the number of duplicates.

    bool, one entry a row of the table.
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
    """Which hashes occur for the first time: bool, one entry a hash."""
    first, bucket = np.zeros(len(hashes), bool), hashes.view(np.uint8)[::8] % BUCKETS
    for number in range(BUCKETS):
        places = np.flatnonzero(bucket == number)
        first[places[np.unique(hashes[places], return_index=True)[1]]] = True
    return first


# ---------------------------------------------------------------- second pass: write them
def write(
    table: Table, chosen: pa.BooleanArray, config: DictConfig, train: ParquetFile, held_out: ParquetFile
) -> dict[str, Any]:
    """Write the rows chosen to their side; returns the bytes expected of each, and what they are estimated from."""
    size_columns, row, sizes = find_size_columns(config.size, table.schema), 0, np.zeros((2, 2), np.int64)
    for batch in progress(table, table.schema.names, "write"):
        inside, outside = split(batch, chosen.slice(row, batch.num_rows), config.held_out)
        row += batch.num_rows
        for side, (file, mask) in enumerate(((train, inside), (held_out, outside))):
            rows = batch.filter(pa.array(mask))
            file.write(rows)
            sizes[side] += measure(rows, size_columns)
    told = {side: expected_bytes(*sizes[i], size_columns, config.size) for i, side in enumerate(("train", "held_out"))}
    return {"bytes": told, "size_from": size_source(size_columns, config.size)}


def split(batch: pa.Table, chosen: pa.BooleanArray, held: DictConfig) -> tuple[np.ndarray, np.ndarray]:
    """Which rows are chosen to train on, and which are chosen and held out: bool, one entry a row each."""
    inside, outside = chosen.to_numpy(zero_copy_only=False), np.zeros(len(chosen), bool)
    if held.fraction:
        outside[inside] = held_out_side(batch.column(held.column).filter(chosen), held.fraction, held.seed)
    return inside & ~outside, outside


def find_size_columns(size: DictConfig, schema: pa.Schema) -> list[str]:
    """The columns of numbers that tell a file's size: its bytes, else width and height, else none."""
    numbers = {f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)}
    candidates = ([size.bytes], [size.width, size.height])
    return next((names for names in candidates if numbers.issuperset(names)), [])


def measure(table: pa.Table, columns: list[str]) -> np.ndarray:
    """The bytes or pixels that the rows tell together, and how many rows tell none: int64 (2,)."""
    if not columns:
        return np.array([0, table.num_rows])
    values = np.stack([table.column(name).to_numpy().astype(np.float64) for name in columns])
    product = values.prod(axis=0)
    known = (values > 0).all(axis=0) & (product < MAX_BYTES)  # a NaN is neither
    return np.array([product[known].astype(np.int64).sum(), np.count_nonzero(~known)])


def expected_bytes(told: int, untold: int, columns: list[str], size: DictConfig) -> int:
    """Bytes of the files of all rows, from what `measure` counted."""
    return round(int(told) * (size.bytes_per_pixel if len(columns) == 2 else 1) + int(untold) * size.bytes_per_image)


def size_source(columns: list[str], size: DictConfig) -> str:
    """What the sizes are estimated from, in words."""
    if len(columns) == 2:
        return f"{columns[0]} x {columns[1]} x {size.bytes_per_pixel:g} bytes a pixel"
    return columns[0] if columns else f"{size.bytes_per_image:,} bytes an image"


# ---------------------------------------------------------------- both
def progress(table: Table, columns: list[str], label: str) -> Iterator[pa.Table]:
    """The batches, with a progress bar where they take long."""
    with tqdm(total=table.count(), unit="row", unit_scale=True, desc=label, delay=5, mininterval=1) as bar:
        for batch in table.batches(columns):
            yield batch
            bar.update(batch.num_rows)


def check(result: dict[str, Any], held: DictConfig) -> None:
    """Raise SelectionError, showing the yields, where a side that needs rows has none."""
    if not result["train"]:
        raise SelectionError(f"the selection is empty; loosen the filter that drops the most\n{show(result)}")
    if held.fraction and not result["held_out"]:
        raise SelectionError(
            f"nothing is held out: too few values of {held.column}; raise select.held_out.fraction or change its seed, "
            f"or set fraction 0\n{show(result)}"
        )


if __name__ == "__main__":
    main(sys.argv)
