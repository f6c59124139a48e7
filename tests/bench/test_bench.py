"""What all benchmarks share: a failed check leaves no ratio, and JSON has the promised keys."""

import json

import pytest
import torch
from click.testing import CliRunner

import qtx_lab as qtx
from qtx_lab.bench import base as bench
from qtx_lab.bench import samplers as bench_samplers
from qtx_lab.cli import main


def method(name, output, allowed=1e-3):
    return bench.Method(name, lambda: output, num_bytes=1000, allowed_error=allowed)


def test_a_method_that_fails_its_check_gets_no_ratio(capsys):
    exact = torch.ones(3, dtype=torch.float64)
    methods = [
        method("slow", torch.ones(3)),
        method("wrong", torch.full((3,), 1.1)),
        method("nan", torch.full((3,), torch.nan)),
    ]
    rows = bench.compare("case", methods, exact, ("slow",), turns=3, copy_bandwidth=1e9)
    assert [row.passed for row in rows] == [True, False, False]
    assert rows[0].ratio == 1
    assert rows[1].ratio is rows[2].ratio is None
    assert "above" in capsys.readouterr().out


def test_the_json_has_the_promised_keys(tmp_path, monkeypatch, capsys):
    exact = torch.ones(3, dtype=torch.float64)

    def tiny(quick, copy_bandwidth):
        return bench.compare("case", [method("a", torch.ones(3))], exact, ("a",), 1, copy_bandwidth)

    monkeypatch.setitem(bench.BENCHES, "tiny", tiny)
    monkeypatch.setattr(bench, "measure_copy_bandwidth", lambda: 1e9)
    bench.run_bench("tiny", quick=True, json_path=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"cpu", "cores", "threads"} <= set(result["machine"])
    assert {"case", "method", "seconds", "baseline", "ratio", "error", "check"} <= set(result["rows"][0])
    assert "MB moved" in capsys.readouterr().out


def test_the_command_line_names_every_benchmark():
    output = CliRunner().invoke(main, ["bench", "--help"]).output
    assert all(name in output for name in bench.BENCHES)


def test_bad_input_is_refused_before_the_work(tmp_path):
    with pytest.raises(qtx.ArgumentError, match="Did you mean 'samplers'"):
        bench.run_bench("sampler")
    with pytest.raises(qtx.StorageError):
        bench.run_bench("samplers", json_path=tmp_path / "missing" / "out.json")


def test_the_row_by_row_loop_samples_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8, generator=g) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = bench_samplers.row_by_row(q, k, v, 2000, g)
    assert (out - exact).norm() / exact.norm() < 0.1


def test_every_registered_sampler_is_timed(monkeypatch):
    methods = []

    def compare(case, compared, *options):
        methods.extend(method.name for method in compared)
        return []

    monkeypatch.setattr(bench_samplers, "compare", compare)
    monkeypatch.setitem(bench_samplers.SAMPLERS, "mine", bench_samplers.SAMPLERS["systematic"])
    bench_samplers.bench_samplers(True, 1e9)
    assert {"sdpa", "row-by-row loop", "mine"} | set(bench_samplers.SAMPLERS) - {"exact"} == set(methods)


def test_peak_memory_sees_an_allocation():
    tensor, rise = bench.peak_memory(lambda: torch.ones(1 << 22))
    assert tensor.nbytes == 1 << 24
    assert rise is None or (1 << 24) * 0.9 < rise < (1 << 24) * 1.5
