"""Metadata predicates such as ">=512": parsed (never evaluated), then applied to a table or to one sample alike.

Forms, as values of `{column: predicate}`:

    ">=512"  "<=0.5"  ">3"  "<3"        order; the right side is a number, or a text in quotes
    "==x"  "!=x"                        equality; the right side is a number, true, false, null or a text
    "in [a, b]"  "not in [a, b]"        membership
    512, true, "cat", null              a bare value: equality, with the type it has in the YAML
    [">=256", "<=1024"]                 a list: all must hold

A missing key, a null and a NaN pass no predicate but an explicit null: "== null", null, "in [a, null]". Numbers,
texts and booleans are three kinds: values of different kinds are never equal and never in order.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas
    import pyarrow

ORDER = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
FORMS = '">=512", "<=0.5", ">3", "<3", "==x", "!=x", "in [a, b]", "not in [a, b]", a bare value, or a list of these'
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
ITEM = re.compile(r"""\s*("[^"]*"|'[^']*'|[^,"'\[\]]+?)\s*(?:,|$)""")
WORDS = {"true": True, "false": False, "null": None}


class PredicateError(ValueError):
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

    def mask(self, column: pyarrow.ChunkedArray) -> np.ndarray:
        """The verdict on each value of an Arrow column: bool, one entry a row."""
        values, null, kind = _to_numpy(column, self.column)
        if self.operation in ORDER:
            (operand,) = self.operands
            return ~null & (ORDER[self.operation](values, operand) if _kind(operand) == kind else False)
        found = np.zeros(len(null), bool)
        for operand in self.operands:
            if _kind(operand) == kind:
                found |= np.asarray(values == operand, bool)
        if self.operation == "not in":
            return ~null & ~found
        return np.where(null, None in self.operands, found)


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
        keep = np.ones(len(table), bool)
        for predicate in self.items:
            keep &= predicate.mask(_column(table, predicate.column))
        return keep

    def explain(self) -> list[str]:
        """One line a predicate, in the order in which they apply."""
        return [f"{p.column} {p.text}" for p in self.items]

    def yields(self, table: pandas.DataFrame | pyarrow.Table) -> list[dict[str, Any]]:
        """What each predicate keeps, alone and after the ones before it.

        A row a predicate: column, predicate, null (rows without a value), alone_kept, alone_dropped, kept, dropped.
        Counts of parts of a table add up (`add_yields`).
        """
        rows, keep = [], np.ones(len(table), bool)
        for predicate in self.items:
            column = _column(table, predicate.column)
            alone = predicate.mask(column)
            before, keep = int(keep.sum()), keep & alone
            rows.append(
                {
                    "column": predicate.column,
                    "predicate": predicate.text,
                    "null": int(_to_numpy(column, predicate.column)[1].sum()),
                    "alone_kept": int(alone.sum()),
                    "alone_dropped": int((~alone).sum()),
                    "kept": int(keep.sum()),
                    "dropped": before - int(keep.sum()),
                }
            )
        return rows


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
        value, operand = float(value), float(operand)
    return bool(operation(value, operand))


def _column(table: pandas.DataFrame | pyarrow.Table, name: str) -> pyarrow.ChunkedArray:
    import pyarrow

    arrow = hasattr(table, "column_names")
    names = list(table.column_names if arrow else table.columns)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]}?" if near else f"columns here: {', '.join(map(str, names))}"
        raise PredicateError(f"filters.{name}: the table has no column {name}; {hint}")
    if arrow:
        return table.column(name)
    try:
        return pyarrow.chunked_array(pyarrow.array(table[name], from_pandas=True))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise PredicateError(f"filters.{name}: the column mixes types ({error}); make it one type") from None


def _to_numpy(column: pyarrow.ChunkedArray, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Values, which of them are null, and their kind. Floats widen to 64 bits, as they are in JSON."""
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    null = np.asarray(column.is_null().to_numpy(), bool)
    if types.is_null(kind):
        return np.zeros(len(column)), null, "null"
    if types.is_boolean(kind):
        return np.asarray(column.fill_null(False).to_numpy(), bool), null, "boolean"
    if types.is_integer(kind):
        return np.asarray(column.fill_null(0).to_numpy()), null, "number"
    if types.is_floating(kind):
        values = np.asarray(column.fill_null(math.nan).to_numpy(), np.float64)
        return values, np.isnan(values), "number"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return np.asarray(column.fill_null("").to_numpy(zero_copy_only=False), object), null, "text"
    raise PredicateError(f"filters.{name}: the column holds {kind}; predicates compare numbers, texts and booleans")
