"""Each extra, installed from the wheel into an environment of its own, does a small piece of its work.

That downloads gigabytes and takes an hour, so it is part of `make soak` only. One extra takes some minutes:
`QTX_LAB_SOAK=1 pytest tests/test_extras.py -k search -s`. What needs no installation is tested by
`test_front_door.py`, which blocks the imports of all extras.
"""

from __future__ import annotations

import json
import tomllib
import venv
from pathlib import Path

import pytest

from tests import test_wheel

ROOT = Path(__file__).parents[1]
wheel = test_wheel.wheel  # a fixture
MOST_PACKAGES = 15
"""Distributions of `pip install qtx-lab` beside torch and what torch needs."""

BARE = """
import qtx_lab as qtx, torch
q, k, v = torch.randn(3, 1, 4, 32, 8)
estimate = qtx.sampled_attention(q, k, v, num_samples=8, replicates=4, is_causal=True)
assert estimate.std_error.isfinite().all()
qtx.SampledKVCache.build(k, v).attend(q[..., -1:, :], num_samples=4)
qtx.load_reference_model()
try:
    qtx.TreeLoader
except qtx.MissingPackage as error:
    assert "qtx-lab[quantum]" in str(error)
else:
    raise AssertionError("this environment has qiskit")
"""

LAB = """
import nbformat, tempfile
from pathlib import Path
import qtx_lab as qtx
bench = qtx.Workbench()
assert "sample" in bench.tabs
bench.close()
home = tempfile.mkdtemp()
path = Path(home, "square.ipynb")
parameters = nbformat.v4.new_code_cell("x = 2", metadata={"tags": ["parameters"]})
work = nbformat.v4.new_code_cell("print(x**2)")
nbformat.write(nbformat.v4.new_notebook(cells=[parameters, work]), path)
run = qtx.run_notebook(path, {"x": 3}, home=home, progress=False)
assert (run.path / "report.html").is_file()
assert len(qtx.runs(home)) == 1
"""

RUN = """
import tempfile
from pathlib import Path
import qtx_lab as qtx
home = tempfile.mkdtemp()
with qtx.Run.create(qtx.ExperimentSpec(seed=1), "trial", home) as run:
    run.log(step=1, error=0.25)
    run.update(results={"error": 0.25})
"""

CONVERT = """
import torch
import qtx_lab as qtx
model = qtx.load_language_model("smollm2-135m")
tokens = model.encode("Sampled attention draws keys")
settings = {"num_samples": 16, "is_causal": True, "enable_gqa": True}
attend = lambda layer, q, k, v: qtx.sampled_attention(q, k, v, **settings).output
assert model(tokens[None], attention=attend).shape[:2] == (1, len(tokens))
"""

HUGGING_FACE = """
import torch, transformers
import qtx_lab as qtx
qtx.huggingface.register()
config = transformers.LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    attn_implementation="qtx_sampled",
)
config.qtx_sampled = {"sampler": "head-tail", "num_samples": 4}
model = transformers.LlamaForCausalLM(config)
assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 16)
"""

SMOKE = {
    "": BARE,
    "quantum": """
import torch
import qtx_lab as qtx
backend = qtx.QiskitQuantumBackend("aer", "fake_manila")
assert backend.sample_rows(torch.full((1, 4), 1 / 4), shots=100).counts.sum() == 100
""",
    "cluster": """
import qtx_lab as qtx
if __name__ == "__main__":
    with qtx.open_cluster("local", num_workers=1) as cluster:
        assert cluster.client.submit(pow, 3, 2).result() == 9
""",
    "gpu": """
import os
os.environ["TRITON_INTERPRET"] = "1"  # where there is no GPU the kernels run in Triton's interpreter
os.environ["QTX_LAB_KERNELS"] = "triton"
import torch
import qtx_lab as qtx
q, k, v = torch.randn(3, 1, 16, 16)
assert qtx.gpu_quantum_attention(q, k, v, num_samples=4).isfinite().all()
import pynvml, dask_cuda
""",
    "hf": HUGGING_FACE,
    "llm": CONVERT,
    "lab": LAB,
    "lab,mlflow": RUN
    + """
from qtx_lab.experiments.mlflow_export import export_to_mlflow
done = export_to_mlflow(qtx.runs(home), f"file://{home}/mlruns")
assert (done.copied, done.problems) == (1, {})
""",
    "lab,search": """
from qtx_lab.experiments.search import Dimension, best_of, find_best
squares = lambda asked: [(combination["x"] - 3) ** 2 for combination, _ in asked]
tried = find_best(squares, {"x": Dimension(0, 10)}, trials=20, repeats=1)
assert best_of(tried).combination == {"x": 3}
""",
    "lab,ro-crate": RUN
    + """
from qtx_lab.experiments.ro_crate_export import export_to_ro_crate
assert export_to_ro_crate(run, Path(home, "crate")).suffix == ".zip"
""",
    "lm-eval": """
from qtx_lab.models.lm_evaluation import register_model
register_model()
from lm_eval.api.registry import get_model
model = get_model("qtx")(model="reference", policy="exact")
assert model.tok_encode("import")
""",
    "all": LAB + HUGGING_FACE,
}
"""What each extra is for, small: the extras that are installed, and code that runs with them."""


LISTED = """
import json, re
from importlib.metadata import distributions
from pip._vendor.packaging.requirements import Requirement
key = lambda name: re.sub(r"[-_.]+", "-", name).lower()
holds = lambda marker: marker is None or marker.evaluate({"extra": ""})
read = lambda distribution: map(Requirement, distribution.requires or ())
needs = {key(d.name): [key(r.name) for r in read(d) if holds(r.marker)] for d in distributions()}
print(json.dumps(needs))
"""
"""What is installed, and what each distribution needs without extras, as JSON."""


def test_each_extra_has_a_smoke_test() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tested = {name for names in SMOKE for name in names.split(",") if name}
    assert tested == set(extras) - {"test", "docs", "release"}  # which make itself installs


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("extras", SMOKE, ids=lambda extras: extras or "none")
def test_an_extra_does_its_work_in_a_clean_environment(
    extras: str, soak: bool, wheel: Path, tmp_path: Path
) -> None:
    if not soak:
        pytest.skip("downloads for minutes: make soak")
    home = tmp_path / "venv"
    venv.create(home, with_pip=True, symlinks=True)
    python = home / "bin" / "python"
    requirement = f"qtx-lab[{extras}] @ {wheel.as_uri()}" if extras else str(wheel)
    pins = ROOT / ".ci" / "constraints.txt"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    test_wheel.run(*pip, "-c", pins, requirement, cwd=tmp_path)
    script = tmp_path / "smoke.py"
    script.write_text(SMOKE[extras], encoding="utf-8")
    test_wheel.run(
        python, script, cwd=tmp_path, QTX_LAB_MODELS=str(tmp_path / "models"), MLFLOW_ALLOW_FILE_STORE="true"
    )
    needs = json.loads(test_wheel.run(python, "-c", LISTED, cwd=tmp_path))
    of_torch, ask = set(), ["torch"]
    while ask:
        name = ask.pop()
        if name in needs and name not in of_torch:
            of_torch.add(name)
            ask += needs[name]
    beside = sorted(set(needs) - of_torch - {"pip", "setuptools", "qtx-lab"})
    files = [path for path in home.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files) / 1e9
    print(f"\n{extras or 'none'}: {len(beside)} packages beside torch's {len(of_torch)}, {size:.2f} GB")
    if not extras:
        print(", ".join(beside))
        assert len(beside) <= MOST_PACKAGES
