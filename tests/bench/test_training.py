"""`bench training` on a GPU, rehearsed with a small model on the CPU."""

import pytest

from qtx_lab.bench import training as bench_training
from qtx_lab.models.reference import ReferenceConfig

TINY = ReferenceConfig(context=32, layers=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16)


def test_a_model_is_timed_with_exact_attention_and_with_draws(capsys):
    exact, drawn = bench_training.bench_large(True, "local", TINY, steps=8, batch_size=2, precision="fp32")
    assert (exact.method, drawn.method) == ("exact", "systematic, S=64")
    assert exact.ratio == 1
    assert drawn.check == "pass"
    assert drawn.ratio == pytest.approx(
        drawn.details["tokens_per_second"] / exact.details["tokens_per_second"]
    )
    assert exact.details["parameters"] == drawn.details["parameters"] > 0
    assert exact.details["device"].startswith("CPU")
    assert "tokens/s" in capsys.readouterr().out


def test_without_a_cluster_it_is_trained_in_this_process(monkeypatch):
    monkeypatch.setattr(bench_training, "open_cluster", None)
    exact, drawn = bench_training.bench_large(True, None, TINY, steps=6, batch_size=1, precision="fp32")
    assert exact.ratio == 1
    assert drawn.check == "pass"


def test_on_a_gpu_the_large_model_is_trained(monkeypatch):
    monkeypatch.setattr(bench_training, "find_gpus", lambda: (1, ""))
    monkeypatch.setattr(bench_training, "bench_large", lambda quick: ["large", quick])
    assert bench_training.bench_training(True, 1e9) == ["large", True]
    assert bench_training.LARGE.width * bench_training.LARGE.layers > 9000
