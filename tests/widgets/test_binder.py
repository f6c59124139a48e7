"""Binder: its files, and that its steps make a JupyterLab with the quickstart and the dashboard."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
BINDER = ROOT / "binder"
MOST_BYTES = 2.5e9
"""Of the image's packages."""
MOST_MEMORY = 1.5e9
"""Bytes of a notebook's kernel."""


def pinned() -> dict[str, str]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_environment_is_torch_without_cuda_and_nothing_else() -> None:
    requirements = yaml.safe_load((BINDER / "environment.yml").read_text())
    assert requirements["channels"] == ["conda-forge"]  # by name, no address
    packages = {
        name: rest for name, _, rest in (spec.partition("=") for spec in requirements["dependencies"])
    }
    assert set(packages) == {"python", "pip", "pytorch"}  # what else there is comes from the constraints
    version, _, build = packages["pytorch"].partition("=")
    assert version == pinned()["torch"]
    assert build.startswith("cpu_")
    assert f"TORCH := {version}" in (ROOT / "Makefile").read_text()
    requires = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert requires
    assert SpecifierSet(requires[1]).contains(packages["python"])


def test_the_scripts_can_run_and_name_what_exists() -> None:
    assert {p.name for p in BINDER.iterdir()} == {"environment.yml", "postBuild", "start"}
    for name in ("postBuild", "start"):
        assert os.access(BINDER / name, os.X_OK), f"chmod +x binder/{name}"
        subprocess.run(["bash", "-n", BINDER / name], check=True)
    assert "-c .ci/constraints.txt -e '.[lab]'" in (BINDER / "postBuild").read_text()
    printed = subprocess.run(
        [BINDER / "start", "sh", "-c", "echo $QTX_LAB_HOME $0 $1", "a b", "c"],
        env={**os.environ, "REPO_DIR": "/somewhere"}, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed == "/somewhere/runs a b c\n"


def needed() -> set[str]:
    """The distributions that Binder's extra `lab` needs, directly or not."""
    seen: set[tuple[str, str]] = set()
    ask = [("qtx-lab", "lab")]
    while ask:
        name, extra = ask.pop()
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", extra}):
                new = {
                    (re.sub(r"[-_.]+", "-", requirement.name).lower(), e) for e in ("", *requirement.extras)
                }
                ask += new - seen
                seen |= new
    return {name for name, _ in seen}


def size(name: str) -> int:
    """Bytes of a distribution's files."""
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return 0
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())


def test_all_that_binder_installs_is_pinned_and_small() -> None:
    names = needed() - cuda_of_torch()
    assert {"torch", "jupyterlab", "panel", "qiskit-aer"} <= names
    assert {name for name in names if name.startswith(("nvidia", "cuda", "triton", "dask-cuda"))} == set()
    sizes = {name: size(name) for name in names}
    assert {name for name in names if sizes[name]} <= {*pinned(), "pip", "setuptools"}
    total = sum(sizes.values())
    assert total <= MOST_BYTES, f"{total / 1e9:.2f} GB"


def cuda_of_torch() -> set[str]:
    """What torch for CUDA brings, where that is the torch installed here; Binder's brings none."""
    brought = {Requirement(r).name for r in distribution("torch").requires or []}
    return {name for name in brought if name.startswith(("nvidia", "cuda")) or name == "triton"}


# --- The steps --------------------------------------------------------------------------------------


@contextmanager
def jupyter(
    python: Path, repository: Path, **environment: str
) -> Iterator[tuple[str, str, subprocess.Popen[Any]]]:
    """The server as Binder starts it, through binder/start; gives its address, its token and the process."""
    from tests.widgets.conftest import free_port, stop, wait_for

    port, token, log = free_port(), secrets.token_hex(16), repository.parent / "jupyter.log"
    own = {
        name: str(repository.parent / name.lower())
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("QTX_LAB_HOME", "PYTHONPATH")}
    command = [
        repository / "binder" / "start", python, "-m", "jupyterlab", "--no-browser", "--allow-root",
        "--expose-app-in-browser",
        "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--IdentityProvider.token={token}",
        "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=repository, env={**inherited, **own, "REPO_DIR": str(repository), **environment},
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token={token}", process, log)
        yield f"http://127.0.0.1:{port}", token, process
    finally:
        stop(process)


def open_quickstart(page: Any, url: str, token: str) -> None:
    """The link of the first badge."""
    page.goto(f"{url}/lab/tree/notebooks/00_quickstart.ipynb?reset&token={token}")
    page.wait_for_function(
        """() => { const panel = window.jupyterapp?.shell.currentWidget;
        return panel?.context?.isReady && panel.sessionContext?.session?.kernel?.status === "idle"; }"""
    )
    page.get_by_role("heading", name="Sampled attention on real text").wait_for()


def open_dashboard(page: Any, url: str) -> None:
    """The link of the second badge."""
    page.goto(f"{url}/qtx-lab/")
    page.get_by_role("button", name="Runs", exact=True).wait_for(timeout=90_000)


@pytest.mark.ui
def test_the_start_step_gives_jupyterlab_and_the_dashboard(page: Any, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "notebooks", repository / "notebooks", ignore=shutil.ignore_patterns("results"))
    shutil.copytree(BINDER, repository / "binder")
    with jupyter(Path(sys.executable), repository) as (url, token, _):
        open_quickstart(page, url, token)
        home = page.evaluate(
            """async () => {
              const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
              const future = kernel.requestExecute({ code: "import os; print(os.environ['QTX_LAB_HOME'])" });
              let said = ""; future.onIOPub = (m) => { said += m.content.text ?? ""; };
              await future.done; return said.trim();
            }"""
        )
        assert home == str(repository / "runs")
        page.evaluate("() => window.jupyterapp.commands.execute('launcher:create')")
        card = page.locator(".jp-LauncherCard", has_text="qtx_lab dashboard")
        card.locator("img").wait_for()  # its icon
        with page.expect_popup() as opened:
            card.click()
        dashboard = opened.value
        page.watch.attach(dashboard)
        dashboard.get_by_text("No runs yet").wait_for(timeout=90_000)
        dashboard.get_by_text(str(repository / "runs")).last.wait_for()
        assert dashboard.url.startswith(f"{url}/qtx-lab/")
        dashboard.close()
        open_dashboard(page, url)


@pytest.mark.ui
@pytest.mark.notebooks
def test_the_whole_build(page: Any, soak: bool, tmp_path: Path) -> None:
    """In a fresh virtual environment: environment.yml, postBuild, start, and the quickstart by hand."""
    if not soak:
        pytest.skip("downloads for minutes: make soak")
    repository = tmp_path / "repository"
    left_out = shutil.ignore_patterns(
        ".venv", ".git", "runs", "node_modules", "dist", ".*_cache", "__pycache__"
    )
    shutil.copytree(ROOT, repository, ignore=left_out)
    clean = tmp_path / "venv"
    venv.create(clean, with_pip=True, symlinks=True)
    python = clean / "bin" / "python"
    # Conda's part: torch without CUDA, where the registry offers one.
    install = [python, "-m", "pip", "install", "--quiet", "-c", ".ci/constraints.txt", "torch"]
    subprocess.run(install, cwd=repository, check=True)
    cuda = subprocess.run(
        [python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True
    ).stdout
    if cuda.strip() != "None":
        pytest.skip("this registry has torch for CUDA only; Binder takes it from a channel")
    path = f"{clean / 'bin'}{os.pathsep}{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if k not in ("QTX_LAB_HOME", "PYTHONPATH")} | {
        "PATH": path
    }
    subprocess.run([repository / "binder" / "postBuild"], cwd=repository, env=inherited, check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(clean)}))
    total = sum(p.stat().st_size for p in site.rglob("*") if p.is_file() and not p.is_symlink())
    print(f"\npackages: {total / 1e9:.2f} GB")
    assert total <= MOST_BYTES
    with jupyter(python, repository, PATH=path) as (url, token, process):
        open_quickstart(page, url, token)
        page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
        errors = page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap((cell) =>
              (cell.model.sharedModel.outputs ?? []).filter((o) => o.output_type === "error")
                .map((o) => o.evalue))"""
        )
        assert errors == []
        memory = max(
            child.memory_info().rss for child in psutil.Process(process.pid).children(recursive=True)
        )
        print(f"quickstart's kernel: {memory / 1e9:.2f} GB")
        assert memory <= MOST_MEMORY
        open_dashboard(page, url)
        page.get_by_role("cell", name="demo", exact=True).wait_for()  # of postBuild
        page.get_by_role("cell", name="quickstart", exact=True).wait_for()  # by hand
