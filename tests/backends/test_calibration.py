"""A device that is calibrated anew while a session goes on: what is read again, made again and told."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
from qiskit_aer import AerSimulator
from qiskit_aer.noise import NoiseModel, ReadoutError

import qtx_lab as qtx
from qtx_lab.backends import predicted_fidelity
from qtx_lab.backends.ibm import engine as ibm_engine
from qtx_lab.backends.noise import fake_device
from qtx_lab.circuits.fidelity import total_variation_distance
from qtx_lab.mitigation import readout
from qtx_lab.mitigation.readout import estimate_register
from qtx_lab.mitigation.register import register_probabilities

pytestmark = pytest.mark.hardware

FIRST, SECOND = "2026-11-27T08:00:00+00:00", "2026-11-27T09:30:00+00:00"
NAME = "ibm_lagos"


def calibrate(server: Any, error: float, time: str) -> None:
    """Give the server's device a readout error, in its calibration and in what its jobs measure."""
    configuration, properties = server.devices[NAME]
    properties = {**json.loads(json.dumps(properties)), "last_update_date": time}
    for value in (value for qubit in properties["qubits"] for value in qubit):
        if value["name"] in ("readout_error", "prob_meas0_prep1", "prob_meas1_prep0"):
            value["value"] = error
    server.devices[NAME] = (configuration, properties)
    noise = NoiseModel(basis_gates=["cx", "id", "rz", "sx", "x", "if_else"])
    noise.add_all_qubit_readout_error(ReadoutError([[1 - error, error], [error, 1 - error]]))
    server._simulator = lambda name: AerSimulator(noise_model=noise)


@pytest.fixture
def device(ibm: Any, cloud: Any) -> Iterator[Any]:
    """A server whose device misreads 2 % of the bits."""
    with ibm.IBMServer(("lagos",)) as server, ibm.environment(server.environment()):
        calibrate(server, 0.02, FIRST)
        yield server


def rows(n: int = 8) -> torch.Tensor:
    p = torch.rand(1, n, generator=torch.Generator().manual_seed(3)).double().square() + 0.01
    return p / p.sum(-1, keepdim=True)


def test_readout_that_drifts_twofold_is_noticed_told_and_corrected(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20,000 shots: the total variation of 4 keys has a mean of .005 without any bias."""
    monkeypatch.setattr(readout, "CALIBRATION_SHOTS", 10_000)
    backend = qtx.QiskitQuantumBackend("ibm", NAME, optimization_level=1, confirm=True)
    mitigation, p = qtx.CircuitMitigation(readout=True), rows(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", qtx.CalibrationWarning)
        first = mitigation.sample_rows(backend, p, 20_000)
    before = predicted_fidelity(backend, 4), readout.calibrated_readout_errors(backend, 4)
    assert total_variation_distance(first.probabilities(), p).max() < 0.01

    calibrate(device, 0.04, SECOND)
    with pytest.warns(qtx.CalibrationWarning, match=r"readout error went from 2\.00% to 4\.00%"):
        second = mitigation.sample_rows(backend, p, 20_000)
    assert total_variation_distance(second.probabilities(), p).max() < 0.01
    stale = mitigated_with_errors(second, first)
    assert total_variation_distance(stale, p).max() > 0.01  # what the first correction would have left

    facts = backend.engine.facts()
    assert datetime.fromisoformat(facts["calibration"]) == datetime.fromisoformat(SECOND)
    assert "2.00% to 4.00%" in facts["recalibrations"][0]
    after = predicted_fidelity(backend, 4), readout.calibrated_readout_errors(backend, 4)
    assert after[0] < before[0]
    assert (after[1][:, 0, 1] - 0.04).abs().max() < 1e-9
    assert (readout.readout_errors(backend, 4)[:, 0, 1] - 0.04).abs().max() < 0.01


def mitigated_with_errors(second: Any, first: Any) -> torch.Tensor:
    """The rows that the second measurement gives with the readout errors of the first."""
    errors = torch.tensor([[0.98, 0.02], [0.02, 0.98]]).double().expand(2, 2, 2)
    return estimate_register(second.counts, errors, feeds_forward=True).value


def test_a_calibration_is_read_again_after_an_hour_and_before_each_submission(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = f"GET /backends/{NAME}/properties"
    backend = qtx.QiskitQuantumBackend("ibm", NAME, loader="tree", optimization_level=1)
    first = backend.transpiled(4)
    read = device.requests.count(reading)
    assert backend.transpiled(4) is first
    assert device.requests.count(reading) == read  # it was read a moment ago
    backend.sample_rows(rows(4), 10)
    assert device.requests.count(reading) == read + 1

    calibrate(device, 0.04, SECOND)
    assert backend.transpiled(4) is first
    read_at = backend.engine.facts()["calibration_read"]
    monkeypatch.setattr(backend.engine._device, "_read_at", datetime.now(UTC) - timedelta(hours=1, seconds=1))
    with pytest.warns(qtx.CalibrationWarning):
        second = backend.transpiled(4)
    assert second is not first
    assert backend.engine.facts()["calibration_read"] >= read_at

    calibrate(device, 0.03, FIRST)  # an earlier one counts as another
    with pytest.warns(qtx.CalibrationWarning):
        result = backend.sample_rows(rows(4), 10)
    assert len(result.diagnostics["recalibrations"]) == 2
    assert datetime.fromisoformat(result.diagnostics["calibration"]) == datetime.fromisoformat(FIRST)
    assert ibm_engine.MAX_CALIBRATION_AGE_S == 3600


def test_nothing_is_sent_where_the_calibration_cannot_be_read(ibm: Any, device: Any) -> None:
    backend = qtx.QiskitQuantumBackend("ibm", NAME, loader="tree", optimization_level=1)
    backend.transpiled(4)
    device.faults = [ibm.Fault(f"GET /backends/{NAME}/properties", 503, times=99)]
    with pytest.raises(qtx.BackendUnavailable, match="calibration"):
        backend.sample_rows(rows(4), 10)
    assert device.posts() == 0
    sampler = qtx.CircuitSampler(backend, hybrid_mode=True)
    with pytest.warns(qtx.FallbackWarning, match="calibration"):
        sampler.measure(rows(4), 10)
    device.faults = []
    assert int(backend.sample_rows(rows(4), 10).counts.sum()) == 10


@pytest.mark.parametrize("keys", [16, 32])
def test_dynamic_rows_under_drifted_readout_are_corrected_exactly(keys: int) -> None:
    """On a twin whose readout errors have doubled, by probabilities in place of shots."""
    properties = json.loads(json.dumps(fake_device("fake_fez").properties().to_dict(), default=str))
    for value in (value for qubit in properties["qubits"] for value in qubit):
        if value["name"] in ("readout_error", "prob_meas0_prep1", "prob_meas1_prep0"):
            value["value"] = min(1.0, 2 * value["value"])
    fresh = qtx.QiskitQuantumBackend("aer", noise=properties)
    p = rows(keys)
    drifted = register_probabilities(fresh, p)
    errors = readout.calibrated_readout_errors(fresh, keys)
    corrected = estimate_register(drifted * 1e9, errors, feeds_forward=True).value
    assert total_variation_distance(corrected, p).max() < 0.01
