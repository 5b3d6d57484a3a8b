"""Metadata predicates such as ">=512": parsed (never evaluated), then applied to a table or to one sample alike.

Forms, as values of `{column: predicate}`:

    ">=512"  "<=0.5"  ">3"  "<3"        order; the right side is a number, or a text in quotes
    "==x"  "!=x"                        equality; the right side is a number, true, false, null or a text
    "in [a, b]"  "not in [a, b]"        membership
    512, true, "cat", null              a bare value: equality, with the type it has in the YAML
    [">=256", "<=1024"]                 a list: all must hold

A missing key, a null and a NaN pass no predicate but an explicit null: "== null", null, "in [a, null]". Numbers,
texts and booleans are three kinds: values of different kinds are never equal and never in order. A column whose Arrow
field has the metadata {"json": "1"} holds JSON texts: each stands for the value that it spells.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdtrain.errors import SDTrainError

if TYPE_CHECKING:
    import pandas
    import pyarrow

ORDER = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FORMS = '">=512", "<=0.5", ">3", "<3", "==x", "!=x", "in [a, b]", "not in [a, b]", a bare value, or a list of these'
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,"'\[\]]+?)\s*(?:,|$)""")
WORDS = {"true": True, "false": False, "null": None}


class PredicateError(SDTrainError, ValueError):
    """A predicate that cannot be read or applied; the message names the column, the text and the remedy."""


@dataclass(frozen=True)
class Predicate:
    """One condition: `operation` is <, <=, >, >=, in or not in; equality is membership of one."""

    column: str
    operation: str
    operands: tuple[Any, ...]
    text: str

    def passes(self, value: Any) -> bool:
        """The verdict on one value."""
        if _is_null(value):
            return self.operation == "in" and None in self.operands
        if self.operation in ORDER:
            return _compare(ORDER[self.operation], value, self.operands[0])
        return any(_compare(operator.eq, value, o) for o in self.operands) == (self.operation == "in")

    def mask(self, column: _Column) -> np.ndarray:
        """The verdict on each value of a column: bool, one entry a row."""
        if column.kind == "json":
            verdicts = np.array([self.passes(value) for value in column.values], bool)
            return verdicts[column.indices]
        if self.operation in ORDER:
            (operand,) = self.operands
            return column.compare(self.operation, operand) if _kind(operand) == column.kind else column.nowhere()
        found = column.nowhere()
        for operand in self.operands:
            if _kind(operand) == column.kind:
                found |= column.compare("==", operand)
        if self.operation == "not in":
            return ~(found | column.null)
        return found | column.null if None in self.operands else found


@dataclass(frozen=True)
class Predicates:
    """A conjunction of predicates; empty, it lets everything pass."""

    items: tuple[Predicate, ...]

    @property
    def columns(self) -> list[str]:
        """The columns that are read, each once."""
        return list(dict.fromkeys(p.column for p in self.items))

    def matches(self, sample: Mapping[str, Any]) -> bool:
        """Whether one sample's metadata passes; a key that is not there counts as null."""
        return all(p.passes(sample.get(p.column)) for p in self.items)

    def mask(self, table: pandas.DataFrame | pyarrow.Table) -> np.ndarray:
        """Which rows pass: bool, one entry a row. Raises PredicateError for a column the table lacks."""
        return self.judge(table)[0]

    def explain(self) -> list[str]:
        """One line a predicate, in the order in which they apply."""
        return [f"{p.column} {p.text}" for p in self.items]

    def yields(self, table: pandas.DataFrame | pyarrow.Table) -> list[dict[str, Any]]:
        """What each predicate keeps, alone and after the ones before it.

        A row a predicate: column, predicate, null (rows without a value), alone_kept, alone_dropped, kept, dropped.
        Counts of parts of a table add up (`add_yields`).
        """
        return self.judge(table)[1]

    def judge(self, table: pandas.DataFrame | pyarrow.Table) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """`mask` and `yields` of a table, of one look at it."""
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
    """Read `{column: predicate}`. Raises PredicateError naming the column, the text and the forms allowed."""
    items = []
    for column, value in (filters or {}).items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        if several and not value:
            raise _malformed(column, "[]", "the list is empty")
        items += [_parse_one(str(column), v) for v in (value if several else [value])]
    return Predicates(tuple(items))


def add_yields(total: list[dict[str, Any]] | None, part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The yields of two parts of one table together (None: no part yet)."""
    if total is None:
        return part
    texts = ("column", "predicate")
    return [{k: a[k] if k in texts else a[k] + b[k] for k in a} for a, b in zip(total, part, strict=True)]


def held_out_side(values: pyarrow.ChunkedArray | Sequence[Any], fraction: float, seed: int) -> np.ndarray:
    """Which values are held out: those whose sha256 with the seed, as a share of its range, is below the fraction.

    bool, one entry a value; equal values fall on one side, whatever else is there. A null is a value of its own.
    """
    if not fraction:
        return np.zeros(len(values), bool)
    values = values if isinstance(values, Sequence) else values.to_pylist()
    texts = [f"{seed}:{value}" for value in values]
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may hold
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digests = b"".join([hashlib.sha256(data).digest() for data in encoded])
    return np.frombuffer(digests, ">u8")[::4].astype(np.float64) / 2**64 < fraction  # the first 8 bytes of each


# ---------------------------------------------------------------- parsing
def _parse_one(column: str, value: Any) -> Predicate:
    if not isinstance(value, str):
        if not (value is None or isinstance(value, bool | int | float)) or value != value:
            raise _malformed(column, value, "not a number, a text, true, false or null")
        return Predicate(column, "in", (value,), f"== {_show(value)}")
    text = value.strip()
    if match := re.match(r"(not\s+)?in\s*(?=[\[({])", text):
        operands = _parse_list(column, value, text[match.end() :])
        operation = "not in" if match[1] else "in"
        return Predicate(column, operation, operands, f"{operation} [{', '.join(map(_show, operands))}]")
    if match := re.match(r"<=|>=|==|!=|<(?![<>=!])|>(?![<>=!])", text):
        return _parse_comparison(column, value, match[0], text[match.end() :].strip())
    if not text or text[0] in "<>=!~":
        raise _malformed(column, value, "no such comparison")
    return Predicate(column, "in", (value,), f"== {_show(value)}")


def _parse_comparison(column: str, value: str, sign: str, right: str) -> Predicate:
    if not right or right[0] in "<>=!":
        raise _malformed(column, value, f"a value is expected after {sign}")
    operand = _scalar(right)
    if sign in ORDER:
        quoted = isinstance(operand, str) and right[0] in "\"'"
        if _kind(operand) != "number" and not quoted:
            raise _malformed(column, value, f"{sign} needs a number, or a text in quotes")
        return Predicate(column, sign, (operand,), f"{sign} {_show(operand)}")
    return Predicate(column, "in" if sign == "==" else "not in", (operand,), f"{sign} {_show(operand)}")


def _parse_list(column: str, value: str, right: str) -> tuple[Any, ...]:
    right = right.strip()
    if right[0] != "[" or right[-1] != "]":
        raise _malformed(column, value, "a list in square brackets is expected")
    inner, items, at = right[1:-1].strip(), [], 0
    while at < len(inner):
        match = ITEM.match(inner, at)
        if not match:
            raise _malformed(column, value, f"cannot read the list from {inner[at:]!r}")
        items.append(_scalar(match[1]))
        at = match.end()
    if not items:
        raise _malformed(column, value, "the list is empty")
    return tuple(items)


def _scalar(text: str) -> Any:
    """A number, true, false, null, or else the text itself (quotes taken off)."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if NUMBER.fullmatch(text):
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return text


def _show(operand: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[operand] if _kind(operand) in ("boolean", "null") else str(operand)
    )


def _malformed(column: str, value: Any, reason: str) -> PredicateError:
    return PredicateError(f"filters.{column}: cannot read predicate {value!r}: {reason}; the forms are {FORMS}")


# ---------------------------------------------------------------- values
def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float | np.floating) and math.isnan(value))


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "boolean"
    if isinstance(value, int | float | np.integer | np.floating):
        return "number"
    return "text" if isinstance(value, str) else "null" if value is None else "other"


def _compare(operation: Any, value: Any, operand: Any) -> bool:
    """Compare values of one kind; an integer and a float as floats, as a column of either would be."""
    if _kind(value) != _kind(operand):
        return False
    if isinstance(value, float | np.floating) or isinstance(operand, float):
        value, operand = _to_float(value), _to_float(operand)
    return bool(operation(value, operand))


def _to_float(number: Any) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if number > 0 else -math.inf


@dataclass(frozen=True)
class _Column:
    """A column as predicates see it: numbers and booleans in numpy, texts in Arrow, the distinct values of JSON texts.

    `null` is a bool a row; a JSON column has the row's place among its values in `indices`.
    """

    kind: str  # number, boolean, text, null, json
    null: np.ndarray
    values: Any
    indices: np.ndarray | None = None

    def compare(self, sign: str, operand: Any) -> np.ndarray:
        """Where value and operand, of one kind, are in order or equal ("=="); a null never is."""
        if self.kind == "text":
            import pyarrow.compute as pc

            names = {"<": "less", "<=": "less_equal", ">": "greater", ">=": "greater_equal", "==": "equal"}
            if not _is_utf8(operand):
                operation = ORDER.get(sign, operator.eq)
                return np.array([v is not None and operation(v, operand) for v in self.values.to_pylist()], bool)
            found = getattr(pc, names[sign])(self.values, operand).fill_null(False)
            return found.to_numpy(zero_copy_only=False).astype(bool)
        return ORDER.get(sign, operator.eq)(self.values, operand) & ~self.null

    def nowhere(self) -> np.ndarray:
        """False, once a row."""
        return np.zeros(len(self.null), bool)


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode()) or True
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _read_column(table: pandas.DataFrame | pyarrow.Table, name: str) -> _Column:
    import pyarrow

    arrow = hasattr(table, "column_names")
    names = list(table.column_names if arrow else table.columns)
    if name not in names:
        near = difflib.get_close_matches(name, map(str, names), 1)
        hint = f"did you mean {near[0]}?" if near else f"columns here: {', '.join(map(str, names))}"
        raise PredicateError(f"filters.{name}: the table has no column {name}; {hint}")
    if arrow:
        metadata = table.schema.field(name).metadata or {}
        column = table.column(name)
        return _json_column(column, name) if metadata.get(b"json") == b"1" else _typed_column(column, name)
    try:
        return _typed_column(pyarrow.chunked_array(pyarrow.array(table[name], from_pandas=True)), name)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise PredicateError(f"filters.{name}: the column mixes types ({error}); make it one type") from None


def _json_column(column: pyarrow.ChunkedArray, name: str) -> _Column:
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    try:
        values = [None if text is None else json.loads(text) for text in encoded.dictionary.to_pylist()]
    except ValueError as error:
        raise PredicateError(
            f"filters.{name}: the column should hold JSON texts ({error}); index the shard anew"
        ) from None
    indices = encoded.indices.to_numpy()
    null = np.array([_is_null(value) for value in values], bool)[indices]
    return _Column("json", null, values, indices)


def _typed_column(column: pyarrow.ChunkedArray, name: str) -> _Column:
    """Floats widen to 64 bits, as they are in JSON; a NaN counts as null."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, null = column.type, np.asarray(column.is_null(nan_is_null=True).to_numpy(), bool)
    if types.is_null(kind):
        return _Column("null", null, None)
    if types.is_boolean(kind):
        return _Column("boolean", null, np.asarray(column.fill_null(False).to_numpy(), bool))
    if types.is_integer(kind):
        return _Column("number", null, column.fill_null(0).to_numpy())
    if types.is_floating(kind):
        return _Column("number", null, column.to_numpy().astype(np.float64, copy=False))
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return _Column("text", null, column.cast("string") if types.is_string_view(kind) else column)
    raise PredicateError(f"filters.{name}: the column holds {kind}; predicates compare numbers, texts and booleans")
