"""docs/configuration.md names every key once, with its default, its choices and tests that exist; its YAML loads."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import MISSING
from samples import ROOT

from sdtrain.config import schema, schema_data
from sdtrain.config.keys import all_keys
from sdtrain.config.load import MODEL_PARTS, load_config, require
from sdtrain.models.parts import load_part
from sdtrain.training import objective

PAGE = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
DATA = Path(__file__).resolve().parents[2] / "templates"
TEST = re.compile(r"`((?:unit|end_to_end|workflow)/[\w/]+\.py)::(\w+)`")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])
HEAD = ["key", "from", "default", "meaning", "shown by"]
WORDS_OF_THE_SEED = {  # keys of its text, and of lines that its template has commented out
    *("wandb.entity", "model.ema.path", "dataset.params.idx_to_prompt"),
    *(f"model.{part}.{key}" for part in MODEL_PARTS for key in ("pretrained", "target", "params")),
}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, but for rules."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if not set("".join(cells)) <= set("-: ")]


ROWS = [row for row in rows(SECTIONS["Keys"]) if row != HEAD]
BY_KEY = {row[0].strip("`"): row for row in ROWS}


def keys(kind: type, prefix: str = "") -> dict[str, typing.Any]:
    """Every key of a dataclass and of those in it -> its default."""
    found, hints = {}, typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            found |= keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    return found


KEYS = keys(schema.StageConfig)


def shown(value) -> str:
    """A default as the page writes it: none, and else as in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def functions(file: str) -> set[str]:
    """The functions at the top of a file below tests/."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def key_of(path: str) -> str | None:
    """The key of the schema that a path of a YAML file lies at or below."""
    return next((key for key in KEYS if f"{path}.".startswith(f"{key}.")), None)


def paths(values: dict, prefix: str = "") -> list[str]:
    """The paths of a YAML file's leaves, in dot notation."""
    nested = [
        paths(v, f"{prefix}{k}.") if isinstance(v, dict) and v and key_of(prefix + k) is None else [prefix + k]
        for k, v in values.items()
    ]
    return [path for found in nested for path in found]


# ---------------------------------------------------------------- tables of keys
def test_every_key_has_one_row_and_every_row_a_key():
    assert sorted(row[0] for row in ROWS) == sorted(f"`{key}`" for key in KEYS)
    assert {len(row) for row in ROWS} == {len(HEAD)} and {row[1] for row in ROWS} == {"", "seed"}


def test_a_row_has_the_default_of_the_schema():
    assert {key: row[2] for key, row in BY_KEY.items()} == {key: f"`{shown(value)}`" for key, value in KEYS.items()}


def test_a_row_says_what_the_key_means_and_what_it_may_be():
    assert [key for key, row in BY_KEY.items() if len(row[3].split()) < 2] == []
    chosen = {key.name: key.choices for key in all_keys(schema.StageConfig) if key.choices}
    assert [key for key, choices in chosen.items() if any(f"`{c}`" not in BY_KEY[key][3] for c in choices)] == []
    assert len(chosen) > 10


def test_defaults_are_written_in_one_way():
    values = [MISSING, None, True, 2, 0.1, 1e-8, "${a.b}", ["x", "y"], {}]
    assert [shown(v) for v in values] == ["???", "none", "true", "2", "0.1", "1e-08", "${a.b}", "[x, y]", "{}"]


def test_the_keys_of_the_seed_are_marked_and_no_others():
    found = set(WORDS_OF_THE_SEED)
    for name in ("seed_template", "seed_finetuning"):
        found |= {key_of(path) for path in paths(yaml.safe_load((DATA / f"{name}.yaml").read_text()))}
    assert {key for key, row in BY_KEY.items() if row[1] == "seed"} == found


# ---------------------------------------------------------------- tests that are named
def test_every_key_is_shown_by_tests_and_by_nothing_else():
    cells = {key: row[4] for key, row in BY_KEY.items()}
    assert [key for key, cell in cells.items() if not TEST.findall(cell) or TEST.sub("", cell).strip(", ")] == []


def test_the_tests_that_are_named_exist():
    named = TEST.findall(PAGE)
    assert [f"{file}::{name}" for file, name in named if name not in functions(file)] == []
    assert len(named) == PAGE.count("::") > len(KEYS)


def test_every_correction_of_the_seed_and_every_objective_is_shown():
    corrections = [line for line in SECTIONS["Where the seed was wrong"].splitlines() if line.startswith("- ")]
    objectives = rows(SECTIONS["Objectives"])[1:]
    assert len(corrections) > 10 and all(TEST.search(line) for line in corrections)
    assert len(objectives) == len(OBJECTIVES) == 8 and all(TEST.search(row[3]) for row in objectives)


# ---------------------------------------------------------------- YAML that can be copied
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
OBJECTIVES = {row[0]: yaml.safe_load(row[1].strip("`")) for row in rows(SECTIONS["Objectives"])[1:]}
PREDICTIONS = {"v-prediction": "v_prediction", "zero terminal SNR": "v_prediction", "flow matching": "flow_prediction"}


@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_of_yaml_is_valid(text):
    values = yaml.safe_load(text)
    if text.startswith("# configs/components.yaml"):
        for entry in values.values():
            require(load_config(schema_data.ComponentConfig, values=entry), "the page")
    else:
        load_config(schema.StageConfig, values=values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_lines_of_an_objective_give_it(name, tiny_parts):
    cfg = load_config(schema.StageConfig, values=OBJECTIVES[name])
    scheduler = cfg.model.scheduler
    if scheduler.pretrained or not scheduler.target:  # a component that tests do not download
        scheduler.pretrained = str(tiny_parts)
    process = objective.process_of(load_part("scheduler", cfg.model))
    expected = next((found for start, found in PREDICTIONS.items() if name.startswith(start)), "epsilon")
    assert process.prediction == expected
    assert name.startswith("zero") == (process.alphas_cumprod is not None and process.alphas_cumprod[-1] == 0)
