"""Tests that README, CONTRIBUTING and docs/slurm.md match the repository: tree, rules, runs, locations, messages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/slurm.md")
LIBRARY = ROOT / "workflow/sdtrain"


def section(title: str) -> str:
    """Return the text of a README section, from its heading to the next heading."""
    heading = re.search(rf"^#+ {re.escape(title)}$", README, re.MULTILINE)
    assert heading, f"README.md has no section {title!r}"
    return re.split(r"^#", README[heading.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def tree_paths() -> list[str]:
    """Return every path of the first column of README's tree; an indented one is below the last one that is not."""
    block = re.search(r"```\n(.*?)```", section("The tree"), re.DOTALL)[1]
    found, parent = [], ""
    for line in block.splitlines():
        entry = re.match(r"( *)(\S+(?:  \S+/)?)  +\S", line)
        names = entry[2].split()
        parent = parent if entry[1] else names[0]
        found += [parent + name for name in names] if entry[1] else names
    return found


def names_in(path: Path) -> set[str]:
    """Return what a Python file defines (functions, classes, constants), or the keys of a YAML file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return set(re.findall(r"^ *([\w-]+):", text, re.MULTILINE))
    nodes = list(ast.walk(ast.parse(text)))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return defined | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


WHERE = re.findall(r"^\| (.+?) \| `(\S+?)` \| (.+?) \|$", section("Where is …?"), re.MULTILINE)


def test_every_path_of_the_tree_exists():
    paths = tree_paths()
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_names_every_wing_and_folder():
    wings = {path.name for path in LIBRARY.iterdir() if not path.name.startswith("_")}
    named = {Path(path).name for path in tree_paths() if path.startswith("workflow/sdtrain/")}
    assert named - {"sdtrain"} == wings


@pytest.mark.parametrize(("what", "path", "names"), WHERE, ids=[row[0] for row in WHERE])
def test_names_in_the_table_of_locations_exist(what, path, names):
    stated = re.findall(r"`([\w-]+)`", names.partition(";")[0])
    assert stated, f"README.md names nothing in {path}"
    assert set(stated) <= names_in(ROOT / path)


def test_table_of_locations_has_five_rows():
    assert len(WHERE) >= 5


def test_the_readme_describes_every_rule_and_run():
    rules = {
        name
        for file in (ROOT / "workflow/rules").glob("*.smk")
        for name in re.findall(r"^rule (\w+):", file.read_text(), re.MULTILINE)
    }
    table = "".join(re.findall(r"^\| (`.+?) \|", section("The workflow"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", table)) == rules - {"freeze"}
    runs = {file.stem for file in (ROOT / "configs").glob("*.yaml")} - {"components"}
    assert set(re.findall(r"^\| `([\w-]+)` \|", section("From your table to a model"), re.MULTILINE)) == runs


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert [link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_source_paths_named_in_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:workflow|tests|configs|profiles|benchmarks|docs)/[\w./-]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


QUOTED = (  # messages of this project that docs/slurm.md explains
    *("waiting for SLURM jobs of an earlier invocation", "saved ahead of the time limit", "has no launch line"),
    *("the checkpoint before it is untouched", "another process is training here", "is not on this node"),
    *("ranks were planned", "is not a multiple of", "has lost rank", "which died or hangs", "no progress for"),
)


@pytest.mark.parametrize("words", QUOTED)
def test_messages_explained_in_slurm_md_exist_in_the_code(words):
    assert words in (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    files = [file for folder in ("workflow", "profiles") for file in (ROOT / folder).rglob("*.*") if file.is_file()]
    assert any(words.encode() in file.read_bytes() for file in files if file.suffix in {".py", ".smk", ".sh"})
