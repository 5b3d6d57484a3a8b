"""Select the rows of a table whose metadata pass the filters, and hold a part out by the hash of a column."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np
import pyarrow as pa
from omegaconf import DictConfig

from sdtrain import config as cf
from sdtrain import schema
from sdtrain.predicates import PredicateError, Predicates, add_yields, parse
from sdtrain.tables import ParquetFile, Table, TableError


class SelectionError(ValueError):
    """A selection that cannot be used: nothing is left on a side that needs rows."""


def main(argv: list[str]) -> None:
    """Run the command."""
    config, own = cf.command_line(
        argv, schema.SelectConfig, __doc__, table=None, train=None, held_out=None, yields=None
    )
    try:
        result = select(config, own["table"], own["train"], own["held_out"])
    except (cf.ConfigError, PredicateError, TableError, SelectionError) as error:
        raise SystemExit(f"error: {error}") from None
    cf.write_json(own["yields"], result)
    print(show(result))


def select(config: DictConfig, path: str, train: str, held_out: str) -> dict[str, Any]:
    """Stream the table at `path` into the selections `train` and `held_out`; returns the yields. Row order is kept."""
    predicates, held = parse(config.filters), config.held_out
    if not 0 <= held.fraction < 1:
        raise cf.ConfigError(f"select.held_out.fraction: {held.fraction} is not in [0, 1)")
    table = Table(path)
    if held.fraction:
        table.require([held.column])
    rows, yields = 0, None
    with ParquetFile(train, table.schema) as train_file, ParquetFile(held_out, table.schema) as held_file:
        for batch in table.batches():
            rows += batch.num_rows
            yields = add_yields(yields, predicates.yields(batch))
            kept = batch.filter(pa.array(predicates.mask(batch)))
            outside = is_held_out(kept, held)
            train_file.write(kept.filter(pa.array(~outside)))
            held_file.write(kept.filter(pa.array(outside)))
        result = {
            "rows": rows,
            "predicates": yields or [],
            "kept": train_file.rows + held_file.rows,
            "train": train_file.rows,
            "held_out": held_file.rows,
            "code": cf.code_digest(),
        }
        check(result, predicates, held)  # raising here leaves neither file behind
    return result


def is_held_out(table: pa.Table, held: DictConfig) -> np.ndarray:
    """Which rows are held out: the sha256 of seed and value, as a share of its range, below the fraction.

    bool, one entry a row; equal values fall on one side, whatever else is in the table.
    """
    if not held.fraction:
        return np.zeros(table.num_rows, bool)
    encoded = table.column(held.column).combine_chunks().dictionary_encode(null_encoding="encode")
    sides = [_share(f"{held.seed}:{value}") < held.fraction for value in encoded.dictionary.to_pylist()]
    return np.array(sides, bool)[encoded.indices.to_numpy()]


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def check(result: dict[str, Any], predicates: Predicates, held: DictConfig) -> None:
    """Raise SelectionError, showing the yields, where a side that needs rows has none."""
    if not result["train"]:
        raise SelectionError(f"the selection is empty; loosen the filter that drops the most\n{show(result)}")
    if held.fraction and not result["held_out"]:
        raise SelectionError(
            f"nothing is held out: too few values of {held.column}; raise select.held_out.fraction or change its seed, "
            f"or set fraction 0\n{show(result)}"
        )


def show(result: dict[str, Any]) -> str:
    """The yields as a text table."""
    keys = ["null", "alone_kept", "alone_dropped", "kept", "dropped"]
    lines = [
        ["predicate", *(key.replace("_", " ") for key in keys)],
        ["(all rows)", "", "", "", f"{result['rows']:,}", ""],
    ]
    lines += [[f"{p['column']} {p['predicate']}", *(f"{p[key]:,}" for key in keys)] for p in result["predicates"]]
    width = max(len(line[0]) for line in lines)
    text = [line[0].ljust(width) + "".join(cell.rjust(15) for cell in line[1:]) for line in lines]
    return "\n".join([*text, f"kept {result['kept']:,}: train {result['train']:,}, held out {result['held_out']:,}"])


if __name__ == "__main__":
    main(sys.argv)
