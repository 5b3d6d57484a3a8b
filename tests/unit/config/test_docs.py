"""Tests of docs/configuration.md: it is generated from the schema, names existing tests, and its YAML is valid."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import yaml
from omegaconf import OmegaConf
from samples import ROOT

from sdtrain.config import docs, schema, schema_data
from sdtrain.config.keys import all_keys, key
from sdtrain.config.load import MODEL_PARTS, load_config, require
from sdtrain.errors import ConfigError
from sdtrain.models.parts import load_part
from sdtrain.training import objective

PAGE = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
DATA = Path(__file__).resolve().parents[2] / "templates"
TEST = re.compile(r"`((?:unit|end_to_end|workflow)/[\w/]+\.py)::(\w+)`")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])
KEYS = [key.name for key in all_keys(schema.StageConfig) if not key.section]
KEYS_IN_TEXTS = {  # keys of open-diffusion's documentation and of commented lines of its template
    *("wandb.entity", "model.ema.path", "dataset.params.idx_to_prompt"),
    *(f"model.{part}.{key}" for part in MODEL_PARTS for key in ("pretrained", "target", "params")),
}
DOCUMENTED = OmegaConf.load(docs.TESTS)


def rows(text: str) -> list[list[str]]:
    """Return the cells of every row of the tables in a text, without the rules below the headers."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines if not set("".join(cells)) <= set("-: ")]


@cache
def functions(file: str) -> set[str]:
    """Return the names of the functions at the top level of a file below tests/."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def key_of(path: str) -> str | None:
    """Return the key of the schema that a path of a YAML file is at or below."""
    return next((key for key in KEYS if f"{path}.".startswith(f"{key}.")), None)


def paths(values: dict, prefix: str = "") -> list[str]:
    """Return the paths of a YAML file's leaves, in dot notation."""
    nested = [
        paths(v, f"{prefix}{k}.") if isinstance(v, dict) and v and key_of(prefix + k) is None else [prefix + k]
        for k, v in values.items()
    ]
    return [path for found in nested for path in found]


# ---------------------------------------------------------------- tables of keys
def test_page_is_up_to_date():
    docs.main(["docs.py", "--check"])


def test_outdated_page_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "PAGE", tmp_path / "page.md")
    docs.PAGE.write_text("old")
    with pytest.raises(SystemExit, match=r"page.md: differs .*; run: python -m sdtrain.config.docs > docs/"):
        docs.main(["docs.py", "--check"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<!-- keys DataConfig latents -->", r"every key must be in one table; not so: .*latents\.crop"),
        ("<!-- keys LatentConfig -->", "no schema LatentConfig"),
    ],
)
def test_wrong_template_is_an_error(tmp_path, monkeypatch, line, message):
    text = docs.TEMPLATE.read_text(encoding="utf-8") + f"\n{line}\n"
    monkeypatch.setattr(docs, "TEMPLATE", tmp_path / "page.in.md")
    docs.TEMPLATE.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        docs.render()


@dataclass
class Example:
    size: int = key(3, "Size in pixels", ge=1)
    kind: Literal["a", "b"] | None = key(None, "Kind | form")
    names: list[str] = key(["x", "y"], "Names")
    rate: float = key(1e-8, "Rate", ge=0, lt=1)
    flag: bool = key(True, "Flag")


def test_row_has_default_meaning_choices_and_bounds():
    tests = OmegaConf.create({"open_diffusion": ["size"], "shown_by": {"size": ["unit/test_a.py::test_b"]}})
    assert docs.table(list(all_keys(Example)), tests).splitlines()[2:] == [
        "| `size` * | `3` | Size in pixels. At least 1 | `unit/test_a.py::test_b` |",
        "| `kind` | `none` | Kind \\| form. One of `a`, `b` |  |",
        "| `names` | `[x, y]` | Names |  |",
        "| `rate` | `1e-08` | Rate. At least 0 and less than 1 |  |",
        "| `flag` | `true` | Flag |  |",
    ]


def test_section_defaults_depend_on_the_schema_that_includes_it():
    defaults = {key.name: key.default for key in all_keys(schema_data.AutoencoderConfig)}
    assert defaults["optimizer.params.beta2"] == 0.99 and defaults["lr_scheduler.params.warmup_length"] == 100


@pytest.mark.parametrize("kind", [schema.RunConfig, schema_data.DataConfig, schema_data.ComponentConfig])
def test_every_key_has_a_meaning(kind):
    assert [key.name for key in all_keys(kind) if not key.section and not key.metadata.get("help")] == []


def test_keys_of_open_diffusion_are_marked():
    found = set(KEYS_IN_TEXTS)
    for name in ("open_diffusion_template", "open_diffusion_finetuning"):
        found |= {key_of(path) for path in paths(yaml.safe_load((DATA / f"{name}.yaml").read_text()))}
    assert set(DOCUMENTED.open_diffusion) == found


# ---------------------------------------------------------------- names of tests
def test_every_key_of_a_training_names_tests():
    assert sorted(DOCUMENTED.shown_by) == sorted(KEYS) and all(DOCUMENTED.shown_by.values())


def test_named_tests_exist():
    named = TEST.findall(PAGE)
    assert [f"{file}::{name}" for file, name in named if name not in functions(file)] == []
    assert len(named) == PAGE.count("::") > len(KEYS)


def test_corrections_and_objectives_name_tests():
    corrections = [line for line in SECTIONS["Where open-diffusion was wrong"].splitlines() if line.startswith("- ")]
    objectives = rows(SECTIONS["Objectives"])[1:]
    assert len(corrections) > 10 and all(TEST.search(line) for line in corrections)
    assert len(objectives) == len(OBJECTIVES) >= 8 and all(TEST.search(row[3]) for row in objectives)


# ---------------------------------------------------------------- YAML that can be copied
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
OBJECTIVES = {row[0]: yaml.safe_load(row[1].strip("`")) for row in rows(SECTIONS["Objectives"])[1:]}
PREDICTIONS = {"v-prediction": "v_prediction", "zero terminal SNR": "v_prediction", "flow matching": "flow_prediction"}


@pytest.mark.parametrize("text", BLOCKS)
def test_yaml_blocks_of_the_page_are_valid(text):
    values = yaml.safe_load(text)
    if text.startswith("# configs/components.yaml"):
        for entry in values.values():
            require(load_config(schema_data.ComponentConfig, values=entry), "the page")
    else:
        load_config(schema.StageConfig, values=values)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_yaml_lines_of_an_objective_select_it(name, tiny_parts):
    cfg = load_config(schema.StageConfig, values=OBJECTIVES[name])
    scheduler = cfg.model.scheduler
    if scheduler.pretrained or not scheduler.target:  # a component that tests do not download
        scheduler.pretrained = str(tiny_parts)
    process = objective.process_of(load_part("scheduler", cfg.model))
    expected = next((found for start, found in PREDICTIONS.items() if name.startswith(start)), "epsilon")
    assert process.prediction == expected
    assert name.startswith("zero") == (process.alphas_cumprod is not None and process.alphas_cumprod[-1] == 0)
