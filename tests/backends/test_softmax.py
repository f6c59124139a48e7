"""`SoftmaxCircuitSampler`: attention by circuits that are given queries and keys, on simulators and twins."""

from functools import partial

import pytest
import torch
from scipy.stats import binom

import qtx_lab as qtx
from qtx_lab.circuits.fidelity import total_variation
from qtx_lab.circuits.softmax import check_vectors
from qtx_lab.errors import DtypeError, ShapeError


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 2, generator=generator, dtype=torch.float64)
    return q * 0.7, k, v


def exact(q, k, causal=False):
    logits = q @ k.mT / q.shape[-1] ** 0.5
    mask = torch.ones_like(logits, dtype=torch.bool).tril() if causal else torch.ones_like(logits) > 0
    return logits.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.statistical
def test_success_matches_theory_and_draws_match_softmax(problem, generator):
    """Two-sided binomial tests of 4 rows at a rate of 1e-4 each."""
    q, k, _ = problem
    sampler = qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"), degree=6, tolerance=0.005)
    counts = sampler.measure(q[0], k[0], 20_000, generator=generator)
    accepted = counts.counts.sum(-1)
    for result, p in zip(accepted.tolist(), counts.diagnostics["success_probability"].tolist(), strict=True):
        tail = binom.cdf(result, 20_000, p), binom.sf(result - 1, 20_000, p)
        assert min(tail) > 5e-5
    distance = total_variation(counts.counts, exact(q[0], k[0]), generator=generator)
    assert (distance.value < distance.floor_range[1] + 0.005 + 0.01).all()
    assert counts.classical.counts.sum(-1).tolist() == [20_000] * 4


@pytest.mark.parametrize(
    ("q", "k", "allowed", "error", "words"),
    [
        ((2, 3, 2), (5, 2), None, ShapeError, "q has shape"),
        ((3, 2), (5, 4), None, ShapeError, "k .5, 4.; they must be"),
        ((3, 2), (4, 5, 2), None, ShapeError, "as many rows"),
        ((3, 2), (5, 2), torch.ones(3, 4) > 0, ShapeError, "= .3, 5."),
        ((3, 2), (5, 2), torch.ones(5) > 0, ShapeError, "= .3, 5."),
        ((3, 2), (5, 2), torch.ones(3, 5), DtypeError, "torch.bool"),
    ],
)
def test_rows_of_another_shape_are_refused(q, k, allowed, error, words):
    sampler = qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"), degree=5)
    with pytest.raises(error, match=words):
        sampler.measure(torch.zeros(q), torch.zeros(k), 10, allowed=allowed)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("q", [[1.0, 2.0]] * 3, "q is list"),
        ("q", torch.zeros(3, 2, device="meta"), "q is on the device meta"),
        ("k", torch.zeros(5, 2).long(), "k is torch.int64"),
        ("allowed", [[True] * 5] * 3, "allowed is list"),
        ("allowed", torch.ones(3, 5, device="meta") > 0, "allowed is on the device meta"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(name, given, words):
    arguments = {"q": torch.zeros(3, 2), "k": torch.zeros(5, 2), "allowed": None, name: given}
    sampler = qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"), degree=5)
    loader = sampler.loader(2)
    for call in (partial(sampler.measure, shots=10), loader.expected, loader.vector_angles):
        with pytest.raises(DtypeError, match=words):
            call(**arguments)


def test_it_is_a_sampler_of_attention(problem, generator):
    q, k, v = problem
    sampler = qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"), degree=6, rounds=1)
    estimate = qtx.sampled_attention(
        q, k, v, sampler=sampler, num_samples=4000, replicates=2, is_causal=True, generator=generator
    )
    assert (estimate.output - exact(q, k, causal=True) @ v).abs().max() < 0.15
    assert torch.equal(estimate.attention_weights().triu(1), torch.zeros(2, 4, 4, dtype=torch.float64))
    assert estimate.std_error.isfinite().all()
    assert estimate.info.classical is not None
    drawn_by = estimate.info.drawn_by
    assert drawn_by["quantum_rows"] == 8
    assert drawn_by["key_loads"] == 18
    draws = sampler.draw(torch.tensor([[0.0, 1.0, -torch.inf]]), 500, generator=generator)
    assert not (draws.indices[draws.weights > 0] == 2).any()


def test_a_twin_says_what_the_circuit_takes(problem, generator):
    q, k, _ = problem
    backend = qtx.QiskitQuantumBackend("aer", "fake_boston")
    counts = qtx.SoftmaxCircuitSampler(backend, degree=5).measure(q[0], k[0], 8000, generator=generator)
    facts = counts.diagnostics
    assert 0.3 < facts["error_free_probability"] < 1
    assert facts["two_qubit_gates"] > 50
    distance = (counts.probabilities() - exact(q[0], k[0])).abs().sum(-1) / 2
    assert distance.max() < 1 - facts["error_free_probability"] + 0.05


def test_what_it_cannot_do_is_refused(problem):
    q, k, v = problem
    sampler = qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"))
    with pytest.raises(qtx.ArgumentError, match="a boolean mask"):
        qtx.sampled_attention(q, k, v, sampler=sampler, attn_mask=torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(qtx.DtypeError, match="QiskitQuantumBackend"):
        qtx.SoftmaxCircuitSampler("aer")
    with pytest.raises(qtx.ArgumentError, match="degree"):
        qtx.SoftmaxCircuitSampler(sampler.backend, degree=0)


def test_the_vectors_of_a_measurement_are_checked_once(monkeypatch):
    checked = []

    def recorded(*vectors):
        checked.append(vectors)
        check_vectors(*vectors)

    for module in ("circuits", "backends"):
        monkeypatch.setattr(f"qtx_lab.{module}.softmax.check_vectors", recorded)
    q, k = torch.ones(2, 1), torch.ones(2, 2, 1)
    qtx.SoftmaxCircuitSampler(qtx.QiskitQuantumBackend("aer"), degree=2).measure(q, k, 10)
    assert len(checked) == 1
