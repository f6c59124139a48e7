"""`bench estimators`: every sampler is in it, and a method that fails its check gets no ratio."""

import math

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.bench import base as bench
from qtx_lab.bench import control_sets, coreset_controls
from qtx_lab.bench import estimators as bench_estimators
from qtx_lab.samplers import BASELINES, SAMPLERS


@pytest.fixture
def case():
    """Two layers of two heads, one diffuse and one peaked, 48 keys."""
    g = torch.Generator().manual_seed(0)
    layers = [tuple(torch.randn(1, 2, 48, 8, generator=g) for _ in range(3)) for _ in range(2)]
    for q, _, _ in layers:
        q *= torch.tensor([0.3, 4.0])[:, None, None]
    return bench_estimators.Case("tiny", layers, layers, {"is_causal": True}, 24)


def measured(label, square, unbiased=True):
    square = torch.tensor(square, dtype=torch.float64)
    return bench_estimators.EstimatorError(
        label, unbiased, square, 0 * square, torch.ones_like(square), [1.0, 3.0], 8.0
    )


def test_everything_is_compared(case, monkeypatch, capsys):
    monkeypatch.setattr(bench_estimators, "cases", lambda quick: [case])
    monkeypatch.setattr(bench_estimators, "bench_control_sets", lambda quick: [])
    monkeypatch.setattr(bench_estimators, "bench_coreset_controls", lambda quick: [])
    rows = bench_estimators.bench_estimators(True, 1e9)
    rows = [row for row in rows if row.case == "tiny, 12 draws"]
    assert {*SAMPLERS, *BASELINES} <= {row.method for row in rows}
    details = {row.method: row.details for row in rows}
    assert {"case", "method", "seconds", "baseline", "ratio", "error", "check"} <= set(rows[0].to_json())
    assert details["monte-carlo"]["error ratio"] == 1
    assert next(row.error for row in rows if row.method == "exact") < 1e-5
    assert details["oracle-top-k"]["bias share"] == pytest.approx(1)  # no noise, only bias
    assert details["monte-carlo"]["bias share"] < 0.2
    assert (
        details["head-tail"]["error ratio, diffuse heads"] > details["head-tail"]["error ratio, other heads"]
    )
    printed = capsys.readouterr().out
    assert "2 of 4 heads diffuse" in printed
    assert "head-tail over i.i.d." in printed


def test_ratios_are_geometric_means_over_heads(case):
    """Squares of 1 and 4 where i.i.d. draws have 4 and 4: the root ratios are 1/2 and 1."""
    errors = {
        "monte-carlo": measured("monte-carlo", [[4.0, 4.0]] * 2),
        "systematic": measured("systematic", [[1.0, 4.0]] * 2),
    }
    _, row = bench_estimators.table(case, 12, errors)
    assert row.details["error ratio"] == pytest.approx(0.5**0.5)
    assert row.details["draws of i.i.d."] == pytest.approx(2)
    assert row.details["error ratio, diffuse heads"] == pytest.approx(0.5)
    assert row.details["error ratio, other heads"] == pytest.approx(1)
    assert row.seconds == 2


@pytest.mark.parametrize(
    ("label", "square", "unbiased", "why"),
    [
        ("broken", math.nan, True, "not finite"),
        ("broken", math.inf, False, "not finite"),
        ("worse", 9.0, True, "1.50 times that of i.i.d."),
        ("exact", 1.0, True, "should be exact"),
    ],
)
def test_a_method_that_fails_its_check_gets_no_ratio(case, capsys, label, square, unbiased, why):
    errors = {name: measured(name, [[4.0, 4.0]] * 2) for name in ("monte-carlo", "systematic")}
    errors[label] = measured(label, [[square, square]] * 2, unbiased)
    row = bench_estimators.table(case, 12, errors)[-1]
    assert why in row.check
    assert all(
        value is None for key, value in row.to_json().items() if "ratio" in key or key == "draws of i.i.d."
    )
    printed = capsys.readouterr().out.splitlines()[-1]
    assert why in printed
    assert "–" in printed


def test_a_biased_baseline_may_be_worse(case):
    errors = {name: measured(name, [[4.0, 4.0]] * 2) for name in ("monte-carlo", "systematic")}
    errors["top"] = measured("top", [[9.0, 9.0]] * 2, unbiased=False)
    assert bench_estimators.table(case, 12, errors)[-1].details["error ratio"] == pytest.approx(1.5)


def test_it_is_registered_under_its_name(monkeypatch):
    monkeypatch.setattr(
        bench_estimators, "bench_estimators", lambda quick, copy_bandwidth: [(quick, copy_bandwidth)]
    )
    assert bench.BENCHES["estimators"](True, 2.0) == [(True, 2.0)]
    assert qtx.make_sampler("santa-prop").unbiased is False


def test_sets_of_controls_are_compared_with_the_best_single_one(monkeypatch, capsys):
    """Of every class of rows; a set that is worse than its best control by more than 5 % fails its check."""
    few = control_sets.row_classes(n=80, length=16, heads=2)
    assert {x.name for x in few} == {"peaked", "diffuse", "skewed", "causal", "LLM-like"}
    monkeypatch.setattr(control_sets, "row_classes", lambda **sizes: few[1:2])
    monkeypatch.setattr(control_sets, "SAMPLERS", ("monte-carlo",))
    rows = {row.method: row for row in control_sets.bench_control_sets(True)}
    assert rows["no control"].details["error ratio"] == 1
    assert all(row.passed for row in rows.values())
    both = rows["topk + linformer"]
    best = min(rows[x].details["error ratio"] for x in ("topk", "linformer"))
    assert both.details["ratio to best single"] == pytest.approx(both.details["error ratio"] / best)

    honest = control_sets._measure

    def planted(row_class, sampler, names, repetitions):
        measured = honest(row_class, sampler, names, repetitions)
        worse = 2.0 if len(names) > 1 else 1.0
        return control_sets._Measured(worse * measured.square, measured.seconds)

    monkeypatch.setattr(control_sets, "_measure", planted)
    rows = {row.method: row for row in control_sets.bench_control_sets(True)}
    assert "times that of its best control" in rows["linformer + performer"].check
    assert rows["linformer + performer"].ratio is None
    assert "times that of its best control" in capsys.readouterr().out


def test_coresets_are_measured_beside_the_controls(capsys):
    rows = {row.method: row for row in coreset_controls.bench_coreset_controls(True)}
    assert rows["no control"].error == pytest.approx(1)
    assert 0 < rows["topk"].error < 1
    coresets = [row for name, row in rows.items() if name.startswith("coreset")]
    assert len(coresets) == 33
    for size in coreset_controls.BESIDE_TOPK:  # a second control takes draws away and nothing else
        pairs = [row for row in coresets if f"of {size} " in row.method and "beside topk" in row.method]
        assert len(pairs) == 6
        assert all(row.error * (96 - size) <= 96 * rows["topk"].error * (1 + 1e-9) for row in pairs)
    assert sum("alone" in row.method for row in coresets) == 9
    assert all(row.passed == (row.details["heads within target"] >= 0.5) for row in coresets)
    assert "keys touched" in capsys.readouterr().out


def test_pivots_of_a_kernel_of_low_rank_span_it(generator):
    """Of keys that are few different ones, randomly pivoted Cholesky chooses each once."""
    few = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    which = torch.arange(200) % 5
    chosen = coreset_controls.pivots(few[which], 5, 0.3, generator)
    assert sorted(which[chosen].tolist()) == [0, 1, 2, 3, 4]


def test_thinned_keys_represent_all_better_than_random_ones(generator):
    """By the squared distance of mean embeddings in the kernel's space, of 200 keys and 25 of them."""
    keys = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    kernel = torch.exp(0.3 * keys @ keys.mT)

    def distance(chosen):
        between, among = kernel[chosen].mean(), kernel[chosen][:, chosen].mean()
        return float(kernel.mean() - 2 * between + among)

    chosen = coreset_controls.thinned(keys, 25, 0.3, generator)
    assert len(set(chosen.tolist())) == 25
    random = [distance(torch.randperm(200, generator=generator)[:25]) for _ in range(50)]
    assert distance(chosen) < 0.3 * sum(random) / len(random)
