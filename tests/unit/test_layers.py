"""Tests that wings import only wings before them, planning imports no torch, and scripts import no scripts."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
LIBRARY = sorted((WORKFLOW / "sdtrain").rglob("[!_]*.py"))
SCRIPTS = sorted((WORKFLOW / "scripts").glob("*.py"))
WINGS = ("errors", "io", "config", "distributed", "models", "data", "training", "evaluation", "orchestration")
LIGHT = {  # wings that import fewer of those before them, and single modules of others
    "orchestration": {"errors", "io", "config", "data.predicates", "evaluation.registry"},
}


def imports(file: Path) -> set[str]:
    """Return every module that a file imports anywhere, as dotted names; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name_of(file: Path) -> str:
    """Return the dotted name of a module below sdtrain, such as data.tars."""
    return ".".join(file.relative_to(WORKFLOW / "sdtrain").with_suffix("").parts)


NAMES = {name_of(file) for file in LIBRARY}


def library_modules(file: Path) -> set[str]:
    """Return the modules of sdtrain that a file imports, as dotted names below sdtrain."""
    return {name.removeprefix("sdtrain.") for name in imports(file)} & NAMES


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules that import themselves, directly or through others."""
    found = []
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        found += [start] if start in seen else []
    return found


def test_every_wing_is_listed():
    assert {name.partition(".")[0] for name in NAMES} == set(WINGS)
    assert {"train", "sample"} <= {file.stem for file in SCRIPTS}


def test_imports_are_found_anywhere_in_a_file(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from sdtrain.data import stream as s\ndef f():\n    import sdtrain.models.parts\n"
        "    from sdtrain.training.ema import Ema\n"
    )
    assert library_modules(file) == {"data.stream", "models.parts", "training.ema"}


@pytest.mark.parametrize("file", LIBRARY, ids=name_of)
def test_a_wing_imports_only_wings_before_it(file):
    wing = name_of(file).partition(".")[0]
    allowed = LIGHT.get(wing, set(WINGS[: WINGS.index(wing)])) | {wing}
    found = library_modules(file)
    assert {name for name in found if not {name, name.partition(".")[0]} & allowed} == set()


def test_the_library_does_not_import_the_demo():
    assert not any(name.partition(".")[0] == "demo" for file in LIBRARY for name in imports(file))


def test_there_is_no_import_cycle():
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b"]
    assert circles({name_of(file): library_modules(file) for file in LIBRARY}) == []


@pytest.mark.parametrize("file", [*(WORKFLOW / "sdtrain").glob("*/__init__.py")], ids=lambda file: file.parent.name)
def test_every_wing_documents_its_imports(file):
    assert "Imports" in ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert not imports(file), "an __init__ imports nothing: imports stand in the modules that use them"


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_import_no_scripts(file):
    others = {script.stem for script in SCRIPTS} - {file.stem}
    assert not others & {name.split(".")[0] for name in imports(file)}
    assert not any(name.startswith("scripts") for name in imports(file))


def test_planning_needs_no_heavy_package():
    program = (
        "import sys\nimport sdtrain.orchestration.plan, sdtrain.orchestration.invocations\n"
        "print(*({'torch', 'diffusers', 'transformers', 'PIL', 'numpy', 'pandas', 'pyarrow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=WORKFLOW, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
