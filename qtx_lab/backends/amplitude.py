"""`AmplitudeEstimator`: coordinates of attention outputs by amplitude estimation, with intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from qiskit import QuantumCircuit
from torch import Tensor

from ..checks import check_count, check_generator, check_number
from ..circuits import check_rows
from ..circuits.amplitude import MAX_QUBITS, amplitude_angles, amplitude_circuit, load_angles
from ..circuits.base import num_bits, unpack_values
from ..circuits.resources import resources
from ..errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError, unknown_name
from .aer import AerEngine
from .amplitude_fit import (
    PLANE_PARTS,
    FittedDecay,
    Hits,
    candidates,
    fit_angles,
    schedule,
    sum_of_estimates,
)
from .amplitude_plan import AmplitudePlan, AmplitudeProbabilities, Measured, best_shares
from .counts import draw_counts, mean_and_variance, rows_at_once, tally
from .ibm.target import TargetEngine
from .noise import fake_devices
from .qiskit import MAX_SHOTS_PER_ROW, QiskitQuantumBackend
from .requests import PlannedRun

MAX_ITERATES = 1024
"""Most Grover iterates of a circuit that is run."""

MAX_VALUE = 1e150
"""Values may not be larger, so that variances are numbers."""

SEED_STEP = 4 * MAX_ITERATES
"""Distance of the seeds of two bindings of a circuit: numbers of iterates, in either stage, have seeds beside
each other."""

LEAST_CONTRAST = 1e-3
"""Least contrast that is expected: what errors leave of it is below, and the hits say nothing."""

WEAK_NOISE = 0.2
"""Most errors of a circuit with one iterate for which intervals cover; see `AmplitudeEstimator`."""

PROBED_ITERATES = 4
"""Iterates of the circuit whose errors, less those of the circuit without iterates, predict the decay."""


@dataclass(frozen=True, eq=False, repr=False)
class AmplitudeEstimate:
    """Outputs o = p v by amplitude estimation, with the exact outputs and those of classical draws.

    Parameters
    ----------
    values, lower, upper : Tensor, float64, (R,) or (R, d)
        Estimates, and the ends of their intervals.
    confidence : float
        Of the intervals.
    exact, classical : Tensor
        The exact outputs, and means of `loads` independent draws of each row by pseudo-random numbers.
    loads : Tensor, int64
        How often the row's loader or its inverse was used for each output.
    scale : Tensor, float64
        Half width of the range of the values: the output that an amplitude of 1 stands for.
    schedule : mapping
        From the number of Grover iterates to the shots of all planes together.
    decay : FittedDecay
        What noise does to the amplitudes.
    two_qubit_gates : mapping
        From the number of iterates to the two-qubit gates of the circuit.
    seconds : float or None
        Estimated quantum time that the shots take on the device, as IBM bills it; None on an ideal simulator.
    diagnostics : mapping
        `device`, `calibration`, `noise`, `planes` (circuits' bindings), `qubits`, `method`.

    Examples
    --------
    >>> p, v = torch.tensor([[0.5, 0.5]]), torch.tensor([1.0, 0.0])
    >>> estimator = AmplitudeEstimator(QiskitQuantumBackend("aer"))
    >>> result = estimator.estimate(p, v, loads=1024, generator=torch.Generator().manual_seed(0))
    >>> result.values.shape, result.lower <= result.upper, result.loads.max() <= 1024
    (torch.Size([1]), tensor([True]), tensor(True))
    """

    values: Tensor
    lower: Tensor
    upper: Tensor
    confidence: float
    exact: Tensor
    classical: Tensor
    loads: Tensor
    scale: Tensor
    schedule: Mapping[int, int]
    decay: FittedDecay
    two_qubit_gates: Mapping[int, int]
    seconds: float | None
    diagnostics: Mapping[str, Any]

    def __repr__(self) -> str:
        most, gates = max(self.schedule, default=0), max(self.two_qubit_gates.values(), default=0)
        return (
            f"AmplitudeEstimate({tuple(self.values.shape)}, loads <= {int(self.loads.max())}, "
            f"at most {most} iterates with {gates} two-qubit gates, {self.diagnostics.get('device')})"
        )


class AmplitudeEstimator:
    """Estimates outputs o = sum_j p_j v_j by amplitude estimation: errors fall as 1 / loads without noise.

    The error of a mean of draws falls as 1 / sqrt(draws). An output is a sum over planes of signs; see
    `qtx_lab.circuits.amplitude`. Each plane is one amplitude, of circuits that load the row, apply Grover
    iterates and measure. Iterates are chosen for the decay of the contrast that the device's calibration
    predicts, and the decay is fitted to the measured hits.

    Where a shot of one iterate has more than .2 errors, as expected by the calibration, a warning says so:
    what the noise leads to is then not known well enough, and intervals may be too short.

    All loads are counted: a shot after k iterates takes 2k + 1 uses of the loader or its inverse. The row is
    known here, so that a classical computer computes the exact output by n multiplications; every result has
    it as `exact`.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        Where circuits run. Its loader is not used.
    method : {"bayes", "mle"}
        Posterior means and intervals of equal tails, or maximum likelihood and likelihood-ratio intervals.

    Raises
    ------
    DtypeError, ArgumentError
        If backend is no backend; if method is unknown.

    Examples
    --------
    >>> p, v = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([1.0, 0.0, -1.0, 2.0])
    >>> estimator = AmplitudeEstimator(QiskitQuantumBackend("aer"))
    >>> result = estimator.estimate(p, v, loads=4096, generator=torch.Generator().manual_seed(0))
    >>> abs(result.values - result.exact) < 0.01
    tensor([True])
    """

    def __init__(self, backend: QiskitQuantumBackend, *, method: Literal["bayes", "mle"] = "bayes"):
        if not isinstance(backend, QiskitQuantumBackend):
            raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
        if method not in ("bayes", "mle"):
            raise unknown_name("method", method, ("bayes", "mle"))
        self.backend, self.method = backend, method
        self._circuits: dict[tuple[object, ...], QuantumCircuit] = {}

    def estimate(
        self,
        p: Tensor,
        v: Tensor,
        loads: int = 4096,
        *,
        confidence: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> AmplitudeEstimate:
        """Estimate o = p v, and wait for the result.

        Parameters
        ----------
        p : Tensor, (R, n)
            Rows of probabilities of 1 to 16 keys. The output of a row of all zeros is 0.
        v : Tensor, (n,), (n, d) or (R, n, d)
            Values; without d, there is one coordinate.
        loads : int
            Most uses of the row's loader and its inverse for each output, that is for a row and a coordinate;
            16,777,216 at most.
        confidence : float
            Of the intervals, between 0 and 1.
        generator : torch.Generator, optional
            The only source of randomness.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            Before any work: if p holds no rows of probabilities (see `check_rows`), if v does not fit to
            it or is not finite, if there are more than 16 keys, or if loads are fewer than 16 for each
            plane.
        BackendUnavailable
            If the device cannot be reached, or cannot run the circuits.
        """
        confidence = check_number("confidence", confidence, above=0, below=1)
        check_generator(generator)
        loads = check_count("loads", loads, most=MAX_SHOTS_PER_ROW)
        plan = self.plan(p, v, loads)
        p, v3, shape = _checked(p, v)
        strong_noise = self._strong_noise(plan)
        for sentence in strong_noise:
            warnings.warn(sentence, UserWarning, stacklevel=2)
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        engine, n = self.backend.engine, p.shape[-1]
        with engine.reserved(self._runs(plan, plan.shots, plan.left)):
            measured = self._measured(plan, seed)
        values, lower, upper, decay = self.fit(plan, measured, confidence=confidence)
        runs = self._runs(plan, measured.shots)
        used = [(i, k) for i, k in enumerate(plan.iterates) if int(measured.shots[:, i].sum())]
        running = p.sum(-1) > 0
        drawn = torch.zeros_like(p)
        random = torch.Generator().manual_seed(seed ^ 0x5EED)
        drawn[running] = draw_counts(p[running], loads, random).double() / loads
        return AmplitudeEstimate(
            values=values.view(shape),
            lower=lower.view(shape),
            upper=upper.view(shape),
            confidence=confidence,
            exact=torch.einsum("rn,rnd->rd", p, v3).view(shape),
            classical=torch.einsum("rn,rnd->rd", drawn, v3).view(shape),
            loads=plan.loads(measured.shots).view(shape),
            scale=plan.scale.view(shape),
            schedule={k: int(measured.shots[:, i].sum()) for i, k in used},
            decay=decay,
            two_qubit_gates={k: resources(self.circuit(n, k)).two_qubit_gates for _, k in used},
            seconds=self._seconds(runs),
            diagnostics={
                **engine.facts(),
                "not_modelled": (*engine.facts().get("not_modelled", ()), *strong_noise),
                "planes": len(plan.p),
                "qubits": num_bits(n),
                "method": self.method,
            },
        )

    def plan(
        self, p: Tensor, v: Tensor, loads: int = 4096, *, most_iterates: int = MAX_ITERATES
    ) -> AmplitudePlan:
        """What `estimate` would measure; nothing is run. Arguments and errors are those of `estimate`.

        `most_iterates` bounds the Grover iterates of a circuit.

        The number of planes is the one that promises the least error: each further plane makes the residual
        smaller, but leaves fewer loads to the others.
        """
        loads = check_count("loads", loads)
        most_iterates = check_count("most_iterates", most_iterates, 0)
        p, v3, _ = _checked(p, v)
        rows, n, coordinates = v3.shape
        attended = p > 0
        first = attended.double().argmax(-1)[:, None, None].expand(rows, coordinates, 1)
        # a masked key takes the value of one that is not, so that it widens no range
        values = torch.where(attended[:, None], v3.mT, v3.mT.gather(-1, first)).reshape(-1, n)
        running = attended.any(-1).repeat_interleave(coordinates)
        values = torch.where(running[:, None], values, 0.0)
        if n == 1:
            values = values.expand(-1, 2)
        expected = None if self.backend.engine.ideal else self.expected_decay(n)
        shares = best_shares(values, loads, 0.0 if expected is None else expected.per_iterate)
        output, plane = (shares.loads > 0).nonzero(as_tuple=True)
        known = {
            x: schedule(x, shares.decay, most_iterates) for x in set(shares.loads[output, plane].tolist())
        }
        schedules = [known[x] for x in shares.loads[output, plane].tolist()]
        iterates = candidates(max((x.most for x in schedules), default=0))
        shots = torch.tensor([[x.ladder.get(k, 0) for k in iterates] for x in schedules], dtype=torch.int64)
        return AmplitudePlan(
            p[output // coordinates],
            shares.signs[output, plane, :n],
            output,
            shares.weights[output, plane],
            iterates,
            shots.view(len(output), len(iterates)),
            torch.tensor([x.left for x in schedules], dtype=torch.int64),
            torch.tensor([x.most for x in schedules], dtype=torch.int64),
            p,
            shares.centre.view(rows, coordinates),
            shares.weights.sum(-1).view(rows, coordinates),
            shares.residual[:, :n].reshape(rows, coordinates, n),
            shares.residual_loads.view(rows, coordinates),
            expected,
        )

    def fit(
        self, plan: AmplitudePlan, measured: Measured, *, confidence: float = 0.95
    ) -> tuple[Tensor, Tensor, Tensor, FittedDecay]:
        """Estimate the outputs from what was measured; repetitions are estimated independently of each other.

        Returns
        -------
        values, lower, upper : Tensor, float64, (..., R, d)
        decay : FittedDecay
            Means over repetitions.
        """
        hits, counts = measured.hits, measured.counts
        rows, d = plan.centre.shape
        batch = hits.shape[:-2]
        if not len(plan.p):
            centre = plan.centre.expand(*batch, rows, d).clone()
            return centre, centre.clone(), centre.clone(), FittedDecay()
        data = Hits(plan.iterates, hits, measured.shots.double(), plan.mixed)
        fitted = fit_angles(data, expected=plan.expected, confidence=confidence, method=self.method)
        rest, spread = _residual(
            plan, counts, fitted.decay[..., 0], fitted.decay_std_error[..., 0], confidence
        )
        ends = plan.residual.amin(-1), plan.residual.amax(-1)
        starts = torch.cat([torch.ones(1, dtype=torch.bool), plan.output.diff() > 0]).nonzero()[:, 0]
        lengths = torch.diff(starts, append=torch.tensor([len(plan.output)]))
        place = torch.arange(len(plan.output)) - starts.repeat_interleave(lengths)
        # a table of outputs × planes, and the residual in its last column
        table = hits.new_zeros(5, *batch, rows * d, int(place.max()) + 2)
        columns = (fitted.value, fitted.lower, fitted.upper, fitted.likeliest, plan.weights)
        for i, x in enumerate(columns):
            table[i][..., plan.output, place] = x.expand_as(fitted.value)
        for i, x in enumerate((rest, rest - spread, rest + spread, rest)):
            table[i][..., -1] = torch.minimum(torch.maximum(x, ends[0]), ends[1]).flatten(-2)
        table[4][..., -1] = 1
        parts = sum_of_estimates(*table)
        values, lower, upper = (plan.centre + x.view(*batch, rows, d) for x in parts)
        contrast, per_iterate, shift = fitted.decay.reshape(-1, 3).mean(0).tolist()
        a, b, c = fitted.decay_std_error.reshape(-1, 3).mean(0).tolist()
        return values, lower, upper, FittedDecay(contrast, per_iterate, shift, (a, b, c))

    def circuit(self, n: int, iterates: int) -> QuantumCircuit:
        """The circuit for n keys in the device's gates, transpiled once."""
        size = num_bits(n)
        key = (self.backend.engine.identity(), self.backend.optimization_level, size, iterates)
        if key not in self._circuits:
            original = amplitude_circuit(size, iterates)
            self._circuits[key] = self.backend.engine.transpile(original, self.backend.optimization_level)
        return self._circuits[key]

    def expected_decay(self, n: int) -> FittedDecay:
        """The decay that the calibrated errors of the gates predict for n keys."""
        right = [
            max(
                LEAST_CONTRAST,
                float(np.prod([1 - e for e in self.backend.engine.errors(self.circuit(n, k))])),
            )
            for k in (0, PROBED_ITERATES)
        ]
        return FittedDecay(right[0], max(1e-6, math.log(right[0] / right[1]) / PROBED_ITERATES))

    def probabilities(self, plan: AmplitudePlan) -> AmplitudeProbabilities:
        """What the shots of a plan are drawn from, with the simulator's noise.

        Raises
        ------
        BackendUnavailable
            If the backend is no simulator with exact probabilities.
        """
        engine, n = self.backend.engine, plan.rows.shape[-1]
        if not isinstance(engine, AerEngine):
            raise BackendUnavailable(f"{engine.name} has no exact probabilities: only simulators have.")
        angles, minus = amplitude_angles(plan.p, plan.signs), plan.minus
        hits = torch.zeros(plan.shots.shape, dtype=torch.float64)
        for i, k in enumerate(plan.iterates):
            circuit = self.circuit(n, k)
            probabilities = engine.probabilities(circuit, angles[:, : circuit.num_parameters])
            hits[:, i] = (probabilities * minus).sum(-1)
        keys = engine.probabilities(self.circuit(n, 0), load_angles(plan.rows).numpy())
        return AmplitudeProbabilities(hits.clamp(0, 1), keys)

    def _strong_noise(self, plan: AmplitudePlan) -> tuple[str, ...]:
        """A sentence where the noise is too strong to be modelled."""
        if plan.expected is None or not len(plan.p):
            return ()
        errors = 1 - plan.expected.contrast + plan.expected.per_iterate
        if errors <= WEAK_NOISE:
            return ()
        return (
            f"A circuit of one iterate for {plan.p.shape[-1]} keys has {errors:.2g} errors a shot by the "
            f"calibration of {self.backend.engine.name}. Above {WEAK_NOISE:g} the intervals of amplitude "
            "estimation may be too short: take fewer keys, or shots of the row.",
        )

    def _measured(self, plan: AmplitudePlan, seed: int) -> Measured:
        """Run both stages and the shots for the residual."""
        first = self._hits(plan, plan.shots, seed)
        second = _in_units(plan.second_shots(first))
        hits = first + self._hits(plan, second, seed + len(plan.iterates))
        shots = plan.residual_shots
        angles = load_angles(plan.rows).repeat_interleave(shots.shape[1], 0).numpy()
        circuit = self.circuit(plan.rows.shape[-1], 0)
        counts = self._counts(circuit, angles, shots.flatten(), seed + 2 * len(plan.iterates))
        return Measured(hits, plan.shots + second, counts.view(*shots.shape, -1))

    def _hits(self, plan: AmplitudePlan, shots: Tensor, seed: int) -> Tensor:
        """How often each plane's shots (I, K) hit, float64 (I, K)."""
        minus, angles = plan.minus, amplitude_angles(plan.p, plan.signs)
        hits = torch.zeros(shots.shape, dtype=torch.float64)
        for i, k in enumerate(plan.iterates):
            if bool(shots[:, i].any()):
                circuit = self.circuit(plan.rows.shape[-1], k)
                counts = self._counts(circuit, angles[:, : circuit.num_parameters], shots[:, i], seed + i)
                hits[:, i] = (counts * minus).sum(-1)
        return hits

    def _counts(self, circuit: QuantumCircuit, angles: np.ndarray, shots: Tensor, seed: int) -> Tensor:
        """How often each value of the register is measured with each binding: float64 (I, 2^m)."""
        states = 1 << circuit.num_clbits
        counts = torch.zeros(len(shots), states, dtype=torch.float64)
        unit = int(np.gcd.reduce(shots.numpy())) if len(shots) else 0
        if not unit:
            return counts
        which = torch.repeat_interleave(torch.arange(len(shots)), shots // unit)
        step = rows_at_once(unit)
        for start in range(0, len(which), step):
            part = which[start : start + step]
            seed_of_part = seed + SEED_STEP * start
            outcomes = self.backend.engine.run(circuit, angles[part.numpy()], unit, seed_of_part)[:, :unit]
            values = torch.from_numpy(unpack_values(outcomes))
            counts.index_add_(0, part, tally(values, states).double())
        return counts

    def _runs(self, plan: AmplitudePlan, shots: Tensor, left: Tensor | None = None) -> list[PlannedRun]:
        """The circuits that these shots (I, K) take, with those of the second stage if its loads are given.

        They are planned at the number of iterates that takes the longest circuits.
        """
        n = plan.rows.shape[-1]
        runs = [
            PlannedRun(self.circuit(n, k), int(x.sum()), 1, f"{k} iterates")
            for k, x in zip(plan.iterates, shots.mT, strict=True)
            if int(x.sum())
        ]
        if left is not None and int(left.sum()):
            k = plan.iterates[-1]
            runs.append(PlannedRun(self.circuit(n, k), int(left.sum()) // (2 * k + 1) + 1, 1, "second stage"))
        if int(plan.residual_shots.sum()):
            runs.append(PlannedRun(self.circuit(n, 0), int(plan.residual_shots.sum()), 1, "residual"))
        return runs

    def _seconds(self, runs: list[PlannedRun]) -> float | None:
        engine = self.backend.engine
        if engine.name in fake_devices():
            return TargetEngine(engine.name).cost(runs).quantum_seconds
        return engine.cost(runs).quantum_seconds if engine.queues else None


def _checked(p: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Rows (R, n) and values (R, n, d), both float64, and the shape of the outputs."""
    p = check_rows(p)
    rows, n = p.shape
    if num_bits(n) > MAX_QUBITS:
        raise ArgumentError(f"p has {n} keys; amplitude estimation takes at most {1 << MAX_QUBITS}.")
    if not isinstance(v, Tensor) or not v.is_floating_point():
        given = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise DtypeError(f"v is {given}; it must be a floating-point tensor.")
    if v.is_meta:
        raise DtypeError("v is on the device meta; it must hold numbers.")
    v = v.detach().to("cpu", torch.float64)
    fits = (v.ndim in (1, 2) and v.shape[0] == n) or (v.ndim == 3 and v.shape[:2] == (rows, n))
    if not rows:
        raise ShapeError(f"p has shape {tuple(p.shape)}; there must be at least one row.")
    if not fits or v.shape[-1] == 0:
        raise ShapeError(
            f"v has shape {tuple(v.shape)}; with p {tuple(p.shape)} it must be ({n},), ({n}, d) or "
            f"({rows}, {n}, d)."
        )
    if not bool((v.abs() <= MAX_VALUE).all()):
        raise ArgumentError(
            f"v holds NaN, infinity or a number beyond {MAX_VALUE:g}, whose square overflows."
        )
    v3 = v.view(n, -1).expand(rows, n, -1) if v.ndim < 3 else v
    return p, v3, (rows,) if v.ndim == 1 else (rows, v3.shape[-1])


def _in_units(shots: Tensor) -> Tensor:
    """Shots (I, K) rounded down to multiples of a number for each column.

    All bindings of a run have as many shots, and those with more shots occur several times.
    """
    least = (
        torch.where(shots > 0, shots, shots.amax(0)).amin(0)
        if len(shots)
        else shots.new_ones(shots.shape[1:])
    )
    unit = (least // 8).clamp_min(1)
    return shots // unit * unit


def _residual(
    plan: AmplitudePlan, counts: Tensor, contrast: Tensor, contrast_error: Tensor, confidence: float
) -> tuple[Tensor, Tensor]:
    """Mean of the residual over a row, without the states that noise mixes in, and half of its interval.

    `contrast` and its standard error are those of the circuit without iterates.
    """
    lost_elsewhere = 0.0 if plan.expected is None else PLANE_PARTS[0] * (1 - plan.expected.contrast)
    states = counts.shape[-1]
    value = F.pad(plan.residual, (0, states - plan.residual.shape[-1]))
    shots = counts.sum(-1)
    mean, spread = mean_and_variance(counts, value)
    fade = contrast[..., None, None]
    variance = spread / shots.clamp_min(1) / fade.square()
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(
        torch.tensor((1 + confidence) / 2, dtype=torch.float64)
    )
    corrected = (mean - (1 - fade) * value.mean(-1)) / fade
    unsure = contrast_error[..., None, None] / fade * (corrected - value.mean(-1))
    variance = variance + unsure.square() + (lost_elsewhere / fade) ** 2 * value.var(-1, correction=0)
    measured = shots > 0
    return torch.where(measured, corrected, 0.0), torch.where(measured, quantile * variance.sqrt(), 0.0)
