"""The house stands: style, types, layers, bare notebooks, a light import, nothing out of place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TOP = {"pyproject.toml", "README.md", "qtx_lab", "notebooks", "widgets", "tests", "binder"}
TOP |= {"Makefile", "LICENSE", "CHANGELOG.md"}


def run(*command: str | Path) -> None:
    """Run a command at the root; what it printed is the failure's message."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}", pytrace=False)


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


def test_types() -> None:
    run(sys.executable, "-m", "mypy")


def test_layers() -> None:
    run(Path(sys.executable).with_name("lint-imports"), "--no-cache")


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


def test_import_is_light() -> None:
    heavy = {"qiskit", "panel", "triton", "transformers", "torch"}
    code = "import json, sys, qtx_lab; dir(qtx_lab); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(json.loads(done.stdout))


def test_top_level_holds_nothing_else() -> None:
    top = {name.partition("/")[0] for name in house_files()}
    assert {name for name in top if not name.startswith(".")} <= TOP


def test_no_file_names_this_machine_or_a_registry() -> None:
    machine = r"(?<![\w.~-])/(?:work|root|home)/"
    registry = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|-index-url"
    pattern = re.compile(f"{machine}|{registry}".encode())
    found = {name: pattern.findall((ROOT / name).read_bytes()) for name in house_files()}
    found.pop("tests/test_house.py", None)  # it has to spell out what it looks for
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_constraints_are_names_and_versions() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)] == []
    assert pins == sorted(set(pins), key=lambda pin: pin.split("=="))
