"""`qtx-lab bench tolerance`: misses and draws of a case, and a table of them."""

import torch

from qtx_lab.bench import tolerance as bench


def test_a_row_tells_misses_and_draws():
    row = bench.measure("systematic", 0.3, "period 4", 10, 20)
    details = row.details
    assert row.passed
    assert details["miss low"] <= row.error <= details["miss high"]
    assert len(details["of each row"]) == bench.HEADS * bench.ROWS
    assert 0 < details["needed"] <= details["spent"] + details["pilot"] <= bench.KEYS


def test_a_promise_that_is_not_kept_fails(monkeypatch):
    monkeypatch.setattr(bench.Case, "relative_errors", wrong)
    row = bench.measure("systematic", 0.3, "period 4", 10, 20)
    assert not row.passed
    assert row.ratio is None
    assert "miss" in row.check


def wrong(case, sampler, repetitions, generator, **how):
    draws = torch.full((repetitions, *case.q.shape[:-1]), 8)
    info = bench.EstimateInfo(sampler, True, draws_per_row=draws, pilot_draws_per_row=draws)
    return torch.ones(draws.shape), info


def test_the_table_names_samplers_and_cases(monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK_CASES", ("period 2",))
    rows = bench.bench_tolerance(True, 1e9)
    assert [row.method for row in rows] == list(bench.QUICK)
    output = capsys.readouterr().out
    assert "period 2, tolerance 0.2" in output
    assert "draws used over needed" in output


def test_every_class_of_rows_can_be_made():
    for name, make in bench.CASES.items():
        case = make()
        assert case.exact().isfinite().all(), name
        assert case.keys_of_each_row().max() <= case.k.shape[-2]
