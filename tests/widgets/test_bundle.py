"""The committed bundle and the TypeScript tables are current, and the TypeScript passes its checks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "widgets"
STATIC = ROOT / "qtx_lab" / "widgets" / "static"
BUNDLE = sorted(path.name for path in STATIC.iterdir())


def script(name: str) -> ModuleType:
    """A script of widgets/ as a module."""
    spec = importlib.util.spec_from_file_location(f"widgets_{name}", SOURCES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest() -> str:
    """The digest of the bundle's sources, as build.mjs computes it."""
    names = sorted(f"src/{path.name}" for path in (SOURCES / "src").iterdir() if ".test." not in path.name)
    total = hashlib.sha256()
    for name in ["build.mjs", "package-lock.json", *names]:
        total.update(f"{name}\n".encode() + (SOURCES / name).read_bytes())
    return total.hexdigest()


def run(*command: str) -> None:
    """Run a command in widgets/; what it printed is the failure's message."""
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.parametrize("name", BUNDLE)
def test_the_bundle_is_of_these_sources(name: str) -> None:
    recorded = re.match(
        r"/\* qtx_lab: .*; sources ([0-9a-f]{64}) \*/", (STATIC / name).read_text(encoding="utf-8")
    )
    assert recorded is not None
    assert recorded[1] == digest(), "widgets/src has changed: run `npm run build` in widgets/"


def test_the_tables_are_those_of_the_theme() -> None:
    now = (SOURCES / "src" / "theme.ts").read_text(encoding="utf-8")
    assert now == script("theme").source(), "qtx_lab/theme.py has changed: run widgets/theme.py"


def test_the_draws_that_typescript_repeats_are_those_of_python() -> None:
    golden = script("golden")
    written = json.loads(golden.TARGET.read_text(encoding="utf-8"))["rows"]
    for old, new in zip(written, golden.cases(written), strict=True):
        number, pairs = old["dtype"], [(old, new), *zip(old.pop("draws"), new.pop("draws"), strict=True)]
        for a, b in pairs:
            # The exponential of a processor may be another number next to the true one.
            for name in {"mass", "weights"} & a.keys():
                x, y = (golden.tensor(z.pop(name), number) for z in (a, b))
                assert torch.allclose(x, y, rtol=8 * torch.finfo(x.dtype).eps, atol=0), name
            assert a == b, "the samplers have changed: run widgets/golden.py"


def test_the_bundle_is_built_anew_to_the_same_bytes(node_modules: Path, tmp_path: Path) -> None:
    run("node", "build.mjs", str(tmp_path))
    for name in BUNDLE:
        assert (tmp_path / name).read_bytes() == (STATIC / name).read_bytes()


@pytest.mark.parametrize(
    "command",
    [("tsc", "--noEmit"), ("prettier", "--check", "--log-level=warn", "."), ("vitest", "run")],
    ids=lambda c: c[0],
)
def test_typescript(node_modules: Path, command: tuple[str, ...]) -> None:
    run(str(node_modules / ".bin" / command[0]), *command[1:])


def test_the_lock_names_no_registry() -> None:
    assert '"resolved"' not in (SOURCES / "package-lock.json").read_text(encoding="utf-8")
