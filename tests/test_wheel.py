"""A wheel built from the tree, installed in a clean environment, runs the main job."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command away from the tree and from the tests' own settings; return what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "QTX_LAB_HOME")}
    process = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    if process.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{process.stdout}{process.stderr}", pytrace=False)
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree. Without isolation, so that nothing is downloaded."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's bin folder, with the wheel installed in it.

    The third-party packages are those of the environment that runs the tests, seen through a path file:
    installing them again would take the network and two minutes. Path files of that environment are not
    read in turn, so that its editable qtx_lab stays unseen (which `test_clean_environment` checks).
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scripts = home / Path(sysconfig.get_path("scripts")).name
    python = scripts / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=home)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "qtx_lab").rglob("*") if p.is_file()}
    ours = {name for name in ours if "__pycache__" not in name}
    notebooks = {f"qtx_lab/notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks
    assert any("/assets/" in name for name in packed)
    assert packed == ours | notebooks  # so no tests, and nothing left out
    assert {"qtx_lab/py.typed", "qtx_lab/__init__.pyi"} <= packed  # so an editor knows the types


def test_clean_environment(clean: Path, tmp_path: Path) -> None:
    where = run(clean / "python", "-c", "import qtx_lab; print(qtx_lab.__file__)", cwd=tmp_path)
    assert Path(where.strip()).resolve().is_relative_to(clean.parent.resolve())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run(clean / "qtx-lab", "--version", cwd=tmp_path)


@pytest.mark.notebooks
def test_demo_runs_from_the_wheel(clean: Path, tmp_path: Path) -> None:
    # JUPYTER_PATH: nbconvert's templates belong to the third-party packages.
    shared = str(Path(sys.prefix, "share", "jupyter"))
    small = ["--sample-counts", "4,8", "--samplers", "monte-carlo,systematic"]
    printed = run(clean / "qtx-lab", "demo", *small, cwd=tmp_path, JUPYTER_PATH=shared)
    report = Path(tmp_path, printed.splitlines()[-1])
    assert report.name == "report.html"
    assert report.is_file()
    assert report.resolve().is_relative_to((tmp_path / "runs").resolve())  # $QTX_LAB_HOME is ./runs
