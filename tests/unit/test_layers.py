"""Lower layers never import upper ones, modules of a layer do not import each other, scripts import no scripts."""

import ast
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
LIBRARY = sorted((WORKFLOW / "sdtrain").glob("[!_]*.py"))
SCRIPTS = sorted((WORKFLOW / "scripts").glob("*.py"))
LAYERS = (  # a module imports only from the layers before its own
    {"schema"},
    {"calls", "config", "dist", "predicates", "slurm", "storage"},
    {
        "tables",
        "tars",
        "images",
        "models",
        "lora",
        "objective",
        "ema",
        "optimizer",
        "parallel",
        "checkpoint",
        "sampling",
        "telemetry",
        "plan",
    },
    {"shards", "features", "progress", "diffusion", "autoencoder"},
    {"sources"},
    {"loader", "identity"},
    {"evaluation"},
)


def imports(file: Path) -> set[str]:
    """Every module that a file imports anywhere, as dotted names; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def library_modules(file: Path) -> set[str]:
    """The modules of sdtrain that a file imports."""
    names = {module.stem for module in LIBRARY}
    return {name.split(".")[1] for name in imports(file) if name.startswith("sdtrain.")} & names


def test_what_is_looked_at_is_there():
    assert {module for layer in LAYERS for module in layer} == {file.stem for file in LIBRARY}
    assert {"train", "sample"} <= {file.stem for file in SCRIPTS}


def test_imports_are_seen(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from sdtrain import loader as l\ndef f():\n    import sdtrain.models\n    from sdtrain.ema import Ema\n"
    )
    assert library_modules(file) == {"loader", "models", "ema"}


@pytest.mark.parametrize("file", LIBRARY, ids=lambda file: file.stem)
def test_library_imports_only_what_lies_below(file):
    (own,) = [i for i, layer in enumerate(LAYERS) if file.stem in layer]
    assert library_modules(file) <= set().union(*LAYERS[:own])


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_scripts_import_no_scripts(file):
    others = {script.stem for script in SCRIPTS} - {file.stem}
    assert not others & {name.split(".")[0] for name in imports(file)}
    assert not any(name.startswith("scripts") for name in imports(file))


def test_configuration_needs_neither_torch_nor_the_rest():
    heavy = {"torch", "numpy", "diffusers", "transformers", "PIL", "pandas", "pyarrow"}
    for name in ("config", "schema"):
        assert not heavy & {name.split(".")[0] for name in imports(WORKFLOW / "sdtrain" / f"{name}.py")}
