"""The benchmark of the kernels: refused without a GPU, small on the CPU, no ratio on a failed check."""

import json
import math
import re

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.bench import base as bench
from qtx_lab.bench import kernels as bench_kernels
from qtx_lab.bench.kernels import Case, DecodeMethod
from qtx_lab.experiments.notebooks import notebooks_folder

TINY = Case(1, 512, 64, 1)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(qtx.BackendUnavailable, match=r"needs a CUDA device.*--quick"):
        bench.BENCHES["kernels"](False, 1e9)


def test_quick_runs_every_part(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure_copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench_kernels, "Case", lambda *shape: TINY)
    bench.run_bench("kernels", quick=True, json_path=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"SDPA", "exact K", "int4", "rank 16", "int4, rank 64"}
    assert {"case", "method", "seconds", "baseline", "ratio", "error", "check", "device"} <= set(rows[0])
    assert all(row["check"] == "pass" and row["baseline"] == "SDPA" for row in rows)
    keys, sketch = (next(row for row in rows if row["method"] == name) for name in ("exact K", "rank 16"))
    assert sketch["bytes"] < keys["bytes"] < rows[0]["bytes"]
    out = capsys.readouterr().out
    assert "say nothing about a GPU" in out
    assert "of copy" in out


def test_a_failed_check_has_no_ratio(monkeypatch, capsys):
    exact = torch.zeros(1)
    calls = [lambda: exact]
    monkeypatch.setattr(
        bench_kernels, "baselines", lambda *_: [DecodeMethod("right", calls, 10, 0.0, 1e-2, baseline=True)]
    )
    wrong = [
        DecodeMethod("exact K", calls, 10, 0.1, 0.2),
        DecodeMethod("int4", calls, 5, 0.3, 0.2),
        DecodeMethod("nan", calls, 5, math.nan, 1),
    ]
    monkeypatch.setattr(bench_kernels, "kernel_methods", lambda *_: wrong)
    rows = bench_kernels.measure(TINY, torch.device("cpu"), 2, 1e9, "here")
    assert [row.ratio is None for row in rows] == [False, False, True, True]
    assert "above" in rows[2].check
    assert "above" in capsys.readouterr().out


def test_a_baseline_that_cannot_run_is_named(monkeypatch, capsys):
    def broken(x):
        raise RuntimeError("no kernel for this")

    inputs = [bench_kernels.make_inputs(TINY, torch.device("cpu"), 0)]
    monkeypatch.setattr(bench_kernels, "exact_calls", lambda device: [("Broken", broken)])
    assert list(bench_kernels.baselines(TINY, inputs, bench_kernels.exact_output(inputs[0]))) == []
    assert "Broken cannot run: no kernel for this" in capsys.readouterr().out


def test_the_table_of_a_gpu_says_which_code_it_is_of():
    """Of the kernels as they were then, whatever has changed since."""
    notebooks = notebooks_folder()
    committed = json.loads((notebooks / "results" / "gpu_kernels.json").read_text())
    page = (notebooks / "benchmarks.md").read_text()
    section = page[page.index("## Decoding on a GPU") :].partition("\n## ")[0]
    assert f"at commit {committed['machine']['commit']}" in section
    speedups = {f"{row['ratio']:.2f} ×" for row in committed["rows"] if row["error_over_exact_k"] is not None}
    assert set(re.findall(r"[\d.]+ ×", section)) == speedups
