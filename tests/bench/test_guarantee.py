"""`qtx-lab bench guarantee`: rows that keep a promise, one that does not, and the peer's own promise."""

from statistics import median

import pytest
import torch

from qtx_lab.bench import guarantee as bench


@pytest.mark.parametrize("case", bench.ADVERSARIAL)
def test_adversarial_rows_keep_the_promise(case):
    kind = bench.ADVERSARIAL[case]()
    outcome = bench.keep(kind, 0.1, 0.05, 1)
    assert outcome.rows == kind.rows == len(outcome.errors)
    assert outcome.misses <= 0.05 * outcome.rows
    row = bench._row(kind.name, [kind.name], 0.1, 0.05, [outcome], None)
    assert row.passed
    assert row.details["miss low"] <= row.error <= row.details["miss high"]
    assert 0 <= row.details["share of keys"] < 1


def test_rare_errors_are_the_largest_that_the_bounds_allow():
    """Most keys lie on the grid of the sketch, and the others as far off it as any bound says."""
    ((q, k, v, fitted),) = bench.rare_errors().layers
    cache = bench.SampledKVCache.build(k, v, "int8", queries=fitted)
    wrong = cache.scores(q[:, :1], 1.0)[0, 0] - q[0, 0] @ k[0].mT
    wrong = (wrong - wrong.median()).abs()
    share = (wrong > 0.09).double().mean()
    assert 0.1 < float(share) < 0.16
    assert float(wrong[wrong < 0.09].max()) < 2e-3  # keys of no weight are farther off
    assert float(wrong.max()) < 0.2 * 0.49


def test_a_promise_that_is_not_kept_fails(monkeypatch):
    exact = bench.exact
    monkeypatch.setattr(bench, "exact", lambda *args: 1.2 * exact(*args))
    kind = bench.ADVERSARIAL["a sink"]()
    row = bench._row(kind.name, [kind.name], 0.1, 0.05, [bench.keep(kind, 0.1, 0.05, 1)], None)
    assert not row.passed
    assert row.ratio is None
    assert "a sink: 100.00% of 216 miss" in row.check


def test_vattention_gets_the_budget_that_keeps_its_own_promise(capsys):
    kind = bench.ADVERSARIAL["a sink"]()
    outcome = bench.vattention(kind, 0.1, 0.05, (0.01, 0.1, 0.5))
    assert outcome.rows == 4 * bench.PEER_ROWS
    assert outcome.own_misses <= 0.1 * outcome.rows
    assert outcome.budget <= median(outcome.keys_of_heads) <= 1
    ours = bench._row("a sink", ["a sink"], 0.1, 0.05, [bench.keep(kind, 0.1, 0.05, 1)], outcome)
    assert ours.ratio > 2
    bench.print_table([bench._peer_row("a sink", "vAttention", 0.1, 0.05, outcome), ours])
    output = capsys.readouterr().out
    assert "a sink, ε = 0.1, δ = 0.05" in output
    assert "vAttention" in output


def test_vattention_gets_an_epsilon_that_keeps_the_promise_of_outputs():
    kind = bench.ADVERSARIAL["a sink"]()
    own = bench.vattention(kind, 0.1, 0.05, (0.05, 0.2))
    outcome = bench.vattention_for_outputs(kind, 0.1, 0.05, (0.05, 0.2), (1 / 2, 1 / 8))
    assert outcome.misses <= 0.05 * outcome.rows
    assert outcome.epsilon in (0.05, 0.0125)
    assert own.epsilon == 0.1
    assert own.misses > 0.05 * own.rows  # or it would need no other epsilon
    assert median(outcome.keys_of_heads) > median(own.keys_of_heads)
    promise = bench.keep(kind, 0.1, 0.05, 1)
    row = bench._row("a sink", ["a sink"], 0.1, 0.05, [promise], own, outcome)
    assert row.details["ratio for outputs"] > row.ratio
    assert bench.vattention_for_outputs(kind, 0.001, 0.05, (0.01,), (1,)) is None


def test_the_peers_denominator_is_read_off_its_output():
    """With a budget of all keys it is exact, and so is what is made of the marked values."""
    kind = bench.ADVERSARIAL["heavy values"]()
    outcome = bench._vattention(kind, 1e-9, 0.05, 1.0)
    assert outcome.own_misses == outcome.misses == 0
    assert outcome.keys_of_heads == [1.0] * 4


def test_model_rows_are_the_last_of_each_layer(monkeypatch):
    monkeypatch.setattr(bench, "text_rows", lambda model, length, layers: [])
    monkeypatch.setattr(bench, "load_language_model", lambda name: None)
    _, reference = bench.model_rows(True)
    q, k, v, fitted = reference.layers[0]
    assert q.shape[1] == bench.ROWS
    assert fitted.shape[1] == bench.FITTED_QUERIES
    assert k.shape[:2] == v.shape[:2]
    alone = bench.exact(q[:1, :1], k[:1], v[:1])[0, 0]
    torch.testing.assert_close(bench.exact(q, k, v)[0, 0], alone)
