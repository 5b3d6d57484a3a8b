"""Predicates: the forms of the seed, one verdict for tables and samples, and errors that say what to write instead."""

from __future__ import annotations

import math

import numpy as np
import pandas
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sdtrain.predicates import PredicateError, add_yields, parse


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
    assert [v for v in passing if not predicates.matches({"x": v})] == []
    assert [v for v in failing if predicates.matches({"x": v})] == []


@pytest.mark.parametrize(
    "predicate", [">=0", "<0", "==0", "!=0", "in [a]", "not in [a]", "a", "!= null", "not in [null]"]
)
def test_null_nan_and_missing_never_pass(predicate):
    predicates = parse({"x": predicate})
    assert not any(predicates.matches(s) for s in ({}, {"x": None}, {"x": math.nan}, {"y": 1}))
    assert not predicates.mask(pandas.DataFrame({"x": [None, math.nan]})).any()
    assert not predicates.mask(pa.table({"x": pa.array([None], pa.string())})).any()


@pytest.mark.parametrize("predicate", ["== null", None, "in [a, null]"])
def test_an_explicit_null_passes_null(predicate):
    predicates = parse({"x": predicate})
    assert all(predicates.matches(s) for s in ({}, {"x": None}, {"x": math.nan}))
    assert not predicates.matches({"x": "b"})
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
def test_any_input_is_read_or_refused_never_evaluated(predicate):
    try:
        predicates = parse({"x": predicate})
    except PredicateError:
        return
    assert len(predicates.explain()) >= 1
    predicates.matches({"x": predicate})


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
    """A predicate's text and what plain Python says about a value."""
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


@given(st.data(), predicate_and_oracle(), st.sampled_from(sorted(VALUES)))
def test_table_and_sample_agree_with_plain_python(data, predicate, name):
    text, oracle = predicate
    values = data.draw(st.lists(VALUES[name], max_size=8))
    expected = [bool(oracle(v)) for v in values]
    predicates = parse({"x": text})
    assert [predicates.matches({"x": v}) for v in values] == expected
    types = {"number": pa.float64(), "text": pa.string(), "boolean": pa.bool_()}
    column = pa.array(values, types[name])
    tables = [pa.table({"x": column}), pa.table({"x": column.dictionary_encode()}), pa.table({"x": column}).to_pandas()]
    if name == "text":
        tables.append(pa.table({"x": column.cast(pa.large_string())}))
    for table in tables:
        mask = predicates.mask(table)
        assert mask.dtype == bool and mask.tolist() == expected


def test_integers_are_exact_and_32_bit_floats_are_what_json_holds():
    big = 2**60
    assert parse({"x": f"=={big}"}).mask(pa.table({"x": [big, big + 1]})).tolist() == [True, False]
    value = np.float32(0.1)  # 0.10000000149 in a sample's JSON
    predicates = parse({"x": "<=0.1"})
    assert predicates.mask(pa.table({"x": pa.array([value], pa.float32())}))[0] == predicates.matches(
        {"x": float(value)}
    )


def test_several_columns_and_an_omegaconf_mapping():
    config = OmegaConf.create({"w": [">=256", "<=512"], "group": "not in [flags, component]"})
    predicates = parse(config)
    table = pandas.DataFrame({"w": [100, 256, 300, 600], "group": ["food", "food", "flags", "food"]})
    assert predicates.mask(table).tolist() == [False, True, False, False]
    assert predicates.columns == ["w", "group"]
    assert predicates.explain() == ["w >= 256", "w <= 512", "group not in [flags, component]"]
    assert parse(None).mask(table).all() and parse({}).matches({})


def test_yields_count_alone_and_in_sequence_and_add_up():
    predicates = parse({"w": ">=2", "group": "!=flags"})
    table = pa.table({"w": [1, 2, 3, None], "group": ["food", "flags", "food", None]})
    rows = predicates.yields(table)
    keys = ("null", "alone_kept", "alone_dropped", "kept", "dropped")
    assert [tuple(row[k] for k in keys) for row in rows] == [(1, 2, 2, 2, 2), (1, 2, 2, 1, 1)]
    assert rows[0]["column"] == "w" and rows[0]["predicate"] == ">= 2"
    parts = add_yields(add_yields(None, predicates.yields(table.slice(0, 2))), predicates.yields(table.slice(2)))
    assert parts == rows


def test_a_missing_column_names_the_nearest_and_a_foreign_type_is_refused():
    predicates = parse({"original_widht": ">=2"})
    for table in (pa.table({"original_width": [1]}), pandas.DataFrame({"original_width": [1]})):
        with pytest.raises(PredicateError, match=r"no column original_widht; did you mean original_width\?"):
            predicates.mask(table)
    with pytest.raises(PredicateError, match="holds list"):
        parse({"x": "==1"}).mask(pa.table({"x": [[1]]}))
    with pytest.raises(PredicateError, match="mixes types"):
        parse({"x": "==1"}).mask(pandas.DataFrame({"x": pandas.Series([1, "a"], dtype=object)}))
