"""`CircuitSampler`: the interface of a sampler, noise, discarded shots, and when rows fall back."""

import warnings

import pytest
import torch

import qtx_lab as qtx
from qtx_lab.backends.hybrid import HybridPolicy, predicted_fidelity
from qtx_lab.backends.sampler import deal
from qtx_lab.mitigation import CircuitMitigation

NOISE = qtx.ParametricNoise(two_qubit=0.05, readout=0.03)
SEED = 3


def seeded(seed=SEED):
    return torch.Generator().manual_seed(seed)


def qkv(length=12, features=8):
    g = seeded(1)
    return [torch.randn(2, length, features, generator=g) for _ in range(3)]


@pytest.mark.parametrize("loader", ["dynamic", "tree", "unary"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 1)])
def test_it_is_a_sampler(loader, shape):
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer"), loader)
    logits = torch.randn(shape, generator=seeded())
    draws = sampler.draw(logits, 5, generator=seeded(), replicates=3)
    assert draws.indices.shape == draws.weights.shape == (*shape[:-1], 15)
    assert draws.weights.dtype == logits.dtype
    assert torch.allclose(draws.weights.sum(-1), torch.ones(shape[:-1]))
    assert torch.allclose(draws.probabilities, logits.softmax(-1).gather(-1, draws.indices), atol=1e-6)
    assert sampler.unbiased
    assert torch.equal(draws.indices, sampler.draw(logits, 5, generator=seeded(), replicates=3).indices)


@pytest.mark.parametrize(
    ("logits", "count", "error"),
    [
        (torch.zeros(4), 0, qtx.ArgumentError),
        (torch.tensor([0.0, torch.nan]), 4, qtx.ArgumentError),
        (torch.tensor([0.0, torch.inf]), 4, qtx.ArgumentError),
        (torch.zeros(3, 0), 4, qtx.ShapeError),
        (torch.zeros(4, dtype=torch.float16), 4, qtx.DtypeError),
    ],
)
def test_bad_input_is_one_clear_error(logits, count, error):
    with pytest.raises(error):
        qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer")).draw(logits, count)


def test_bad_samplers_are_one_clear_error():
    backend = qtx.QiskitQuantumBackend("aer")
    for arguments in (("aer",), (backend, None, "zne"), (backend, "treee")):
        with pytest.raises((qtx.DtypeError, qtx.ArgumentError)):
            qtx.CircuitSampler(*arguments)
    with pytest.raises(qtx.DtypeError, match="hybrid_mode"):
        qtx.CircuitSampler(backend, hybrid_mode="yes")
    with pytest.raises(qtx.ArgumentError, match="hand in CircuitSampler"):
        qtx.sampled_attention(*qkv(), sampler="circuit", num_samples=4)
    for limits in ({"max_qubits": 0}, {"min_fidelity": 1.5}, {"min_fidelity": "a"}, {"max_pending": -1}):
        with pytest.raises(qtx.ArgumentError, match=next(iter(limits))):
            qtx.HybridPolicy(**limits)


@pytest.mark.statistical
@pytest.mark.parametrize("options", [{}, {"backend_name": "fake_fez"}])
def test_attention_from_circuits_agrees_with_exact_attention(options):
    """z-scores by 16 replicates have the variance of Student's t; a twin adds its bias."""
    q, k, v = qkv()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer", **options))
    estimate = qtx.sampled_attention(
        q, k, v, sampler=sampler, num_samples=100, is_causal=True, replicates=16, generator=seeded()
    )
    assert estimate.std_error.isfinite().all()
    z = ((estimate.output - exact) / estimate.std_error)[:, 1:]
    assert z.square().mean() < (1.8 if options else 1.4)  # 15 / 13 for t
    assert z.square().mean() > 0.7


def test_a_noisy_device_does_not_claim_to_be_unbiased():
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer", noise=NOISE), "tree")
    assert not sampler.unbiased
    assert not sampler.independent
    q, k, v = qkv()
    one = qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=50, generator=seeded())
    assert one.std_error is None
    assert one.draws.probabilities is None
    assert not qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer"), "mps").unbiased


@pytest.mark.parametrize("noise", [None, NOISE])
def test_sinks_scale_the_estimate_and_its_classical_baseline(noise):
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer", noise=noise), "tree")
    (q, k, v), sinks = qkv(), torch.tensor([0.5, 3.0])
    options = {"sampler": sampler, "num_samples": 50, "replicates": 2, "softcap": 2.0}
    alone = qtx.sampled_attention(q, k, v, generator=seeded(), **options)
    est = qtx.sampled_attention(q, k, v, generator=seeded(), sinks=sinks, **options)
    logits = 2 * torch.tanh(q @ k.mT / 8**0.5 / 2)
    log_sum_exp = torch.cat((logits, sinks[:, None, None].expand(2, 12, 1)), -1).logsumexp(-1)
    mass = (logits.logsumexp(-1) - log_sum_exp).exp()[..., None]
    assert torch.allclose(est.log_sum_exp, log_sum_exp, atol=1e-5)
    for a, b in ((est, alone), (est.info.classical, alone.info.classical)):
        assert torch.allclose(a.output, mass * b.output, atol=1e-6)
        assert torch.allclose(a.std_error, mass * b.std_error, atol=1e-6)


def test_masked_keys_are_never_drawn_and_an_all_masked_row_weighs_nothing():
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer", noise=NOISE), "tree")
    logits = torch.randn(200, 12, generator=seeded())
    logits[torch.rand(200, 12, generator=seeded()) < 0.5] = -torch.inf
    logits[7] = -torch.inf
    draws = sampler.draw(logits, 64, generator=seeded(), replicates=2)
    drawn = logits.gather(-1, draws.indices)
    assert (drawn[draws.weights > 0] > -torch.inf).all()
    assert draws.weights[7].eq(0).all()
    others = torch.arange(200) != 7
    assert torch.allclose(draws.weights[others].sum(-1), torch.ones(199))
    assert sampler.diagnostics["discarded_shots"].sum() > 0


def test_rows_that_lose_all_their_shots_are_reported():
    class Blind:
        name = "blind"

        def sample_rows(self, backend, p, shots, *, generator=None):
            zero = torch.zeros(p.shape, dtype=torch.int64)
            return qtx.RowCounts(zero, torch.full((len(p),), shots), shots)

    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer"), mitigation=Blind())
    with pytest.warns(qtx.FallbackWarning, match="All 8 shots of 2 of 2 rows were discarded"):
        draws = sampler.draw(torch.zeros(2, 4), 8, generator=seeded())
    assert draws.weights.eq(0).all()
    assert "discarded" in sampler.diagnostics["fallbacks"][0]


def test_shots_are_dealt_evenly_to_replicates():
    counts = torch.tensor([[3, 0, 4], [0, 0, 0], [1, 0, 0], [4, 2, 2]])
    keys, weights = deal(counts, 8, 2, seeded())
    dense = torch.zeros(4, 3, dtype=torch.float64).scatter_add_(-1, keys, weights)
    assert weights[1].eq(0).all()
    assert dense.sum(-1).tolist() == pytest.approx([1, 0, 1, 1])
    assert dense[2].tolist() == [1, 0, 0]
    assert torch.allclose(dense[3], torch.tensor([4, 2, 2]).double() / 8)
    valid = (weights[0].view(2, 4) > 0).sum(-1)
    assert sorted(valid.tolist()) == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classical_rows_beside_mitigated_ones_have_the_errors_of_their_known_probabilities(dtype):
    """Keys that no draw gave, and a single draw, are no certainty: the rows are known."""
    backend = qtx.QiskitQuantumBackend("aer", noise=NOISE, loader="tree")
    mitigation = CircuitMitigation()
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.94, 0.03, 0.02, 0.01], [0.0, 0.0, 0.0, 1.0]], dtype=dtype)
    for shots in (1, 10):
        sampler = qtx.CircuitSampler(backend, mitigation=mitigation, hybrid_mode=HybridPolicy(max_qubits=1))
        with pytest.warns(qtx.FallbackWarning, match="2 of 3 rows drawn classically"):
            result = sampler.measure(p, shots, generator=seeded())
        assert result.std_error[0, 0] > 0
        assert torch.allclose(result.std_error[1:], (p[1:] * (1 - p[1:]) / shots).sqrt().double())


# --- When it falls back ---------------------------------------------------------------------------


def test_a_retired_simulator_runs_offline_and_says_why(monkeypatch, tmp_path):
    """The first example of the document that started the project. The network is blocked by conftest.py."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("QISKIT_IBM_TOKEN", "QISKIT_IBM_URL", "QISKIT_IBM_INSTANCE"):
        monkeypatch.delenv(name, raising=False)
    backend = qtx.QiskitQuantumBackend(
        provider="ibm-q", backend_name="ibmq_qasm_simulator", shots=1024, optimization_level=3
    )
    q, k, v = qkv()
    sampler = qtx.CircuitSampler(backend, hybrid_mode=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate = qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=200, generator=seeded())
        qtx.sampled_attention(q, k, v, sampler=sampler, num_samples=200, generator=seeded())
    assert [w.category for w in caught] == [qtx.FallbackWarning]
    text = " ".join(sampler.diagnostics["fallbacks"])
    assert "retired" in text
    assert "account" in text
    assert sampler.diagnostics["quantum_rows"] == 0
    assert estimate.diagnostics["fallbacks"] == sampler.diagnostics["fallbacks"]
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert (estimate.output - exact).norm() / exact.norm() < 0.3
    with pytest.raises(qtx.BackendUnavailable, match="retired"):
        qtx.sampled_attention(q, k, v, sampler=qtx.CircuitSampler(backend), num_samples=8)


def test_the_policy_decides_each_row_by_itself():
    sampler = qtx.CircuitSampler(
        qtx.QiskitQuantumBackend("aer", "fake_fez"), hybrid_mode=qtx.HybridPolicy(max_qubits=2)
    )
    logits = torch.zeros(3, 20)
    logits[0, 4:] = -torch.inf  # two qubits; the others need five
    with pytest.warns(qtx.FallbackWarning, match="2 of 3 rows need more than max_qubits=2"):
        draws = sampler.draw(logits, 500, generator=seeded())
    assert sampler.diagnostics["quantum_rows"] == 1
    assert sampler.diagnostics["qubits"] == 2
    assert (draws.indices[0] < 4).all()
    assert torch.allclose(draws.dense(20)[1:], torch.full((2, 20), 0.05), atol=0.04)


def test_a_predicted_fidelity_below_the_limit_falls_back():
    backend = qtx.QiskitQuantumBackend("aer", "fake_fez", loader="tree")
    wide, narrow = predicted_fidelity(backend, 32), predicted_fidelity(backend, 4)
    assert wide < 0.9 < narrow < 1
    assert predicted_fidelity(qtx.QiskitQuantumBackend("aer"), 32) == 1
    policy = qtx.HybridPolicy(min_fidelity=0.9)
    p = torch.full((2, 32), 1 / 32)
    p[0] = 0
    p[0, :4] = 0.25
    quantum, reasons = policy.decide(backend, p)
    assert quantum.tolist() == [True, False]
    assert "predicted fidelity" in reasons[0]
    for n in (1, 2, 4, 8, 16):  # one sentence for all sizes
        p = torch.cat((p, torch.nn.functional.pad(torch.full((1, n), 1 / n), (0, 32 - n))))
    quantum, (reason,) = qtx.HybridPolicy(min_fidelity=0.999).decide(backend, p)
    assert not quantum.any()
    assert f"7 of 7 rows would be loaded with a predicted fidelity of {wide:.3f} to 0.99" in reason
    # One of many conditions is met, so that the dynamic loader does not pay for all.
    dynamic = predicted_fidelity(qtx.QiskitQuantumBackend("aer", "fake_fez"), 32)
    assert dynamic > wide


def test_a_long_queue_and_a_failure_on_the_way_fall_back(monkeypatch):
    backend = qtx.QiskitQuantumBackend("aer")
    monkeypatch.setattr(backend.engine, "pending_jobs", lambda: 12)
    quantum, reasons = qtx.HybridPolicy(max_pending=10).decide(backend, torch.full((1, 2), 0.5))
    assert not quantum.any()
    assert "12 jobs wait" in reasons[0]

    def fail(*_):
        raise qtx.BackendUnavailable("the line was cut")

    monkeypatch.setattr(backend.engine, "run", fail)
    with pytest.warns(qtx.FallbackWarning, match="the line was cut"):
        draws = qtx.CircuitSampler(backend, hybrid_mode=True).draw(torch.zeros(2, 4), 9, generator=seeded())
    assert torch.allclose(draws.weights.sum(-1), torch.ones(2))
    with pytest.raises(qtx.BackendUnavailable, match="line was cut"):
        qtx.CircuitSampler(backend).draw(torch.zeros(2, 4), 9)


def test_there_is_no_warning_where_nothing_falls_back():
    sampler = qtx.CircuitSampler(qtx.QiskitQuantumBackend("aer", "fake_fez"), hybrid_mode=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.draw(torch.zeros(2, 4), 9, generator=seeded())
    assert sampler.diagnostics["fallbacks"] == ()
    assert sampler.diagnostics["quantum_rows"] == 2
