"""Twirled, amplified and cancelled Pauli noise: averages over random Paulis, and what the planner does."""

import numpy as np
import pytest
import torch
from qiskit.quantum_info import Operator, Pauli

import qtx_lab as qtx
from qtx_lab.backends import exact
from qtx_lab.bench import mitigated_rows
from qtx_lab.bench.mitigation import synthetic_rows
from qtx_lab.mitigation.pauli import TWIRLED_GATES, TwirledEngine
from qtx_lab.mitigation.rehearsal import Rehearsal

PEC = qtx.ProbabilisticErrorCancellation
PAULI_NOISE = qtx.ParametricNoise(two_qubit=0.03, one_qubit=0.002)


def twin(name="fake_fez", **options):
    return qtx.QiskitQuantumBackend("aer", name, loader="tree", **options)


def simulator(noise=PAULI_NOISE):
    return qtx.QiskitQuantumBackend("aer", noise=noise, loader="tree")


def biases(backend, p, *options):
    rehearsal, rng = Rehearsal(backend, p), np.random.default_rng(0)
    return [rehearsal.predict(option, 1000, 2, rng).bias for option in options]


def test_signed_shots_average_to_the_row_exactly():
    """For Pauli noise gamma (P(+) - P(-)) is the row; both signs together show the amplified noise."""
    backend, p, pec = simulator(), synthetic_rows(3), PEC(readout=False)
    (signed,) = pec.outcome_probabilities(backend, p, {})
    gamma = pec.overhead(backend, 8) ** 0.5
    plus, minus = signed.view(len(p), 2, 8).unbind(1)
    assert torch.allclose(gamma * (plus - minus), p, atol=1e-12)
    assert torch.allclose(plus.sum(-1), torch.full((len(p),), (1 + 1 / gamma) / 2, dtype=p.dtype))
    once = biases(backend, p, qtx.CircuitMitigation(readout=False))[0]
    assert (plus + minus - p).abs().sum(-1).mean() / 2 > 1.5 * once


@pytest.mark.statistical
def test_the_average_is_what_circuits_with_drawn_paulis_give(generator):
    """A circuit for each shot has the same mean, to 4 standard errors, and the same variance, to 15 %."""
    backend, p = simulator(), synthetic_rows(2)[:1].expand(300, 4)
    fresh, drawn = (
        pec.sample_rows(backend, p, 150, generator=generator, rehearse=False)
        for pec in (PEC(), PEC(149, twirled=False))
    )
    error = (fresh.estimate.var(0) / 300 + drawn.estimate.var(0) / 300).sqrt()
    assert ((fresh.estimate.mean(0) - drawn.estimate.mean(0)).abs() < 4 * error).all()
    assert float(fresh.estimate.var(0).sum() / drawn.estimate.var(0).sum()) == pytest.approx(1, abs=0.15)
    assert torch.allclose(fresh.std_error.mean(0), drawn.std_error.mean(0), rtol=0.02)
    assert fresh.diagnostics["unused_shots"] == 0


def test_twirling_leaves_the_diagonal_and_amplifying_raises_it_to_a_power():
    backend = twin()
    circuit = backend.transpiled(4)
    _, noise = backend.engine.calibrated(circuit)
    _, stronger = TwirledEngine(backend.engine, 2.5).calibrated(circuit)
    assert stronger.gates.keys() == noise.gates.keys()
    for key in noise.gates:
        fidelity = noise.channel(*key).diagonal()
        channel = stronger.channel(*key)
        assert torch.allclose(channel.diagonal(), fidelity**2.5)
        rest = channel - channel.diag().diag()
        assert bool((rest == 0).all()) == (key[0] in TWIRLED_GATES)
    assert all(np.array_equal(stronger.readout[q], noise.readout[q]) for q in noise.readout)


@pytest.mark.parametrize("name", TWIRLED_GATES)
def test_the_twirled_gates_turn_paulis_into_paulis(name):
    from qiskit.circuit.library import get_standard_gate_name_mapping

    gate = Operator(get_standard_gate_name_mapping()[name])
    for label in ("IX", "XI", "ZI", "IZ", "YX"):
        turned = (gate @ Operator(Pauli(label)) @ gate.adjoint()).data
        assert any(
            np.allclose(abs(np.trace(turned @ Pauli(a + b).to_matrix())), 4) for a in "IXYZ" for b in "IXYZ"
        )


def test_what_is_left_of_the_bias_on_a_twin():
    """Relaxation is no Pauli noise: cancelling it leaves bias without twirling, and half of that at most with
    it. A model with 20 % less noise than there is leaves about a fifth of the gates' errors.
    """
    p, backend = synthetic_rows(4)[:8], twin()
    raw, readout, right, untwirled, wrong = biases(
        backend,
        p,
        qtx.CircuitMitigation(readout=False),
        qtx.CircuitMitigation(),
        PEC(),
        PEC(twirled=False),
        PEC(model=twin(noise_scale=0.8)),
    )
    assert right < untwirled / 2 < raw / 4
    assert right < raw / 20
    assert right < wrong / 2
    assert 0.1 * readout < wrong < 0.3 * readout


@pytest.mark.statistical
def test_the_planner_cancels_errors_where_shots_pay_for_it(generator):
    backend, p = twin(), synthetic_rows(4)
    planner = qtx.MitigationPlanner([PEC(), qtx.CircuitMitigation()])
    few, many = (planner.plan(backend, p, shots, generator=generator) for shots in (100, 64_000))
    assert not isinstance(few.choice.option, PEC)
    assert isinstance(many.choice.option, PEC)
    assert many.choice.error < many.raw.error / 2
    result = planner.sample_rows(backend, p, 64_000, generator=generator)
    assert result.diagnostics["error"] == pytest.approx(many.choice.error, rel=0.15)
    assert result.diagnostics["overhead"] == pytest.approx(PEC().overhead(backend, 16))
    runs = PEC().planned_runs(backend, p, 1000)
    assert sum(run.shots * run.rows for run in runs if run.purpose == "error cancellation") == 24_000


@pytest.mark.statistical
def test_the_benchmark_has_error_cancellation_beside_raw_counts(monkeypatch, capsys):
    monkeypatch.setattr(mitigated_rows, "ROWS", 4)
    monkeypatch.setattr(mitigated_rows, "REPEATS", 4)
    monkeypatch.setattr(
        mitigated_rows, "options_for", lambda n: (qtx.CircuitMitigation(readout=False), PEC())
    )
    rows = mitigated_rows.compare_at_equal_shots("fake_fez", 4, (64_000,))
    assert [row.method for row in rows] == ["raw", "readout, pec", "planner"]
    assert rows[0].passed
    assert rows[2].passed, rows[2].check
    assert rows[1].details["coverage"] > 0.88  # of 256 keys; 95 % with a standard error of 1.4 %
    assert rows[2].details["choice"] == "readout, pec"
    assert rows[0].details["limited by noise"]
    assert rows[1].details["raw ratio"] < 0.5
    mitigated_rows.print_case(rows)
    mitigated_rows.print_verdict(rows)
    printed = capsys.readouterr().out
    assert "gamma² = 1.3" in printed
    assert "where raw counts are limited by noise (1 cases)" in printed


def test_what_cannot_be_cancelled_or_amplified_is_refused(generator, monkeypatch):
    with pytest.raises(qtx.ArgumentError, match="no folding goes below it"):
        qtx.CircuitMitigation(qtx.ZeroNoiseExtrapolation([0.5, 1]), scaling="pauli")
    with pytest.raises(qtx.DtypeError, match="twirled"):
        PEC(twirled=1)
    with pytest.raises(qtx.DtypeError, match="model"):
        PEC(model="fake_fez")
    with pytest.raises(qtx.DtypeError, match="ProbabilisticErrorCancellation only"):
        qtx.MitigationPlanner([3])
    monkeypatch.setattr(exact, "MAX_STATE_NUMBERS", 4**2)  # three qubits at a time are too many
    large = synthetic_rows(3)
    with pytest.raises(qtx.BackendUnavailable, match="too large"):
        PEC().sample_rows(simulator(), large, 10, generator=generator, rehearse=False)
    amplified = qtx.CircuitMitigation(qtx.ZeroNoiseExtrapolation([1, 2]), scaling="pauli")
    with pytest.raises(qtx.BackendUnavailable, match="too many for the average"):
        amplified.sample_rows(simulator(), large, 10, generator=generator, rehearse=False)
