"""Metadata predicates such as ">=512": parsed, never evaluated as code, then applied to the columns of a table.

Forms, as values of `{column: predicate}`:

    ">=512"  "<=0.5"  ">3"  "<3"        order; the right side is a number, or a text in quotes
    "==x"  "!=x"                        equality; the right side is a number, true, false, null or a text
    "in [a, b]"  "not in [a, b]"        membership
    512, true, "cat", null              a bare value: equality, with the type it has in the YAML
    [">=256", "<=1024"]                 a list: all must hold

Null and NaN pass no predicate except an explicit null: "== null", null, "in [a, null]". Numbers, texts and booleans are
three kinds: values of different kinds are never equal and never ordered. A column whose Arrow field has the metadata
{"json": "1"} contains JSON texts: each is compared as the value that it encodes.

NumPy and Arrow are imported by the functions that need them: planning a workflow parses predicates, but reads no table.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdtrain.errors import SDTrainError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

ORDER = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FORMS = '">=512", "<=0.5", ">3", "<3", "==x", "!=x", "in [a, b]", "not in [a, b]", a bare value, or a list of these'
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,"'\[\]]+?)\s*(?:,|$)""")
WORDS = {"true": True, "false": False, "null": None}


class PredicateError(SDTrainError, ValueError):
    """A predicate that cannot be parsed or applied. The message names the column, the text and the remedy."""


@dataclass(frozen=True)
class Predicate:
    """One condition. `operation` is <, <=, >, >=, in or not in; equality is membership in a list of one."""

    column: str
    operation: str
    operands: tuple[Any, ...]
    text: str

    def passes(self, value: Any) -> bool:
        """Return whether one value passes."""
        if _is_null(value):
            return self.operation == "in" and None in self.operands
        if self.operation in ORDER:
            return _compare(ORDER[self.operation], value, self.operands[0])
        return any(_compare(operator.eq, value, o) for o in self.operands) == (self.operation == "in")

    def mask(self, column: _Column) -> np.ndarray:
        """Return a bool for each value of a column: whether it passes."""
        import numpy as np

        if column.indices is not None:
            return np.array([self.passes(value) for value in column.values], bool)[column.indices]
        compare = ORDER.get(self.operation, operator.eq)
        found = np.zeros(len(column.null), bool)
        for operand in self.operands:
            if _kind(operand) == "number":
                found |= compare(column.values, operand)
        if self.operation == "not in":
            found = ~found
        return (found & ~column.null) | (column.null & self.passes(None))


@dataclass(frozen=True)
class Predicates:
    """A conjunction of predicates; an empty one passes everything."""

    items: tuple[Predicate, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys(p.column for p in self.items))

    def explain(self) -> list[str]:
        """Return one line for each predicate, in the order in which they apply."""
        return [f"{p.column} {p.text}" for p in self.items]

    def mask(self, table: pa.Table) -> np.ndarray:
        """Return a bool for each row: whether it passes. Raise PredicateError if the table lacks a column."""
        return self.judge(table)[0]

    def judge(self, table: pa.Table) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return `mask` and the yield of each predicate, alone and after the ones before it.

        A yield has the keys column, predicate, null (rows without a value), alone_kept, alone_dropped, kept, dropped.
        The counts of parts of a table add up (`add_yields`).
        """
        import numpy as np

        columns = {name: _read_column(table, name) for name in self.columns}
        rows, keep, left = [], np.ones(len(table), bool), len(table)
        for predicate in self.items:
            alone, before = predicate.mask(columns[predicate.column]), left
            keep &= alone
            left, passing = int(np.count_nonzero(keep)), int(np.count_nonzero(alone))
            rows.append(
                {
                    "column": predicate.column,
                    "predicate": predicate.text,
                    "null": int(np.count_nonzero(columns[predicate.column].null)),
                    "alone_kept": passing,
                    "alone_dropped": len(table) - passing,
                    "kept": left,
                    "dropped": before - left,
                }
            )
        return keep, rows


def parse(filters: Mapping[str, Any] | None) -> Predicates:
    """Parse `{column: predicate}`. Raise PredicateError, with the column, the text and the forms allowed."""
    items = []
    for column, value in (filters or {}).items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and not value:
            raise _malformed(column, "[]", "the list is empty")
        items += [_parse_one(str(column), v) for v in (value if several else [value])]
    return Predicates(tuple(items))


def add_yields(total: list[dict[str, Any]] | None, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the yields of two parts of one table together; None is no part yet."""
    if total is None:
        return part
    texts = ("column", "predicate")
    return [{k: a[k] if k in texts else a[k] + b[k] for k in a} for a, b in zip(total, part, strict=True)]


def held_out_side(values: pa.ChunkedArray | Sequence[Any], fraction: float, seed: int) -> np.ndarray:
    """Return a bool for each value: whether it is held out.

    A value is held out if the SHA-256 of seed and value, as a share of its range, is below `fraction`. So equal values
    are in the same split, independently of all other values. Null is a value like any other.
    """
    import numpy as np

    if not fraction:
        return np.zeros(len(values), bool)
    values = values if isinstance(values, Sequence) else values.to_pylist()
    encoded = (f"{seed}:{value}".encode("utf-8", "surrogatepass") for value in values)  # JSON may hold half a pair
    digests = b"".join([hashlib.sha256(data).digest() for data in encoded])
    return np.frombuffer(digests, ">u8")[::4].astype(np.float64) / 2**64 < fraction  # the first 8 bytes of each


# ---------------------------------------------------------------- parsing
def _parse_one(column: str, value: Any) -> Predicate:
    if not isinstance(value, str):
        if not (value is None or isinstance(value, bool | int | float)) or value != value:
            raise _malformed(column, value, "expected a number, a text, true, false or null")
        return Predicate(column, "in", (value,), f"== {_show(value)}")
    text = value.strip()
    if match := re.match(r"(not\s+)?in\s*(?=[\[({])", text):
        operands = _parse_list(column, value, text[match.end() :])
        operation = "not in" if match[1] else "in"
        return Predicate(column, operation, operands, f"{operation} [{', '.join(map(_show, operands))}]")
    if match := re.match(r"<=|>=|==|!=|<(?![<>=!])|>(?![<>=!])", text):
        return _parse_comparison(column, value, match[0], text[match.end() :].strip())
    if not text or text[0] in "<>=!~":
        raise _malformed(column, value, "unknown comparison")
    return Predicate(column, "in", (value,), f"== {_show(value)}")


def _parse_comparison(column: str, value: str, sign: str, right: str) -> Predicate:
    if not right or right[0] in "<>=!":
        raise _malformed(column, value, f"expected a value after {sign}")
    operand = _scalar(right)
    if sign in ORDER:
        quoted = isinstance(operand, str) and right[0] in "\"'"
        if _kind(operand) != "number" and not quoted:
            raise _malformed(column, value, f"expected a number, or a text in quotes, after {sign}")
        return Predicate(column, sign, (operand,), f"{sign} {_show(operand)}")
    return Predicate(column, "in" if sign == "==" else "not in", (operand,), f"{sign} {_show(operand)}")


def _parse_list(column: str, value: str, right: str) -> tuple[Any, ...]:
    right = right.strip()
    if right[0] != "[" or right[-1] != "]":
        raise _malformed(column, value, "expected a list in square brackets")
    inner, items, at = right[1:-1].strip(), [], 0
    while at < len(inner):
        match = ITEM.match(inner, at)
        if not match:
            raise _malformed(column, value, f"cannot parse the list from {inner[at:]!r}")
        items.append(_scalar(match[1]))
        at = match.end()
    if not items:
        raise _malformed(column, value, "the list is empty")
    return tuple(items)


def _scalar(text: str) -> Any:
    """Return a number, true, false, null, or else the text itself without quotes."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return text


def _show(operand: Any) -> str:
    return json.dumps(operand) if operand is None or isinstance(operand, bool) else str(operand)


def _malformed(column: str, value: Any, reason: str) -> PredicateError:
    return PredicateError(f"filters.{column}: cannot parse the predicate {value!r}: {reason}; the forms are {FORMS}")


# ---------------------------------------------------------------- values
def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "null" if value is None else "other"


def _compare(operation: Any, value: Any, operand: Any) -> bool:
    """Compare values of one kind. An integer and a float are compared as floats, as in a column of either."""
    if _kind(value) != _kind(operand):
        return False
    if isinstance(value, float) or isinstance(operand, float):
        value, operand = _to_float(value), _to_float(operand)
    return bool(operation(value, operand))


def _to_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if number > 0 else -math.inf


# ---------------------------------------------------------------- columns
@dataclass(frozen=True)
class _Column:
    """The values of a column as predicates read them, and a bool for each row: whether its value is null.

    Numbers are a NumPy array, one a row. Other values are a list of the distinct ones, with the place of each row's
    value in `indices`.
    """

    null: np.ndarray
    values: Any
    indices: np.ndarray | None = None


def _read_column(table: pa.Table, name: str) -> _Column:
    """Read a column. Floats become 64 bits wide, as in JSON; a NaN counts as null."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import types

    if name not in table.column_names:
        raise PredicateError(f"filters.{name}: the table has no column {name}{did_you_mean(name, table.column_names)}")
    column, kind = table.column(name), table.schema.field(name).type
    if (table.schema.field(name).metadata or {}).get(b"json") == b"1":
        return _read_distinct(column, name, json.loads)
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if types.is_null(kind):
        column, kind = column.cast("int64"), pa.int64()
    if types.is_integer(kind):
        return _Column(column.is_null().to_numpy(), column.fill_null(0).to_numpy())
    if types.is_floating(kind):
        return _Column(column.is_null(nan_is_null=True).to_numpy(), column.to_numpy().astype(np.float64, copy=False))
    if types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind):
        return _read_distinct(column, name)
    if types.is_string_view(kind):
        return _read_distinct(column.cast("string"), name)
    raise PredicateError(f"filters.{name}: the column holds {kind}; predicates compare numbers, texts and booleans")


def _read_distinct(column: pa.ChunkedArray, name: str, decode: Callable[[Any], Any] = lambda value: value) -> _Column:
    import numpy as np

    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    try:
        values = [None if value is None else decode(value) for value in encoded.dictionary.to_pylist()]
    except ValueError as error:
        raise PredicateError(
            f"filters.{name}: the column must hold JSON texts ({error}); index the shard again"
        ) from None
    indices = encoded.indices.to_numpy()
    return _Column(np.array([_is_null(value) for value in values], bool)[indices], values, indices)
