"""House rules: style, types, layers, declared dependencies, bare notebooks, and nothing out of place."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOP = {"pyproject.toml", "README.md", "qtx_lab", "notebooks", "widgets", "tests", "binder"}
TOP |= {"Makefile", "LICENSE", "CHANGELOG.md", "CITATION.cff"}

OPTIONAL_ATTRIBUTES = {
    "'__notes__'": "Python sets it only on exceptions to which a note was added.",
    "'config'": "Models of transformers have it, other torch modules need not.",
    "'GOMP_parallel'": "torch has it where it was built with GNU's OpenMP.",
    "'is_causal'": "Only some of torch's modules have it.",
    "'logits'": "Models of transformers return an object that has it, others a tensor.",
    "'register_at_fork'": "Only on POSIX.",
    "'sched_getaffinity'": "Only on Linux.",
}
"""Attributes of other libraries' objects that may be missing, as they are written, and why."""

ADAPTERS = {
    "qtx_lab/bench/huggingface.py": "It reads a foreign model's settings, which may be missing.",
    "qtx_lab/models/huggingface.py": "It reads whatever settings a foreign model's configuration has.",
    "qtx_lab/models/huggingface_cache.py": "It reads a foreign model's settings, which may be missing.",
    "qtx_lab/models/huggingface_settings.py": "It reads a foreign model's settings, which may be missing.",
    "qtx_lab/samplers/__init__.py": "It takes a user's object that draws, of any class, in as a `Sampler`.",
    "qtx_lab/backends/sampler.py": "It refuses a mitigation of the user's own that cannot measure rows.",
    "qtx_lab/controls/registry.py": "It refuses a control of the user's own that cannot be prepared.",
}
"""Modules at the door, which look at objects that are not ours, and why."""


def run(*command: str | Path) -> None:
    """Run a command at the root; if it fails, what it printed is the failure's message."""
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{process.stdout}{process.stderr}", pytrace=False)


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """The path, the room and the syntax tree of each module of the package."""
    for path in sorted((ROOT / "qtx_lab").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        room = path.relative_to(ROOT / "qtx_lab").parts[0].removesuffix(".py")
        yield name, room, ast.parse(path.read_text(encoding="utf-8"))


def house_files() -> list[str]:
    """Paths of the files that are, or would be, under version control."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    # safe.directory: CI may own the clone as another user.
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


def test_lint() -> None:
    run(sys.executable, "-m", "ruff", "check", "--quiet", ".")


def test_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", "--quiet", "--diff", ".")


@pytest.mark.slow
def test_types() -> None:
    run(sys.executable, "-m", "mypy")


def test_nothing_is_imported_that_mypy_does_not_follow() -> None:
    """Its names would have no types, and whatever is done with them would pass."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    follows = {
        name.removesuffix(".*"): override["follow_imports"]
        for override in overrides
        if "follow_imports" in override
        for name in override["module"]
    }
    problems = []
    for path, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in imported:
                parents = [name[: dot.start()] for dot in re.finditer(r"\.|$", name)]
                if [follows[x] for x in parents if x in follows][-1:] == ["skip"]:
                    problems.append(f"{path}:{node.lineno} {name}")
    assert problems == []


def test_layers() -> None:
    run(Path(sys.executable).with_name("lint-imports"), "--no-cache")
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    assert contract["exhaustive"]
    assert "ignore_imports" not in contract


def test_no_modules_import_one_another_in_a_circle() -> None:
    # Imports inside functions and those for type checkers count, too.
    graph = grimp.build_graph("qtx_lab", exclude_type_checking_imports=False, cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail("each is imported by the next: " + ", ".join(error.args[1]), pytrace=False)


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    run(sys.executable, "-m", "deptry", "--no-ansi", ".")


def test_no_private_name_crosses_rooms() -> None:
    problems = []
    for name, room, tree in modules():
        package = ["qtx_lab", *Path(name).parent.parts[1:]]
        imported = {}  # what a name stands for, where it was imported from another room
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                source = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
                for alias in node.names:
                    full = [part for part in (*source, alias.name) if part]
                    if full[1] == room:
                        continue
                    imported[alias.asname or alias.name] = ".".join(full)
                    if re.match("_[^_]", alias.name):
                        problems.append(f"{name}:{node.lineno} {'.'.join(full)}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                source_name = imported.get(node.value.id)
                if source_name is not None and re.match("_[^_]", node.attr):
                    problems.append(f"{name}:{node.lineno} {source_name}.{node.attr}")
    assert problems == []


def test_abilities_are_stated_and_not_probed() -> None:
    problems = []
    for name, _, tree in modules():
        if name in ADAPTERS:
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if (node.func.id, len(node.args)) not in (("getattr", 3), ("hasattr", 2)):
                continue
            if ast.unparse(node.args[1]) not in OPTIONAL_ATTRIBUTES:
                problems.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert problems == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    problems = []
    for name, _, tree in modules():
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
        public = [node for node in public if "overload" not in map(ast.unparse, node.decorator_list)]
        problems += [f"{name}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
        if not ast.get_docstring(tree):
            problems.append(f"{name} does not say what it holds")
    assert problems == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_bare_and_takes_parameters(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for number, cell in enumerate(notebook.cells):
        assert not cell.get("outputs"), f"cell {number} has outputs"
        assert cell.get("execution_count") is None, f"cell {number} has an execution count"
    assert "widgets" not in notebook.metadata, "widget state is saved"
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill needs one cell tagged 'parameters'"
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            private = re.findall(r"(?<!\w)[A-Za-z]\w*\._[a-z]\w*|import _\w+", cell.source)
            assert private == [], f"cell {number} uses private names"


def test_import_is_light() -> None:
    heavy = {"qiskit", "panel", "triton", "transformers", "torch"}
    code = "import json, sys, qtx_lab; dir(qtx_lab); print(json.dumps(sorted(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(json.loads(process.stdout))


def test_top_level_holds_nothing_else() -> None:
    top = {name.partition("/")[0] for name in house_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_a_release_is_shown_and_changes_nothing() -> None:
    before = house_files()
    release = [sys.executable, ROOT / ".ci" / "release.py", "--no-build"]
    shown = subprocess.run([*release, "99.0.0"], capture_output=True, text=True, check=True).stdout
    for line in ('+version = "99.0.0"', "+version: 99.0.0", "+## [99.0.0] - 20"):
        assert line in shown
    assert house_files() == before
    refused = subprocess.run([*release, "next"], capture_output=True, text=True)
    assert "VERSION=next is not allowed" in refused.stderr
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_no_file_names_this_machine_or_a_registry() -> None:
    machine = r"(?<![\w.~-])/(?:work|root|home)/"
    registry = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|-index-url"
    pattern = re.compile(f"{machine}|{registry}".encode())
    matches = {name: pattern.findall((ROOT / name).read_bytes()) for name in house_files()}
    matches.pop("tests/test_house.py", None)  # it has to spell out what it looks for
    assert {name: hits for name, hits in matches.items() if hits} == {}


def test_constraints_hold_names_and_versions_only() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
    assert pins == sorted(set(pins), key=lambda pin: pin.split("=="))
