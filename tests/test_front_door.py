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


WITHOUT_EXTRAS = """\
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import qtx_lab as qtx

q, k, v = torch.zeros(3, 1, 4, 8, 2)
qtx.sampled_attention(q, k, v, replicates=2, is_causal=True)
slow = {"scipy.stats", "sympy", "numba"} & set(sys.modules)
assert not slow, f"a first call loads {slow}"
qtx.SampledKVCache.build(k, v).attend(q[..., -1:, :], num_samples=4)
qtx.load_reference_model()
qtx.QuantumTrainer, qtx.calibrate, qtx.ExperimentSpec
for name in ("TreeLoader", "Workbench", "run_notebook", "huggingface"):
    try:
        getattr(qtx, name)
    except qtx.MissingPackage as error:
        print(error)
from click.testing import CliRunner
from qtx_lab.cli import main
result = CliRunner().invoke(main, ["runs"])
print(result.exit_code, result.output.strip())
"""


def test_drawing_needs_no_extra_and_a_missing_one_is_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {
        re.split(r"[^\w.-]", x)[0] for name in ("lab", "quantum", "cluster", "hf") for x in extras[name]
    }
    modules = {name.replace("-", "_") for name in packages - {"qtx-lab", "jinja2"}}  # torch needs jinja2
    code = f"EXTRAS = {modules}\n{WITHOUT_EXTRAS}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [
        "qtx_lab.TreeLoader needs qiskit: pip install 'qtx-lab[quantum]'.",
        "qtx_lab.Workbench needs ipywidgets: pip install 'qtx-lab[lab]'.",
        "qtx_lab.run_notebook needs duckdb: pip install 'qtx-lab[lab]'.",
        "qtx_lab.huggingface needs transformers: pip install 'qtx-lab[hf]'.",
        "2 error: this command needs duckdb: pip install 'qtx-lab[lab]'.",
    ]


def test_the_hugging_face_adapter_is_loaded_when_it_is_first_used() -> None:
    code = (
        "import sys, qtx_lab as qtx\n"
        "from qtx_lab.models import reference\n"
        "assert 'transformers' not in sys.modules\n"
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
