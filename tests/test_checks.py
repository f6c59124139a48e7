"""Numbers of Python, NumPy and torch are numbers in every public argument that is one; True is none."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from qiskit_aer.noise import NoiseModel

import qtx_lab as qtx
from qtx_lab import attention, backends, circuits, controls, mitigation, samplers
from qtx_lab import cache as cache_room
from qtx_lab.checks import MAX_COUNT, check_count, check_number
from qtx_lab.circuits import fidelity, overlaps
from qtx_lab.experiments.search import search
from qtx_lab.experiments.training_run import train_run
from qtx_lab.models.reference import bits_per_byte
from qtx_lab.training.reference_training import train_reference
from qtx_lab.widgets.views.stream import MetricStream

WHOLE = (np.int64, np.int32, np.uint8, np.array, torch.tensor)
REAL = (np.float32, np.float64, np.array, torch.tensor, Fraction, Decimal)
NO_NUMBERS = (True, np.True_, torch.tensor(True), "2", 2j, torch.ones(2), np.ones(2), [2], object())


def test_a_count_is_python_s_own_whole_number():
    for number in (3, *(make(3) for make in WHOLE), torch.tensor(3, dtype=torch.uint8)):
        count = check_count("shots", number)
        assert (count, type(count)) == (3, int)
    for number in (*NO_NUMBERS, 3.0, np.float64(3), torch.tensor(3.0), None, math.nan):
        with pytest.raises(qtx.NumberError, match=r"shots=.* it must be a whole number from 1 to"):
            check_count("shots", number)
    for number in (0, -1, MAX_COUNT + 1, torch.tensor(0), np.int64(-3), 10**400):
        with pytest.raises(qtx.ArgumentError, match=r"shots=.* it must be a whole number from 1 to"):
            check_count("shots", number)
    assert check_count("steps", np.uint8(0), 0) == 0


def test_a_number_is_python_s_own_float():
    reals = [make(0.25) for make in REAL] + [torch.tensor(0.25, dtype=torch.float16)]
    for number in (0.25, *reals):
        value = check_number("level", number, above=0, below=1)
        assert (value, type(value)) == (0.25, float)
    for number in (2, *(make(2) for make in WHOLE)):
        assert check_number("level", number) == 2.0
    for number in (*NO_NUMBERS, None, torch.tensor(1j)):
        with pytest.raises(qtx.NumberError, match=r"level=.* it must be a (single )?number between 0"):
            check_number("level", number, above=0, below=1)
    for number in (math.nan, -math.inf, np.float32("inf"), torch.tensor(math.nan), 10**400):
        with pytest.raises(qtx.ArgumentError, match=r"level=.* it must be a finite number\."):
            check_number("level", number)


@pytest.mark.parametrize(
    ("bounds", "words", "wrong"),
    [
        ({"least": 0, "most": 1}, "a number from 0 to 1", (-1e-9, 1.1)),
        ({"above": 0}, "a number above 0", (0, -1)),
        ({"least": 1}, "a number >= 1", (0.9,)),
        ({"above": 0, "most": 1}, "a number above 0 and <= 1", (0, 1.1)),
        ({"least": 0.5, "below": 1}, "a number >= 0.5 and below 1", (0.4, 1)),
        ({"below": 2}, "a number below 2", (2,)),
    ],
)
def test_bounds_are_said_in_words(bounds, words, wrong):
    for number in wrong:
        with pytest.raises(qtx.ArgumentError, match=f"it must be {words}\\."):
            check_number("x", number, **bounds)


def test_a_gradient_through_a_number_is_refused():
    with pytest.raises(qtx.ArgumentError, match="scale requires a gradient"):
        check_number("scale", torch.tensor(1.0, requires_grad=True))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        with pytest.raises(qtx.ArgumentError, match="scale requires a gradient"):
            check_number("scale", dual)


# --- Every public argument ------------------------------------------------------------------------------

G = torch.Generator
Q, K, V = (torch.randn(3, 8, 4, generator=G().manual_seed(i)) for i in range(3))
LOGITS = torch.zeros(2, 8)
P = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
COUNTS = torch.tensor([[2, 1, 1, 0]])
NOISY = qtx.QiskitQuantumBackend("aer", noise=qtx.ParametricNoise(readout=0.01), shots=8)
PLANNER = qtx.MitigationPlanner([qtx.CircuitMitigation()])
IDEAL = qtx.QiskitQuantumBackend("aer", shots=8)


def attend(**options: Any) -> Any:
    return qtx.sampled_attention(Q, K, V, generator=G().manual_seed(0), **options).output


def draw(sampler: Any, **options: Any) -> Any:
    return sampler.draw(LOGITS, **{"num_samples": 4, "generator": G().manual_seed(0), **options}).indices


def cache(**options: Any) -> qtx.SampledKVCache:
    return qtx.SampledKVCache.build(K, V, **options)


def cached(**options: Any) -> Any:
    return cache().attend(Q, **{"num_samples": 4, "generator": G().manual_seed(0), **options}).output


def promised(**options: Any) -> Any:
    return cache(proposal="int8").attend(Q, generator=G().manual_seed(0), **options).output


def amplitude_interval(confidence: Any) -> Any:
    estimator = qtx.AmplitudeEstimator(IDEAL)
    return estimator.estimate(P, V[0, :4], 64, confidence=confidence, generator=G().manual_seed(0)).lower


TWICE = qtx.QiskitQuantumBackend("aer", loader=circuits.DynamicLoader(reads=2), shots=8)


def flipped(shots: Any) -> Any:
    return mitigation.RandomFlips(2).sample_rows(TWICE, P, shots, generator=G().manual_seed(0)).counts


def boundary(**options: Any) -> Any:
    return mitigation.zne_boundary(ZNE([1, 3]), **{"slope": 1.0, "variance": 1.0, **options})


def fitted(**options: Any) -> Any:
    sampler = qtx.LearnedImportanceSampler()
    options = {"steps": 1, "generator": None if "seed" in options else G().manual_seed(0), **options}
    return sampler.fit(Q, K, progress=False, **options).objective


def learned(**options: Any) -> Any:
    options = {"num_samples": 4, "generator": G().manual_seed(0), **options}
    return qtx.LearnedImportanceSampler().estimate(Q, K, V, **options).output


def window(value: Any) -> Any:
    model = qtx.load_reference_model()
    return bits_per_byte(model, torch.arange(9), window=value)


def estimate() -> qtx.AttentionEstimate:
    return qtx.sampled_attention(Q, K, V, num_samples=4, replicates=2, generator=G().manual_seed(0))


def zero_noise() -> mitigation.ZeroNoiseEstimate:
    return mitigation.ZeroNoiseEstimate(torch.zeros(1), torch.ones(1), torch.ones(1), (), 3.0)


def thermal(**options: Any) -> backends.ThermalNoise:
    given = {"t1": 1.0, "t2": 1.0, "one_qubit_time": 0.0, "two_qubit_time": 0.0, **options}
    return backends.ThermalNoise(**given)


def ibm(**options: Any) -> Any:
    return qtx.QiskitQuantumBackend("ibm", "ibm_fez", **options).engine


def crop(length: Any) -> int:
    filled = cache()
    filled.crop(length)
    return len(filled)


ZNE = qtx.ZeroNoiseExtrapolation
COUNT_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "AmplitudeEstimator.plan(loads)": (
        lambda x: qtx.AmplitudeEstimator(IDEAL).plan(P, V[0, :4], x).shots,
        64,
    ),
    "AmplitudeEstimator.plan(most_iterates)": (
        lambda x: qtx.AmplitudeEstimator(IDEAL).plan(P, V[0, :4], 64, most_iterates=x).shots,
        4,
    ),
    "DynamicLoader(reads)": (lambda x: circuits.DynamicLoader(reads=x).reads, 2),
    "RandomFlips(instances)": (lambda x: mitigation.RandomFlips(x).instances, 4),
    "RandomFlips.sample_rows(shots)": (flipped, 8),
    "RandomFlips.planned_runs(shots)": (
        lambda x: mitigation.RandomFlips(2).planned_runs(TWICE, P, x)[0].shots,
        8,
    ),
    "CircuitMitigation.allocate(shots)": (lambda x: qtx.CircuitMitigation(ZNE([1, 3])).allocate(x), 8),
    "CircuitSampler.draw(num_samples)": (lambda x: draw(qtx.CircuitSampler(IDEAL), num_samples=x), 3),
    "CircuitSampler.draw(replicates)": (lambda x: draw(qtx.CircuitSampler(IDEAL), replicates=x), 2),
    "ExactSampler.draw(num_samples)": (lambda x: draw(qtx.ExactSampler(), num_samples=x), 3),
    "ExactSampler.draw(replicates)": (lambda x: draw(qtx.ExactSampler(), replicates=x), 2),
    "HeadTailSampler(head)": (lambda x: draw(qtx.HeadTailSampler(x)), 2),
    "HeadTailSampler.draw(num_samples)": (lambda x: draw(qtx.HeadTailSampler(), num_samples=x), 3),
    "HeadTailSampler.draw(replicates)": (lambda x: draw(qtx.HeadTailSampler(), replicates=x), 2),
    "HybridPolicy(max_pending)": (lambda x: qtx.HybridPolicy(max_pending=x), 3),
    "HybridPolicy(max_qubits)": (lambda x: qtx.HybridPolicy(max_qubits=x), 3),
    "LearnedImportanceSampler(embed_dim)": (lambda x: qtx.LearnedImportanceSampler(x).query_map, 4),
    "LearnedImportanceSampler(num_heads)": (lambda x: qtx.LearnedImportanceSampler(4, 2, x).query_map, 2),
    "LearnedImportanceSampler(rank)": (lambda x: qtx.LearnedImportanceSampler(4, x).query_map, 2),
    "LearnedImportanceSampler.estimate(num_samples)": (lambda x: learned(num_samples=x), 3),
    "LearnedImportanceSampler.estimate(replicates)": (lambda x: learned(replicates=x), 2),
    "LearnedImportanceSampler.fit(batch_rows)": (lambda x: fitted(batch_rows=x), 4),
    "LearnedImportanceSampler.fit(num_samples)": (lambda x: fitted(num_samples=x), 4),
    "LearnedImportanceSampler.fit(seed)": (lambda x: fitted(seed=x), 4),
    "LearnedImportanceSampler.fit(steps)": (lambda x: fitted(steps=x), 2),
    "LinformerControl(landmarks)": (lambda x: attend(control_variate=controls.LinformerControl(x)), 2),
    "MetricStream(capacity)": (lambda x: MetricStream(capacity=x)._blocks.maxlen, 512),
    "MitigationPlanner.plan(shots)": (lambda x: PLANNER.plan(NOISY, P, x).shots, 8),
    "MpsLoader(layers)": (qtx.MpsLoader, 3),
    "MpsLoader.for_fidelity(max_layers)": (lambda x: qtx.MpsLoader.for_fidelity(P, 0.9, x), 3),
    "PerformerControl(features)": (lambda x: attend(control_variate=controls.PerformerControl(x)), 4),
    "ProbabilisticErrorCancellation(instances)": (
        lambda x: qtx.ProbabilisticErrorCancellation(x).instances,
        3,
    ),
    "QiskitQuantumBackend(optimization_level)": (
        lambda x: qtx.QiskitQuantumBackend("aer", optimization_level=x).optimization_level,
        2,
    ),
    "QiskitQuantumBackend(shots)": (lambda x: qtx.QiskitQuantumBackend("aer", shots=x).shots, 7),
    "QiskitQuantumBackend.sample_rows(shots)": (lambda x: IDEAL.sample_rows(P, x).counts.sum(), 7),
    "QiskitQuantumBackend.transpiled(n)": (lambda x: IDEAL.transpiled(x).num_qubits, 4),
    "QuantumMultiheadAttention(num_samples)": (
        lambda x: qtx.QuantumMultiheadAttention(4, 1, num_samples=x).settings["num_samples"],
        3,
    ),
    "QuantumMultiheadAttention(replicates)": (
        lambda x: qtx.QuantumMultiheadAttention(4, 1, replicates=x).settings["replicates"],
        3,
    ),
    "QuantumTrainer(num_gpus)": (lambda x: qtx.QuantumTrainer(num_gpus=x, distributed=True).num_gpus, 2),
    "QuantumTrainer(retries)": (lambda x: qtx.QuantumTrainer(retries=x).retries, 2),
    "QuantumTrainer(steps)": (lambda x: qtx.QuantumTrainer(steps=x).spec, 2),
    "SampledKVCache.attend(num_samples)": (lambda x: cached(num_samples=x), 3),
    "SampledKVCache.attend(replicates)": (lambda x: cached(replicates=x), 3),
    "SampledKVCache.build(rank)": (lambda x: cache(proposal="low-rank", rank=x).attend(Q, 4).output.shape, 2),
    "SampledKVCache.crop(length)": (crop, 3),
    "SoftmaxLoader(degree)": (lambda x: circuits.SoftmaxLoader(degree=x).name, 4),
    "SoftmaxLoader(features)": (lambda x: circuits.SoftmaxLoader(features=x).name, 2),
    "SoftmaxLoader(rounds)": (lambda x: circuits.SoftmaxLoader(rounds=x).name, 1),
    "SantaSampler(tile)": (lambda x: attend(sampler=samplers.SantaSampler(tile=x)), 4),
    "SharedDecay.allocate(shots)": (lambda x: qtx.SharedDecay([1, 3]).allocate(x), 9),
    "TopKControl(keys)": (lambda x: attend(control_variate=controls.TopKControl(x)), 4),
    "ZeroNoiseExtrapolation(degree)": (lambda x: ZNE([1, 2, 3, 4], "polynomial", degree=x).weights, 2),
    "ZeroNoiseExtrapolation.allocate(shots)": (lambda x: ZNE([1, 3]).allocate(x), 9),
    "bits_per_byte(window)": (window, 4),
    "gpu_quantum_attention(num_samples)": (
        lambda x: qtx.gpu_quantum_attention(Q, K, V, num_samples=x, generator=G().manual_seed(0)),
        4,
    ),
    "gpu_quantum_attention(replicates)": (
        lambda x: qtx.gpu_quantum_attention(Q, K, V, replicates=x, generator=G().manual_seed(0)),
        2,
    ),
    "hadamard_test(shots)": (
        lambda x: overlaps.hadamard_test(Q, K, x, generator=G().manual_seed(0)).value,
        9,
    ),
    "readout_errors(n)": (lambda x: mitigation.readout_errors(IDEAL, x), 4),
    "readout_errors(seed)": (lambda x: mitigation.readout_errors(IDEAL, 4, seed=x), 4),
    "sampled_attention(num_samples)": (lambda x: attend(num_samples=x), 4),
    "sampled_attention(replicates)": (lambda x: attend(replicates=x), 3),
    "sampled_attention(window)": (lambda x: attend(window=(x, None)), 3),
    "state_fidelity(shots)": (
        lambda x: fidelity.state_fidelity(torch.eye(4, dtype=torch.cdouble)[None] / 4, P, shots=x).std_error,
        4,
    ),
    "swap_test(shots)": (lambda x: overlaps.swap_test(Q, K, x, generator=G().manual_seed(0)).value, 9),
    "total_variation(resamples)": (
        lambda x: fidelity.total_variation(COUNTS, P, resamples=x, generator=G().manual_seed(0)).floor,
        4,
    ),
}
"""From each argument that is a whole number to what uses it, and a value that is allowed."""

NUMBER_ARGUMENTS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "AttentionEstimate.confidence_interval(level)": (lambda x: estimate().confidence_interval(x)[0], 0.5),
    "HelpBoundary(bias_power)": (lambda x: mitigation.HelpBoundary(1.0, 1.0, x), 0.5),
    "HelpBoundary(improvement)": (lambda x: mitigation.HelpBoundary(x, 1.0), 0.5),
    "HelpBoundary(penalty)": (lambda x: mitigation.HelpBoundary(1.0, x), 0.5),
    "HelpBoundary(variance_power)": (lambda x: mitigation.HelpBoundary(1.0, 1.0, 1.0, x), 0.5),
    "HelpBoundary.gain(noise)": (lambda x: mitigation.HelpBoundary(1.0, 1.0).gain(x, 8), 0.5),
    "HelpBoundary.gain(shots)": (lambda x: mitigation.HelpBoundary(1.0, 1.0).gain(0.5, x), 0.5),
    "HelpBoundary.shots(noise)": (lambda x: mitigation.HelpBoundary(1.0, 1.0).shots(x), 0.5),
    "zne_boundary(slope)": (lambda x: boundary(slope=x), 0.5),
    "zne_boundary(variance)": (lambda x: boundary(variance=x), 0.5),
    "zne_boundary(variance_power)": (lambda x: boundary(variance_power=x), 0.5),
    "HybridPolicy(min_fidelity)": (lambda x: qtx.HybridPolicy(min_fidelity=x), 0.5),
    "LearnedImportanceSampler(defensive)": (
        lambda x: qtx.LearnedImportanceSampler(defensive=x).defensive,
        0.5,
    ),
    "LearnedImportanceSampler.estimate(scale)": (lambda x: learned(scale=x), 0.5),
    "LearnedImportanceSampler.fit(lr)": (lambda x: fitted(lr=x), 0.5),
    "LearnedImportanceSampler.fit(scale)": (lambda x: fitted(scale=x), 0.5),
    "MpsLoader.for_fidelity(fidelity)": (lambda x: qtx.MpsLoader.for_fidelity(P, x), 0.5),
    "ParametricNoise(amplitude_damping)": (lambda x: qtx.ParametricNoise(amplitude_damping=x), 0.5),
    "ParametricNoise(one_qubit)": (lambda x: qtx.ParametricNoise(one_qubit=x), 0.5),
    "ParametricNoise(phase_damping)": (lambda x: qtx.ParametricNoise(phase_damping=x), 0.5),
    "ParametricNoise(readout)": (lambda x: qtx.ParametricNoise(readout=x), 0.5),
    "ParametricNoise(two_qubit)": (lambda x: qtx.ParametricNoise(two_qubit=x), 0.5),
    "ParametricNoise.scaled(factor)": (lambda x: qtx.ParametricNoise(0.1).scaled(x), 0.5),
    "QiskitQuantumBackend(max_quantum_seconds)": (
        lambda x: (
            qtx.QiskitQuantumBackend(
                "ibm", "ibm_fez", max_quantum_seconds=x
            ).engine._guard.max_quantum_seconds
        ),
        0.5,
    ),
    "QiskitQuantumBackend(noise_scale)": (
        lambda x: qtx.QiskitQuantumBackend("aer", "fake_fez", noise_scale=x).engine.noise_scale,
        0.5,
    ),
    "QuantumTrainer(learning_rate)": (lambda x: qtx.QuantumTrainer(learning_rate=x).spec, 0.5),
    "SampledKVCache.attend(scale)": (lambda x: cached(scale=x), 0.5),
    "AmplitudeEstimator.fit(confidence)": (amplitude_interval, 0.5),
    "SampledKVCache.attend(confidence)": (lambda x: promised(tolerance=0.5, confidence=x), 0.5),
    "SampledKVCache.attend(tolerance)": (lambda x: promised(tolerance=x), 0.5),
    "SampledKVCache.attend_exactly(scale)": (lambda x: cache().attend_exactly(Q, scale=x), 0.5),
    "SampledKVCache.attend_exactly(softcap)": (lambda x: cache().attend_exactly(Q, softcap=x), 0.5),
    "SoftmaxLoader(max_logit)": (lambda x: circuits.SoftmaxLoader(max_logit=x).name, 0.5),
    "SoftmaxLoader(tolerance)": (lambda x: circuits.SoftmaxLoader(tolerance=x).name, 0.5),
    "SampledKVCache.attend(softcap)": (lambda x: cached(softcap=x), 0.5),
    "SampledKVCache.build(defensive)": (lambda x: cache(defensive=x).attend(Q, 4).output.shape, 0.5),
    "SampledKVCache.scores(scale)": (lambda x: cache().scores(Q, x), 0.5),
    "VAttentionSampler(heavy)": (lambda x: attend(sampler=samplers.VAttentionSampler(heavy=x)), 0.5),
    "VAttentionSampler(local)": (lambda x: attend(sampler=samplers.VAttentionSampler(local=x)), 0.25),
    "VAttentionSampler(sink)": (lambda x: attend(sampler=samplers.VAttentionSampler(sink=x)), 0.25),
    "AerModelNoise(scale)": (lambda x: backends.AerModelNoise(NoiseModel(), scale=x), 0.5),
    "AerModelNoise.scaled(factor)": (lambda x: backends.AerModelNoise(NoiseModel()).scaled(x), 0.5),
    "DeviceNoise.scaled(factor)": (lambda x: backends.DeviceNoise.of_twin("fake_lima").scaled(x), 0.5),
    "ThermalNoise(one_qubit_time)": (lambda x: thermal(one_qubit_time=x), 0.5),
    "ThermalNoise(readout)": (lambda x: thermal(readout=x), 0.5),
    "ThermalNoise(readout_time)": (lambda x: thermal(readout_time=x), 0.5),
    "ThermalNoise(t1)": (lambda x: thermal(t1=x), 0.5),
    "ThermalNoise(t2)": (lambda x: thermal(t2=x), 0.5),
    "ThermalNoise(two_qubit_time)": (lambda x: thermal(two_qubit_time=x), 0.5),
    "ThermalNoise.scaled(factor)": (lambda x: thermal().scaled(x), 0.5),
    "QiskitQuantumBackend(feed_forward_latency)": (
        lambda x: (
            qtx.QiskitQuantumBackend("aer", "fake_lima", feed_forward_latency=x).engine.feed_forward_latency
        ),
        0.5,
    ),
    "ZeroNoiseEstimate.confidence_interval(level)": (lambda x: zero_noise().confidence_interval(x)[0], 0.5),
    "ZeroNoiseExtrapolation(asymptote)": (lambda x: ZNE([1, 2], "exponential", asymptote=x).asymptote, 0.5),
    "fold(level)": (lambda x: qtx.fold(qtx.TreeLoader().circuit(2), x).count_ops(), 2.5),
    "gpu_quantum_attention(scale)": (
        lambda x: qtx.gpu_quantum_attention(Q, K, V, scale=x, generator=G().manual_seed(0)),
        0.5,
    ),
    "swap_test(scale)": (
        lambda x: overlaps.swap_test(Q, K, 9, scale=x, generator=G().manual_seed(0)).logits,
        0.5,
    ),
    "hadamard_test(scale)": (
        lambda x: overlaps.hadamard_test(Q, K, 9, scale=x, generator=G().manual_seed(0)).logits,
        0.5,
    ),
    "scale_noise(level)": (lambda x: mitigation.scale_noise(NOISY, x, "model").engine.noise_scale, 2.5),
    "sampled_attention(confidence)": (lambda x: attend(tolerance=0.5, confidence=x), 0.5),
    "sampled_attention(scale)": (lambda x: attend(scale=x), 0.5),
    "sampled_attention(softcap)": (lambda x: attend(softcap=x), 0.5),
    "sampled_attention(tolerance)": (lambda x: attend(tolerance=x), 0.5),
}
"""The same for arguments that are real numbers."""

ELSEWHERE = {
    "Sampler.draw": "the samplers check by `check_draw_arguments`, of which the table has three",
    "best_qubits": "called by the lab, with the size of a circuit",
    "circuit": "called by the lab, with the size of checked rows",
    "noise": "called by the lab, with the size of a circuit",
    "target": "called by the lab, with the size of a circuit",
    "keys": "called by the lab, with the size of checked rows",
    "prepare": "called by `sampled_attention`, with numbers that it checked",
    "signs": "called by the lab, with the size of checked rows",
    "size": "called by the lab, with the size of checked rows",
    "draw_from": "called with numbers that `draw` or `sampled_attention` checked",
    "CircuitSampler.measure": "as `QiskitQuantumBackend.sample_rows`, which checks",
    "LearnedImportanceSampler": "its other methods check by the same lines as `estimate`",
    "MitigationPlanner.sample_rows": "checks as `plan`",
    "MitigationPlanner.planned_runs": "called by the lab, with shots that it checked",
    "MitigatedCall.counts": "waits by `DeviceJob.outcomes`, with the same arguments",
    "ProbabilisticErrorCancellation": "its other methods check by `QiskitQuantumBackend.transpiled`",
    "CircuitMitigation": "its other methods check by `QiskitQuantumBackend.sample_rows` and `transpiled`",
    "QiskitQuantumBackend": "its other methods check by the same lines as `sample_rows`",
    "QuantumMultiheadAttention": "its other arguments are those of torch's module, which checks them",
    "hellinger_": "checks as `total_variation`",
    "SystematicSampler": "draws as `HeadTailSampler` does",
    "AmplitudeEstimator.estimate": "checks by `plan` and `fit`",
    "AmplitudeEstimator.expected_decay": "called by the lab, with the size of checked rows",
    "SoftmaxCircuitSampler": "checks by `SoftmaxLoader`; draws as `CircuitSampler` does",
    "SoftmaxLoader.": "called with numbers that the loader or `swap_test` checked",
    "StratifiedSampler": "draws as `HeadTailSampler` does",
    "QuasiMonteCarloSampler": "draws as `HeadTailSampler` does",
    "MonteCarloSampler": "draws as `HeadTailSampler` does",
    "InversionSampler": "draws as `HeadTailSampler` does",
    "SantaSampler.draw": "draws as `HeadTailSampler` does",
    "TopKSampler.draw": "draws as `HeadTailSampler` does",
    "VAttentionSampler.draw": "draws as `HeadTailSampler` does",
    "StreamSampler.draw": "draws as `HeadTailSampler` does",
    "HeadTailSampler.": "called with numbers that `draw` checked",
    "SimulatorNoise.": "called by the lab, with the size of a circuit",
    "ParametricNoise.": "called by the lab, with the size of a circuit",
    "predicted_fidelity": "checks by `QiskitQuantumBackend.transpiled`",
    "MultilevelControlVariate": "checks by `AttentionProblem.of`, as `sampled_attention`",
    "ZeroNoiseInference": "abstract",
    "Folds": "made by the lab",
    "regress": "called by the lab",
    "Prepared": "called by the lab",
}
"""Public functions whose numbers the tables leave out, by how their names begin or end, and why."""


ROOMS = (attention, backends, cache_room, circuits, controls, fidelity, mitigation, overlaps, samplers)
"""Where numbers are taken and no spec checks them."""


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions, classes and methods that the package and its rooms offer, by name."""
    for room in ROOMS:
        names = [x for x in vars(room).get("__all__", vars(room)) if not x.startswith("_")]
        for name, thing in ((name, getattr(room, name)) for name in names):
            if not inspect.isfunction(thing) and not inspect.isclass(thing):
                continue
            if not thing.__module__.startswith(room.__name__):
                continue
            if inspect.isfunction(thing):
                yield name, thing
            elif not issubclass(thing, Exception):
                # A dataclass that checks nothing is a result, which the lab makes.
                if not dataclasses.is_dataclass(thing) or "__post_init__" in vars(thing):
                    yield name, thing
                ours = [x for x in thing.__mro__ if x.__module__.startswith("qtx_lab")]
                methods = {x for c in ours for x in vars(c) if not x.startswith("_")}
                for method in methods:
                    if callable(getattr(thing, method)):
                        yield f"{name}.{method}", getattr(thing, method)


def test_the_tables_have_every_public_number():
    tables = COUNT_ARGUMENTS.keys() | NUMBER_ARGUMENTS.keys()
    missing = []
    for name, function in public_functions():
        if name.startswith(tuple(ELSEWHERE)) or name.endswith(tuple(f".{x}" for x in ELSEWHERE)):
            continue
        for parameter in inspect.signature(function).parameters.values():
            if {"int", "float"} & set(str(parameter.annotation).split(" | ")):
                missing.append(f"{name}({parameter.name})")
    assert sorted(set(missing) - tables) == []


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.filterwarnings("ignore::qtx_lab.FallbackWarning")
@pytest.mark.parametrize("argument", COUNT_ARGUMENTS)
def test_whole_numbers_of_numpy_and_torch_are_counts(argument):
    use, value = COUNT_ARGUMENTS[argument]
    expected = use(value)
    for number in (np.int64(value), torch.tensor(value)):
        assert same(use(number), expected), number
    for number in (True, np.True_, torch.tensor(True), "2", value + 0.5):
        with pytest.raises(qtx.QtxError):
            use(number)


@pytest.mark.filterwarnings("ignore::qtx_lab.FallbackWarning")
@pytest.mark.parametrize("argument", NUMBER_ARGUMENTS)
def test_numbers_of_numpy_and_torch_are_numbers(argument):
    use, value = NUMBER_ARGUMENTS[argument]
    expected = use(value)
    for number in (np.float32(value), torch.tensor(value)):
        assert same(use(number), expected), number
    for number in (True, np.True_, torch.tensor(True), "0.5", math.nan):
        with pytest.raises(qtx.QtxError):
            use(number)


FLAG_ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "CircuitMitigation(readout)": lambda x: qtx.CircuitMitigation(readout=x),
    "LearnedImportanceSampler.fit(progress)": lambda x: qtx.LearnedImportanceSampler(4).fit(Q, K, progress=x),
    "CircuitMitigation.sample_rows(rehearse)": lambda x: qtx.CircuitMitigation().sample_rows(
        IDEAL, P, 8, rehearse=x
    ),
    "ProbabilisticErrorCancellation(twirled)": lambda x: qtx.ProbabilisticErrorCancellation(twirled=x),
    "QiskitQuantumBackend(fractional_gates)": lambda x: ibm(fractional_gates=x),
    "QiskitQuantumBackend(idling)": lambda x: qtx.QiskitQuantumBackend("aer", "fake_fez", idling=x),
    "QuantumTrainer(distributed)": lambda x: qtx.QuantumTrainer(distributed=x),
    "QuantumTrainer(progress)": lambda x: qtx.QuantumTrainer(progress=x),
    "QuantumTrainer(mixed_precision)": lambda x: qtx.QuantumTrainer(mixed_precision=x),
    "QuasiMonteCarloSampler(ordered)": lambda x: qtx.QuasiMonteCarloSampler(ordered=x),
    "Run.declare(timing)": lambda x: qtx.Run("nowhere").declare("error", timing=x),
    "SampledKVCache.attend(adaptive)": lambda x: cached(adaptive=x),
    "SampledKVCache.attend(share_keys)": lambda x: cached(share_keys=x),
    "SharedDecay(corrected)": lambda x: qtx.SharedDecay(corrected=x),
    "TreeLoader(phase)": lambda x: qtx.TreeLoader(phase=x),
    "Workbench(is_causal)": lambda x: qtx.Workbench(Q, K, V, is_causal=x),
    "generate(lossless)": lambda x: qtx.generate(qtx.load_reference_model(), "a", 1, lossless=x),
    "gpu_quantum_attention(return_estimate)": lambda x: qtx.gpu_quantum_attention(Q, K, V, return_estimate=x),
    "replay(install)": lambda x: qtx.replay("no-run", install=x),
    "replay(progress)": lambda x: qtx.replay("no-run", progress=x),
    "run_notebook(progress)": lambda x: qtx.run_notebook("00_quickstart", progress=x),
    "run_notebook(fresh)": lambda x: qtx.run_notebook("00_quickstart", fresh=x),
    "sampled_attention(enable_gqa)": lambda x: attend(enable_gqa=x),
    "sampled_attention(is_causal)": lambda x: attend(is_causal=x),
    "search(maximize)": lambda x: search("00_quickstart", {"seed": [1]}, "error", maximize=x),
    "search(progress)": lambda x: search("00_quickstart", {"seed": [1]}, "error", progress=x),
    "search(resume)": lambda x: search("00_quickstart", {"seed": [1]}, "error", resume=x),
    "sweep(progress)": lambda x: qtx.sweep("00_quickstart", {"seed": [1]}, progress=x),
    "train_run(continue_stopped)": lambda x: train_run(continue_stopped=x),
    "train_run(progress)": lambda x: train_run(progress=x),
    "train_reference(progress)": lambda x: train_reference("nowhere", progress=x),
    "sweep(fresh)": lambda x: qtx.sweep("00_quickstart", {"seed": [1]}, fresh=x),
    "sweep(resume)": lambda x: qtx.sweep("00_quickstart", {"seed": [1]}, resume=x),
}
"""The same for arguments that are True or False."""


@pytest.mark.parametrize("argument", FLAG_ARGUMENTS)
def test_what_is_neither_true_nor_false_is_no_flag(argument):
    name = argument.partition("(")[2][:-1]
    for given in ("no", 1, None):
        with pytest.raises(
            qtx.DtypeError, match=f"{name}={given!r} is not allowed: it must be True or False"
        ):
            FLAG_ARGUMENTS[argument](given)


@pytest.mark.parametrize(
    ("argument", "use"),
    [
        ("progress", lambda x: qtx.calibrate(qtx.load_reference_model(), "a text", progress=x)),
        ("stop", lambda x: qtx.run_notebook("00_quickstart", stop=x)),
        ("stop", lambda x: qtx.sweep("00_quickstart", {"seed": [1]}, stop=x)),
        ("stop", lambda x: search("00_quickstart", {"seed": [1]}, "error", stop=x)),
        ("stop", lambda x: qtx.replay("no-run", stop=x)),
    ],
)
def test_what_cannot_be_called_is_no_function(argument, use):
    for given in ("no", 1):
        with pytest.raises(qtx.DtypeError, match=f"{argument}={given!r} is not allowed: it must be"):
            use(given)


HUGE = {
    "tensor": torch.ones(300, 300),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "array": np.ones((200, 200)),
    "list": list(range(5000)),
    "nested": [[[list(range(30))] * 30] * 30] * 30,
    "dictionary": dict.fromkeys(range(5000)),
    "set": set(range(5000)),
    "text": "x" * 5000,
    "number": 10**5000,  # Python refuses to write it
    "module": torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(100))),
}
"""What is long when it is written."""


@pytest.mark.parametrize("given", HUGE)
def test_a_refusal_is_one_line_whatever_was_given(given):
    """A tensor in the place of a number, say, because an argument was forgotten."""
    allowed = {
        ("tensor", "ZeroNoiseExtrapolation(asymptote)"),
        ("parameter", "ZeroNoiseExtrapolation(asymptote)"),
        ("number", "sampled_attention(window)"),
    }
    uses = {
        **{name: use for table in (COUNT_ARGUMENTS, NUMBER_ARGUMENTS) for name, (use, _) in table.items()},
        **FLAG_ARGUMENTS,
        "sampled_attention(sampler)": lambda x: attend(sampler=x),
        "sampled_attention(control_variate)": lambda x: attend(control_variate=x),
        "make_loader(loader)": qtx.make_loader,
        "load_language_model(source)": qtx.load_language_model,
        "MultilevelControlVariate(levels)": qtx.MultilevelControlVariate,
        "CircuitMitigation(loader)": lambda x: qtx.CircuitMitigation(loader=x),
        "HeadTailSampler(head)": lambda x: qtx.HeadTailSampler(head=x),
    }
    for name, use in uses.items():
        if (given, name) in allowed:
            continue
        with pytest.raises(qtx.QtxError) as caught:
            use(HUGE[given])
        message = str(caught.value)
        assert len(message) < 700, name
        assert "\n" not in message, name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_tensors_that_are_not_dense_are_called_what_they_are():
    x = torch.ones(2, 3, 4)
    for given, says in (
        (torch.nested.nested_tensor([x[0], x[1, :2]]), "v is a nested tensor"),
        (x.to_sparse(), "v is a torch.sparse_coo tensor on cpu"),
        (x.to("meta"), "v is a torch.strided tensor on meta"),
    ):
        with pytest.raises(qtx.DtypeError, match=f"{says}; it must be dense"):
            qtx.sampled_attention(x, x, given)
