"""`bench model`: the exact model loses nothing, and losses come with error bars."""

import math

import torch

from qtx_lab.bench import model as bench_model
from qtx_lab.cache.sketches import PROPOSALS
from qtx_lab.models.reference import load_reference_model
from qtx_lab.models.text import encode, reference_text


def test_the_rows_hold_the_promised_details(capsys):
    rows = bench_model.bench_model(True, 1e10)
    names = {row.method for row in rows}
    caches = {f"cache, {proposal}" for proposal in PROPOSALS}
    assert names == {f"{name}, S = n / 8" for name in (*bench_model.SAMPLERS, *caches)}
    for row in rows:
        assert row.details["KL"] > 0
        assert row.details["KL ±"] >= 0
        assert 0.5 < row.details["top-1 agreement"] <= 1
        assert row.error == row.details["bits per byte"] / row.details["exact bits per byte"] - 1
        assert (row.ratio is None) == (row.check != "pass")
    kl = {row.method: row.details["KL"] for row in rows}
    assert kl["head-tail, S = n / 8"] < kl["systematic, S = n / 8"] < kl["monte-carlo, S = n / 8"]
    assert "bits per byte" in capsys.readouterr().out


def test_exact_attention_loses_nothing_either_way():
    model, n = load_reference_model(), 96
    windows = encode(reference_text())[: 2 * n + 1].unfold(0, n + 1, n)
    exact = bench_model.whole(model, windows)(torch.Generator())
    many = bench_model.whole(model, windows, "head-tail", n)(torch.Generator())  # every key is in the head
    torch.testing.assert_close(many, exact, atol=1e-4, rtol=1e-4)
    decoded = bench_model.decoding(model, windows)(torch.Generator())
    torch.testing.assert_close(decoded, exact[:, n - n // 2 - 1 :], atol=1e-4, rtol=1e-4)
    loss = bench_model.against(lambda generator: exact, 0, exact, windows[:, 1:])
    assert abs(loss.divergence) < 1e-6
    assert loss.agreement == 1
    assert loss.bits == bench_model.bits_of(exact, windows[:, 1:])


def test_a_loss_above_the_allowed_one_gets_no_ratio(monkeypatch):
    exact = torch.full((1, 4, 256), -math.log(256))
    worse = (exact + torch.linspace(0, 1, 256)).log_softmax(-1)
    targets = torch.zeros(1, 4, dtype=torch.int64)
    methods = {("head-tail", 8): lambda generator: worse, ("head-tail", 3): lambda generator: worse}
    rows = bench_model.table("case", targets, lambda generator: exact, methods, 2)
    assert [row.ratio is None for row in rows] == [True, False]
    assert "above 1.0%" in rows[0].check
