"""Tests of the environments: consistent pins, complete locks without hosts, and error messages of `make`."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = ("env", "img2dataset", "npm", "uv")


def requirements(path: Path) -> list[Requirement]:
    """Return the requirements of a file in pip's format, without comments and hashes."""
    lines = (re.split(r"\s#|^#| \\$", line)[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("--hash")]


def pins(*paths: Path) -> dict[str, str]:
    """Return {name: version} of the exact pins in the files; the first file with a package takes precedence."""
    found: dict[str, str] = {}
    for path in paths:
        for requirement in requirements(path):
            name, specifiers = canonicalize_name(requirement.name), list(requirement.specifier)
            assert len(specifiers) == 1 and specifiers[0].operator == "==", f"{path.name}: {requirement} is not pinned"
            found.setdefault(name, specifiers[0].version)
    return found


def direct_pins() -> dict[str, str]:
    """Return the direct dependencies of `.venv`."""
    return pins(REQUIREMENTS / "env.in", REQUIREMENTS / "torch.txt")


def conda_pins(name: str) -> dict[str, str]:
    """Return the pip pins of `envs/{name}.yaml`."""
    (pip,) = [d["pip"] for d in conda(name)["dependencies"] if isinstance(d, dict)]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, pip)}


def conda(name: str) -> dict:
    return yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_the_direct_pins_and_a_hash_for_each(lock):
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    locked = requirements(REQUIREMENTS / f"{lock}.txt")
    versions: dict[str, set[str]] = {}
    for requirement in locked:
        versions.setdefault(canonicalize_name(requirement.name), set()).add(next(iter(requirement.specifier)).version)
    for name, version in pins(REQUIREMENTS / f"{lock}.in").items():
        assert version in versions[name], f"{lock}.txt has another {name} than {lock}.in: run `make lock`"
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(locked)
    assert all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize(
    "path", sorted([*REQUIREMENTS.glob("*.txt"), *REQUIREMENTS.glob("*.in")]), ids=lambda p: p.name
)
def test_no_requirements_file_names_a_host(path):
    assert not re.search(r"://|--(extra-)?index-url|--find-links|^-[if] ", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_contains_torch_or_packages_that_require_a_build_of_it(lock):
    forbidden = r"(torch|torchvision|torchaudio|torch-fidelity|triton|xformers|nvidia-.*|cuda-.*)"
    names = {canonicalize_name(r.name) for r in requirements(REQUIREMENTS / f"{lock}.txt")}
    assert not {name for name in names if re.fullmatch(forbidden, name)}


def test_every_direct_dependency_has_a_reason():
    lines = [line for line in (REQUIREMENTS / "env.in").read_text().splitlines() if "==" in line]
    assert lines and not [line for line in lines if not re.search(r"\s# \S", line)]


@pytest.mark.parametrize("name", ["workflow", "train", "data"])
def test_conda_environment_has_the_pins_of_the_locks(name):
    own = [REQUIREMENTS / "img2dataset.in", REQUIREMENTS / "npm.in"] if name == "data" else []
    expected = pins(*own, REQUIREMENTS / "env.in", REQUIREMENTS / "torch.txt")
    environment = conda(name)
    assert environment["channels"] == ["conda-forge"]
    assert "python=3.11" in environment["dependencies"]
    for package, version in conda_pins(name).items():
        assert expected[package] == version, f"envs/{name}.yaml: {package}"


def test_conda_environments_together_have_every_direct_dependency():
    tools = {"hypothesis", "moto", "mypy", "pandas-stubs", "pytest", "pytest-timeout", "pytest-xdist", "ruff"}
    tools |= {"setuptools", "snakefmt", "types-tqdm", "wids"}
    anywhere = conda_pins("workflow") | conda_pins("train") | conda_pins("data")
    assert set(direct_pins()) - tools <= set(anywhere)
    assert set(pins(REQUIREMENTS / "img2dataset.in")) <= set(conda_pins("data"))


def third_party_imports(path: Path) -> set[str]:
    """Return the top-level names of a file's imports, without the standard library and the project."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    own = {entry.stem for entry in (ROOT / "workflow").iterdir()}
    return names - set(sys.stdlib_module_names) - own


def test_every_import_of_the_library_and_the_scripts_is_a_direct_dependency():
    packages = metadata.packages_distributions()
    for path in sorted([*ROOT.glob("workflow/sdtrain/**/*.py"), *ROOT.glob("workflow/scripts/*.py")]):
        for module in third_party_imports(path):
            names = {canonicalize_name(name) for name in packages.get(module, [module])} | {canonicalize_name(module)}
            assert names & set(direct_pins()), f"{path.name} imports {module}: add it to requirements/env.in"


def test_dependencies_of_the_package_are_the_pinned_ones_of_the_library():
    section = (REQUIREMENTS / "env.in").read_text().partition("# --- the library\n")[2].partition("# ---")[0]
    names = {canonicalize_name(Requirement(line.partition(" #")[0]).name) for line in section.splitlines() if line}
    pinned, dependencies = direct_pins(), [Requirement(text) for text in project()["dependencies"]]
    assert {canonicalize_name(dependency.name) for dependency in dependencies} == names | {"torch"}
    for dependency in dependencies:
        assert dependency.specifier.contains(pinned[canonicalize_name(dependency.name)]), str(dependency)


def test_installed_versions_are_the_pinned_ones():
    for name, version in direct_pins().items():
        assert metadata.version(name).partition("+")[0] == version, name


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_project_metadata_agrees_with_make():
    assert project()["requires-python"] == ">=3.11,<3.12"
    assert re.search(r"^PYTHON \?= python3\.11$", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture
def checkout(tmp_path):
    """Copy the Makefile and the requirements into a folder without environments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(REQUIREMENTS, tmp_path / "requirements")
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make as in a new shell, even if the tests themselves run under make."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)


def test_make_without_target_lists_every_target(checkout):
    listed = make(checkout).stdout
    for target in ("env", "demo", "test", "lint", "bench", "lock", "clean-env", "help"):
        assert re.search(rf"^make {target} ", listed, re.MULTILINE), target


@pytest.mark.parametrize("python", ["missing", "of another version"])
def test_make_env_without_python_3_11_is_an_error_and_creates_nothing(checkout, python):
    command = checkout / "python"
    if python == "of another version":  # an interpreter whose version check fails
        command.write_text("#!/bin/sh\nexit 1\n")
        command.chmod(0o755)
    result = make(checkout, "env", f"PYTHON={command}")
    assert result.returncode != 0
    assert f"error: {command} is not a Python 3.11. Install python3.11" in result.stderr
    assert not list(checkout.glob(".venv*"))


def test_make_env_does_nothing_if_the_stamps_are_newer_than_the_locks(checkout):
    uv = checkout / ".venv-uv/bin/uv"
    for file in (uv, checkout / ".venv/.done", checkout / ".venv-data/.done"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert "Nothing to be done" in make(checkout, "env").stdout
    (checkout / "requirements/env.txt").write_text("")
    assert make(checkout, "env", "--question").returncode == 1


def test_ci_script_is_executable_and_valid_bash():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
