"""The names at the top of `qtx_lab`: their types, their laziness and the version."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import qtx_lab

ROOT = Path(__file__).parents[1]

USER_FILE = """\
import torch
import qtx_lab as qtx

q, k, v = torch.randn(3, 1, 2, 8, 4)
reveal_type(qtx.sampled_attention(q, k, v))
reveal_type(qtx.sampled_attention(q, k, v).output)
reveal_type(qtx.SampledKVCache.build(k, v).attend(q, num_samples=4))
reveal_type(qtx.gpu_quantum_attention(q, k, v, num_samples=4))
reveal_type(qtx.make_sampler("systematic"))
reveal_type(qtx.QiskitQuantumBackend("aer").sample_rows(q))
reveal_type(qtx.ZeroNoiseExtrapolation(noise_levels=[1, 2, 3]))
reveal_type(qtx.runs())
reveal_type(qtx.run_notebook("00_quickstart"))
reveal_type(qtx.QuantumTrainer(model="reference").train())
reveal_type(qtx.huggingface.register())
reveal_type(qtx.Workbench())
reveal_type(qtx.__version__)
"""
"""What a user writes; mypy says what it takes each expression for."""

REVEALED = [
    "AttentionEstimate",
    "Tensor",
    "AttentionEstimate",
    "Tensor",
    "Sampler",
    "RowCounts",
    "ZeroNoiseExtrapolation",
    "RunTable",
    "Run",
    "TrainingResult",
    "None",
    "Workbench",
    "str",
]


def test_an_editor_sees_the_types_of_the_top_level_names(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_FILE)
    mypy = [sys.executable, "-m", "mypy", tmp_path / "user.py"]
    process = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    revealed = re.findall(r'Revealed type is "(?:[\w.]+\.)?(\w+)"', process.stdout)
    assert revealed == REVEALED


def test_every_top_level_name_is_there_and_documented() -> None:
    assert qtx_lab.__all__ == sorted(qtx_lab.__all__)
    for name in qtx_lab.__all__:
        assert getattr(qtx_lab, name).__doc__, name


def test_a_first_call_loads_little_and_the_hugging_face_adapter_is_loaded_when_it_is_first_used() -> None:
    code = (
        "import sys, torch, qtx_lab as qtx\n"
        "qtx.sampled_attention(*torch.zeros(3, 4, 8, 2), replicates=2, is_causal=True)\n"
        "from qtx_lab.models import reference\n"
        "loaded = {'scipy.stats', 'sympy', 'pandas', 'numba', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded  # the first two take a second each\n"
        "qtx.huggingface.register()\n"
        "assert 'transformers' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert qtx_lab.huggingface is importlib.import_module("qtx_lab.models.huggingface")


def test_one_place_holds_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert qtx_lab.__version__ == version
    for path in (ROOT / "qtx_lab").rglob("*.py"):
        assert f'"{version}"' not in path.read_text(encoding="utf-8"), path
