"""Tests of predicates: their forms, equal answers for columns and single values, and errors with a remedy."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdtrain.data.predicates import PredicateError, add_yields, held_out_side, parse


def matches(predicates, value) -> bool:
    """Return whether one value passes all predicates."""
    return all(predicate.passes(value) for predicate in predicates.items)


@pytest.mark.parametrize(
    "predicate, passing, failing",
    [
        (">=512", [512, 512.0, 9e9], [511, -1, "512", True]),
        ("<=0.5", [0.5, 0, -1.5], [0.51, "0", False]),
        (">3", [4, 3.1], [3, 2]),
        ("<3", [2, -1e3], [3, 4]),
        ("< -1.5e2", [-151], [-150]),
        (">= '2020-01-01'", ["2021-05-05"], ["2019-12-31", 2021]),
        ("==x", ["x"], ["y", "", 1]),
        ("== 5", [5, 5.0], ["5", 4]),
        ("== '5'", ["5"], [5]),
        ("==true", [True], [False, 1, "true"]),
        ("!=x", ["y", 3, True], ["x"]),
        ("in [a, b]", ["a", "b"], ["c", "a, b"]),
        ("in [1, 'two, 3', true]", [1, "two, 3", True], [2, "two", False]),
        ("not in [a, 5]", ["b", 6, "5"], ["a", 5]),
        ("cat", ["cat"], ["dog"]),
        ("in the garden", ["in the garden"], ["in"]),
        ("5", ["5"], [5]),
        (5, [5, 5.0], ["5", True]),
        (True, [True], [1, False]),
        ([">=2", "<4", "!=3"], [2, 2.5], [3, 4, 1]),
    ],
)
def test_forms(predicate, passing, failing):
    predicates = parse({"x": predicate})
    assert [v for v in passing if not matches(predicates, v)] == []
    assert [v for v in failing if matches(predicates, v)] == []


@pytest.mark.parametrize(
    "predicate", [">=0", "<0", "==0", "!=0", "in [a]", "not in [a]", "a", "!= null", "not in [null]"]
)
def test_null_and_nan_never_pass(predicate):
    predicates = parse({"x": predicate})
    assert not matches(predicates, None) and not matches(predicates, math.nan)
    assert not predicates.mask(pa.table({"x": [None, math.nan]})).any()
    assert not predicates.mask(pa.table({"x": pa.array([None], pa.string())})).any()


@pytest.mark.parametrize("predicate", ["== null", None, "in [a, null]"])
def test_an_explicit_null_passes_null(predicate):
    predicates = parse({"x": predicate})
    assert matches(predicates, None) and matches(predicates, math.nan)
    assert not matches(predicates, "b")
    assert predicates.mask(pa.table({"x": [None, "b", None]})).tolist() == [True, False, True]


BAD = [
    ">=512px",
    ">=",
    "=5",
    "=>5",
    "<>5",
    "~x",
    ">= >5",
    "in (a, b)",
    "in [a, b",
    "in []",
    "in [,]",
    "not in [a]]",
    "",
]


@pytest.mark.parametrize("predicate", [*BAD, "< true", ">= null", [], {"a": 1}, math.nan, [[1]], 1j])
def test_malformed_names_column_text_and_forms(predicate):
    with pytest.raises(PredicateError) as error:
        parse({"pwatermark": predicate})
    assert "filters.pwatermark" in str(error.value)
    assert "not in [a, b]" in str(error.value)
    if isinstance(predicate, str):
        assert repr(predicate) in str(error.value)


@given(st.text() | st.lists(st.text()) | st.none() | st.integers() | st.floats() | st.booleans())
def test_any_text_is_parsed_or_refused_and_never_executed(predicate):
    try:
        predicates = parse({"x": predicate})
    except PredicateError:
        return
    assert len(predicates.explain()) >= 1
    matches(predicates, predicate)


VALUES = {
    "number": st.none() | st.integers(-4, 4) | st.sampled_from([0.1, 0.5, -1.5, math.nan]),
    "text": st.none() | st.sampled_from(["a", "b", "é", "", "0"]),
    "boolean": st.none() | st.booleans(),
}
OPERANDS = st.sampled_from(["0", "2", "-1.5", "0.1", "a", "'b'", "é", "true", "false", "null", "'0'"])
SIGNS = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}
READ = {"0": 0, "2": 2, "-1.5": -1.5, "0.1": 0.1, "'b'": "b", "true": True, "false": False, "null": None, "'0'": "0"}


def kind(value):
    return "text" if isinstance(value, str) else "boolean" if isinstance(value, bool) else "number"


def equal(value, operand):
    return operand is not None and kind(value) == kind(operand) and value == operand


@st.composite
def predicate_and_oracle(draw):
    """Draw the text of a predicate and the function in plain Python that it must equal."""
    if draw(st.booleans()):
        sign, text = (
            draw(st.sampled_from(sorted(SIGNS))),
            draw(st.sampled_from(["0", "2", "-1.5", "0.1", "'b'", "'0'"])),
        )
        compare, operand = SIGNS[sign], READ[text]
        return f"{sign}{text}", lambda v: not null(v) and kind(v) == kind(operand) and compare(v, operand)
    texts = draw(st.lists(OPERANDS, min_size=1, max_size=3))
    operands = [READ.get(t, t) for t in texts]
    within = draw(st.booleans())
    found = lambda v: any(equal(v, o) for o in operands)  # noqa: E731
    oracle = (
        (lambda v: None in operands if null(v) else found(v)) if within else (lambda v: not null(v) and not found(v))
    )
    if len(texts) == 1 and draw(st.booleans()):
        return f"{'==' if within else '!='} {texts[0]}", oracle
    return f"{'in' if within else 'not in'} [{', '.join(texts)}]", oracle


def null(value):
    return value is None or value != value


def as_json_column(values, name="x"):
    """Return a table with a column of JSON texts, as in an index of shards; None stands for a missing key."""
    texts = [None if v is None and i % 2 else json.dumps(v) for i, v in enumerate(values)]
    return pa.table(
        [pa.array(texts, pa.string())], schema=pa.schema([pa.field(name, pa.string(), metadata={"json": "1"})])
    )


@given(st.data(), st.lists(predicate_and_oracle(), min_size=1, max_size=3), st.sampled_from(sorted(VALUES)))
def test_columns_and_values_agree_with_plain_python(data, several, name):
    values = data.draw(st.lists(VALUES[name], max_size=8))
    expected = [all(bool(oracle(v)) for _, oracle in several) for v in values]
    predicates = parse({"x": [text for text, _ in several]})
    assert [matches(predicates, v) for v in values] == expected
    types = {"number": pa.float64(), "text": pa.string(), "boolean": pa.bool_()}
    column = pa.array(values, types[name])
    tables = [pa.table({"x": column}), pa.table({"x": column.dictionary_encode()})]
    tables += [pa.table({"x": pa.chunked_array([column, column]).slice(len(values))}), as_json_column(values)]
    if name == "text":
        tables += [pa.table({"x": column.cast(kind)}) for kind in (pa.large_string(), pa.string_view())]
    if name == "number" and all(v is None or v == v and v % 1 == 0 for v in values):
        tables += [pa.table({"x": column.cast(kind)}) for kind in (pa.int8(), pa.int64(), pa.float32(), pa.float16())]
    for table in tables:
        mask, yields = predicates.judge(table)
        assert mask.dtype == bool and mask.tolist() == predicates.mask(table).tolist() == expected
        assert [y["alone_kept"] for y in yields] == [sum(bool(oracle(v)) for v in values) for _, oracle in several]
        assert all(y["null"] == sum(map(null, values)) for y in yields) and yields[-1]["kept"] == sum(expected)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([10**400, -(10**400), "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=3,
)


@given(st.data(), st.lists(predicate_and_oracle(), min_size=1, max_size=2))
def test_a_column_of_json_texts_gives_the_answers_of_its_values(data, several):
    values = data.draw(st.lists(ANYTHING | st.sampled_from([0, 2, -1.5, 0.1, "a", "b", True]), max_size=6))
    predicates = parse({"x": [text for text, _ in several]})
    read = [json.loads(json.dumps(value)) for value in values]
    assert predicates.mask(as_json_column(values)).tolist() == [matches(predicates, value) for value in read]


def test_json_texts_of_nested_and_huge_values():
    values = [[1], {"a": 1}, 10**400, -(10**400), None, 0.1, "a"]
    table = as_json_column(values)
    assert parse({"x": ">0.5"}).mask(table).tolist() == [False, False, True, False, False, False, False]
    assert parse({"x": "!=a"}).mask(table).tolist() == [True, True, True, True, False, True, False]
    assert parse({"x": "==null"}).judge(table)[1][0]["null"] == 1
    plain = pa.table({"x": table["x"].cast(pa.string())})  # without the mark in the field's metadata they are texts
    assert parse({"x": "==a"}).mask(plain).tolist() == [False] * 7
    broken = pa.table([pa.array(["{"])], schema=table.schema)
    with pytest.raises(PredicateError, match="filters.x: the column must hold JSON texts"):
        parse({"x": "==a"}).mask(broken)


def test_text_that_a_table_cannot_contain_equals_no_value():
    table = pa.table({"x": ["a", None]})
    assert parse({"x": "==\ud800"}).mask(table).tolist() == [False, False]
    assert parse({"x": "!=\ud800"}).mask(table).tolist() == [True, False]
    assert parse({"x": "<'\ud800'"}).mask(table).tolist() == [True, False]


@pytest.mark.parametrize("operand", [2**63, 2**64, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("sign", ["<", ">=", "==", "!="])
def test_operands_beyond_a_column_s_integers(sign, operand):
    for kind in (pa.int8(), pa.int64(), pa.uint64(), pa.float64()):
        predicates = parse({"x": f"{sign}{operand}"})
        expected = [matches(predicates, v) for v in (1, 100)]
        assert predicates.mask(pa.table({"x": pa.array([1, 100], kind)})).tolist() == expected


@given(
    st.lists(st.none() | st.text() | st.just("\ud800") | st.integers() | st.floats() | st.booleans()),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_held_out_split_is_decided_by_a_sha256(values, fraction, seed):
    def share(value):
        data = f"{seed}:{value}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64

    assert held_out_side(values, fraction, seed).tolist() == [share(v) < fraction for v in values]
    assert not held_out_side(values, 0.0, seed).any()


def test_integers_are_exact_and_32_bit_floats_are_what_json_holds():
    big = 2**60
    assert parse({"x": f"=={big}"}).mask(pa.table({"x": [big, big + 1]})).tolist() == [True, False]
    value = np.float32(0.1)  # 0.10000000149 in a sample's JSON
    predicates = parse({"x": "<=0.1"})
    (passed,) = predicates.mask(pa.table({"x": pa.array([value], pa.float32())}))
    assert passed == matches(predicates, float(value))


def test_several_columns_and_an_omegaconf_mapping():
    config = OmegaConf.create({"w": [">=256", "<=512"], "group": "not in [flags, component]"})
    predicates = parse(config)
    table = pa.table({"w": [100, 256, 300, 600], "group": ["food", "food", "flags", "food"]})
    assert predicates.mask(table).tolist() == [False, True, False, False]
    assert predicates.columns == ["w", "group"]
    assert predicates.explain() == ["w >= 256", "w <= 512", "group not in [flags, component]"]
    assert parse(None).mask(table).all() and not parse({}).items


def test_yields_count_alone_and_in_sequence_and_add_up():
    predicates = parse({"w": ">=2", "group": "!=flags"})
    table = pa.table({"w": [1, 2, 3, None], "group": ["food", "flags", "food", None]})
    _, rows = predicates.judge(table)
    keys = ("null", "alone_kept", "alone_dropped", "kept", "dropped")
    assert [tuple(row[k] for k in keys) for row in rows] == [(1, 2, 2, 2, 2), (1, 2, 2, 1, 1)]
    assert rows[0]["column"] == "w" and rows[0]["predicate"] == ">= 2"
    (_, first), (_, second) = (predicates.judge(part) for part in (table.slice(0, 2), table.slice(2)))
    assert add_yields(add_yields(None, first), second) == rows


def test_a_missing_column_names_the_nearest_and_a_foreign_type_is_refused():
    predicates = parse({"original_widht": ">=2"})
    with pytest.raises(PredicateError, match=r"no column original_widht; did you mean original_width\?"):
        predicates.mask(pa.table({"original_width": [1]}))
    with pytest.raises(PredicateError, match="holds list"):
        parse({"x": "==1"}).mask(pa.table({"x": [[1]]}))
