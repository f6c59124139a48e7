"""The softmax circuit: phases make the polynomial, and the circuit makes what theory says and softmax is."""

import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev
from qiskit.quantum_info import Statevector

import qtx_lab as qtx
from qtx_lab.circuits.signal_processing import exponential_polynomial, signal, signal_phases

LIMIT = 2.0


def vectors(rows, keys, features, generator):
    """Queries and keys whose largest |logit| is `LIMIT` in each row."""
    q = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    k = torch.randn(rows, keys, features, generator=generator, dtype=torch.float64)
    logits = (k @ q[..., None]).squeeze(-1) * features**-0.5
    return q * (LIMIT / logits.abs().amax(-1, keepdim=True)), k


def measured(loader, angles, keys):
    """Probabilities (R, n) that a shot passes and gives each key, without noise."""
    circuit = loader.circuit(loader.size(keys)).remove_final_measurements(inplace=False)
    states = [Statevector(circuit.assign_parameters(a)).probabilities()[:keys] for a in angles]
    return torch.from_numpy(np.array(states))


@pytest.mark.parametrize(("alpha", "degree"), [(2.0, 3), (2.0, 12), (4.0, 7), (9.0, 12), (9.0, 30)])
def test_phases_compute_the_polynomial_of_the_exponential(alpha, degree):
    polynomial = exponential_polynomial(alpha, degree, max_logit=LIMIT, tolerance=0.01)
    x = np.linspace(-1, 1, 301)
    parts = [polynomial.part(parity) for parity in (0, 1)]
    for part in parts:
        phases = signal_phases(part)
        assert np.abs(signal(phases, x)[:, 0, 0].real - chebyshev.chebval(x, part)).max() < 1e-9
        assert np.abs(chebyshev.chebval(x, part)).max() < 1
    inside = x[np.abs(alpha * x) <= LIMIT]
    ratio = polynomial(inside) * np.exp((LIMIT - alpha * inside) / 2) / polynomial.scale
    assert np.abs(ratio - 1).max() < 0.0101
    assert polynomial.scale > np.exp((LIMIT - alpha) / 2)  # what a bound of alpha alone would give


@pytest.mark.parametrize(
    ("features", "keys", "degree", "rounds"),
    [(1, 4, 4, 0), (2, 4, 5, 1), (3, 5, 6, 0), (4, 8, 7, 0), (4, 8, 12, 0), (1, 8, 3, 2)],
)
def test_the_circuit_draws_from_softmax_and_succeeds_as_theory_says(
    features, keys, degree, rounds, generator
):
    q, k = vectors(3, keys, features, generator)
    loader = qtx.SoftmaxLoader(features, degree, rounds, LIMIT * (1 + 1e-12), 0.02)
    expected = loader.expected(q, k)
    shares = measured(loader, loader.vector_angles(q, k), keys)
    assert torch.allclose(shares, expected.probabilities * expected.amplified[:, None], atol=1e-9)
    softmax = ((k @ q[..., None]).squeeze(-1) * features**-0.5).softmax(-1)
    assert torch.allclose(expected.softmax, softmax, atol=1e-9)
    assert expected.total_variation.max() < 0.02
    partition = torch.exp((k @ q[..., None]).squeeze(-1) * features**-0.5 - LIMIT).sum(-1) / 2 ** loader.size(
        keys
    )
    assert torch.allclose(expected.success, expected.scale**2 * partition, rtol=0.05)
    assert expected.key_loads == degree * (2 * rounds + 1)


def test_best_rounds_make_success_likely_and_leave_the_distribution(generator):
    q, k = vectors(4, 4, 4, generator)
    plain = qtx.SoftmaxLoader(4, 6, tolerance=0.02).expected(q, k)
    for row, rounds in enumerate(plain.best_rounds.tolist()):
        amplified = qtx.SoftmaxLoader(4, 6, rounds, tolerance=0.02).expected(q[row, None], k[row, None])
        assert amplified.amplified > max(0.7, plain.success[row])
        assert torch.equal(amplified.probabilities, plain.probabilities[row, None])


def test_masked_keys_are_never_drawn_and_scale_may_be_negative(generator):
    q, k = vectors(2, 6, 2, generator)
    allowed = torch.rand(2, 6, generator=generator) < 0.6
    allowed[:, 0] = True
    loader = qtx.SoftmaxLoader(2, 6, tolerance=0.02)
    expected = loader.expected(q, k, scale=-0.7, allowed=allowed)
    shares = measured(loader, loader.vector_angles(q, k, scale=-0.7, allowed=allowed), 6) * allowed
    assert torch.allclose(shares, expected.probabilities * expected.success[:, None], atol=1e-9)
    logits = (-0.7 * (k @ q[..., None]).squeeze(-1)).masked_fill(~allowed, -torch.inf)
    assert torch.allclose(expected.softmax, logits.softmax(-1), atol=1e-9)


def test_rows_are_keys_of_one_component(generator):
    p = (torch.rand(3, 5, generator=generator, dtype=torch.float64) * 4).softmax(-1)
    p[1, 2] = 0
    p = p / p.sum(-1, keepdim=True)
    shares = measured(qtx.SoftmaxLoader(), qtx.SoftmaxLoader().angles(p), 5) * (p > 0)
    assert (shares / shares.sum(-1, keepdim=True) - p).abs().sum(-1).max() / 2 < 0.01
    backend = qtx.QiskitQuantumBackend("aer", loader=qtx.SoftmaxLoader())
    counts = backend.sample_rows(p, 4000, generator=generator)
    assert counts.counts[1, 2] == 0
    assert (counts.probabilities() - p).abs().sum(-1).max() / 2 < 0.06


def test_zero_and_equal_vectors_are_uniform():
    q, k = torch.zeros(1, 2), torch.ones(1, 4, 2)
    for a, b in ((q, k), (q + 1, k)):
        assert torch.allclose(
            qtx.SoftmaxLoader(2).expected(a, b).probabilities, torch.full((1, 4), 0.25, dtype=torch.float64)
        )


def test_what_cannot_be_computed_is_refused():
    q, k = torch.ones(1, 2), torch.ones(1, 4, 2)
    with pytest.raises(qtx.ArgumentError, match="degree=2 is too low"):
        qtx.SoftmaxLoader(2, 2).vector_angles(2 * q, k)
    with pytest.raises(qtx.ArgumentError, match=r"max_logit=1 is exceeded: the logits of row 0 reach 1\.414"):
        qtx.SoftmaxLoader(2, max_logit=1.0).expected(q, k)
    with pytest.raises(qtx.ArgumentError, match=r"max\|k\| is 141\.4 in row 0"):
        qtx.SoftmaxLoader(2).expected(100 * q, k)
    with pytest.raises(qtx.ShapeError, match=r"they must be \(R, 3\)"):
        qtx.SoftmaxLoader(3).expected(q, k)
    with pytest.raises(qtx.DtypeError, match="q is"):
        qtx.SoftmaxLoader(2).expected(q.long(), k)
    with pytest.raises(qtx.ArgumentError, match="k holds NaN"):
        qtx.SoftmaxLoader(2).expected(q, k * torch.nan)
    with pytest.raises(qtx.ArgumentError, match="features=2: this circuit needs queries and keys"):
        qtx.SoftmaxLoader(2).angles(torch.full((1, 4), 0.25))
    with pytest.raises(qtx.ArgumentError, match="size=7"):
        qtx.SoftmaxLoader().circuit(7)
    with pytest.raises(qtx.ArgumentError, match="degree"):
        qtx.SoftmaxLoader(degree=0)
    with pytest.raises(qtx.ArgumentError, match="that is even"):
        signal_phases(np.array([0.1, 0.2, 0.1]))
    with pytest.raises(qtx.ArgumentError, match="below 1"):
        signal_phases(np.array([0.0, 1.5]))


def test_a_row_that_allows_no_key_expects_nothing():
    q, k = torch.ones(2, 2), torch.eye(2)
    allowed = torch.tensor([[True, True], [False, False]])
    expected = qtx.SoftmaxLoader(features=2, degree=4).expected(q, k, allowed=allowed)
    for x in (expected.probabilities, expected.softmax, expected.success, expected.total_variation):
        assert x.isfinite().all()
        assert x[1].eq(0).all()
