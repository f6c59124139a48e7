"""`CircuitMitigation`: rows measured at one or more noise levels, corrected, extrapolated and projected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.base import Engine, JobStatus
from ..backends.ibm.budget import Confirm, check_confirm
from ..backends.ibm.submission import check_waiting
from ..backends.requests import PlannedRun, RowRequest
from ..checks import check_flags
from ..circuits import Loader, make_loader
from ..errors import ArgumentError, DtypeError, FallbackWarning, unknown_name
from .calls import MitigatedCall, submit_call
from .inference import ZeroNoiseInference
from .projection import project_to_simplex, sum_by_key
from .readout import calibration_qubits, estimate_register, planned_calibration, readout_errors
from .register import MAX_BITS, LoaderRegister, register_counts, register_probabilities
from .rehearsal import Expectation, expected_errors
from .results import MitigatedRows, checked_request, finish_request
from .scaling import SCALINGS, is_static, scale_noise

SEED_STEP = 7919
"""Distance of the seeds of two noise levels: a prime, because blocks of rows add multiples of their size."""


@dataclass(frozen=True)
class _Variant:
    """What makes the backend of a noise level differ from the others; a key of those in `_BACKENDS`."""

    loader: Loader
    engine: Engine
    optimization_level: int
    level: float
    scaling: str | None


_BACKENDS: WeakKeyDictionary[QiskitQuantumBackend, dict[_Variant, QiskitQuantumBackend]] = WeakKeyDictionary()
"""Backends with other loaders or more noise, so that their circuits are transpiled and compiled only once."""


_EXPECTED: WeakKeyDictionary[QiskitQuantumBackend, tuple[Any, Expectation | None]] = WeakKeyDictionary()
"""The latest expectation on each backend and what it is for: replicates of rows share it."""


@dataclass(frozen=True)
class CircuitMitigation:
    """One way to measure rows; `CircuitSampler` takes it as its `mitigation`.

    Shots on masked keys, padding and wrong Hamming weights are always discarded. What is left is projected
    onto the distributions on the keys that are not masked.

    Parameters
    ----------
    zne : ZeroNoiseInference, optional
        Measures at its noise levels, where 1 is the device's own noise, and infers what there would be
        without noise. Its `allocate` spreads the shots. `ZeroNoiseExtrapolation` and `SharedDecay` are such
        inferences.
    readout : bool
        Whether to undo readout errors, which is better than raw counts with any number of shots. Their
        calibration takes shots too, once for all rows: these are not part of any budget here. See
        `readout_errors`.
    loader : str or Loader, optional
        Used in place of the backend's; `TwoCopyLoader()` is virtual distillation.
    scaling : str
        How the noise levels are made: one of `FOLDINGS`, or "model" or "pauli" on a simulator; see
        `scale_noise`.

    Raises
    ------
    ArgumentError
        If a name is unknown, or if a level is below 1 where gates are folded.
    DtypeError
        If zne is not a ZeroNoiseInference, or loader not a loader.

    Examples
    --------
    >>> from qtx_lab.backends import QiskitQuantumBackend
    >>> from qtx_lab.mitigation import ZeroNoiseExtrapolation
    >>> mitigation = CircuitMitigation(ZeroNoiseExtrapolation([1, 3]))
    >>> mitigation.name
    'readout, richardson 1 3 (local)'
    >>> backend = QiskitQuantumBackend("aer", loader="tree")
    >>> g = torch.Generator().manual_seed(0)
    >>> mitigation.sample_rows(backend, torch.tensor([[0.0, 1.0]]), 100, generator=g).probabilities()
    tensor([[0., 1.]], dtype=torch.float64)
    """

    zne: ZeroNoiseInference | None = None
    readout: bool = True
    loader: str | Loader | None = None
    scaling: str = "local"

    def __post_init__(self) -> None:
        if self.zne is not None and not isinstance(self.zne, ZeroNoiseInference):
            raise DtypeError(
                f"zne={self.zne!r} is not allowed: it must be a ZeroNoiseInference, as "
                "ZeroNoiseExtrapolation or SharedDecay, or None."
            )
        check_flags(readout=self.readout)
        if self.scaling not in SCALINGS:
            raise unknown_name("scaling", self.scaling, SCALINGS)
        if self.loader is not None:
            make_loader(self.loader)
        if self.zne is not None and self.scaling != "model" and min(self.zne.noise_levels) < 1:
            raise ArgumentError(
                f"noise_levels={list(self.zne.noise_levels)} is not allowed on circuits: 1 is the device's "
                "own noise, and no folding goes below it; 0 would be the answer itself."
            )

    @cached_property
    def name(self) -> str:
        """The loader, the correction and the extrapolation, in words."""
        parts = [make_loader(self.loader).name] if self.loader else []
        parts += ["readout"] if self.readout else []
        if self.zne is not None:
            levels = " ".join(f"{x:g}" for x in self.zne.noise_levels)
            parts.append(f"{self.zne.method} {levels} ({self.scaling})")
        return ", ".join(parts if self.zne or self.readout else [*parts, "raw"])

    @property
    def settings(self) -> dict[str, Any]:
        """The name and its parts, as JSON holds them in the record of a device's job."""
        method = None if self.zne is None else self.zne.method
        return {
            "name": self.name,
            "readout": self.readout,
            "method": method,
            "noise_levels": list(self.levels),
            "scaling": self.scaling,
            "inference": None if self.zne is None else self.zne.settings,
            "loader": None if self.loader is None else make_loader(self.loader).name,
        }

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels at which rows are measured."""
        return self.zne.noise_levels if self.zne else (1.0,)

    def allocate(self, shots: int) -> list[int]:
        """Return how many of the shots of a row go to each noise level."""
        return self.zne.allocate(shots) if self.zne else [shots]

    def construct_backends(self, backend: QiskitQuantumBackend) -> list[QiskitQuantumBackend]:
        """Return the backend with the loader, at each noise level; equal ones are made only once."""
        known = _BACKENDS.setdefault(backend, {})
        loader = make_loader(self.loader) if self.loader else backend.loader
        backends = []
        for level in self.levels:
            scaling = None if level == 1 and self.scaling != "pauli" else self.scaling
            if self.loader is None and scaling is None:
                backends.append(backend)  # the dictionary must not hold it: it would keep itself alive
                continue
            variant = _Variant(loader, backend.engine, backend.optimization_level, level, scaling)
            if variant not in known:
                other = backend.with_loader(loader) if self.loader else backend
                known[variant] = other if scaling is None else scale_noise(other, level, scaling)
            backends.append(known[variant])
        return backends

    def check(self, backend: QiskitQuantumBackend, n: int) -> None:
        """Refuse, before any work, what cannot be done with rows of n keys on this backend.

        Raises
        ------
        ArgumentError
            If the register has too many bits, if readout errors cannot be undone, or if folding would make
            two noise levels equal.
        BackendUnavailable
            If the device cannot run a circuit.
        """
        for variant in self.construct_backends(backend):
            circuit, loader = variant.transpiled(n), variant.loader
            if circuit.num_clbits > MAX_BITS:
                raise ArgumentError(
                    f"The loader {loader.name!r} takes {circuit.num_clbits} bits for {n} keys; at most "
                    f"{MAX_BITS} are mitigated. Use 'tree' or 'dynamic'."
                )
            if self.readout and not (is_static(circuit) or loader.feeds_forward):
                raise ArgumentError(
                    f"The readout errors of the loader {loader.name!r} cannot be undone, because it measures "
                    "before the end of its circuit."
                )
        attained = self.attained_levels(backend, n)
        if len(set(attained)) < len(set(self.levels)):
            raise ArgumentError(
                f"noise_levels={list(self.levels)} become {attained} on this circuit, which has too few "
                "gates to fold. Use levels that are further apart, or scaling='local'."
            )

    def outcome_probabilities(
        self, backend: QiskitQuantumBackend, p: Tensor, known: dict[object, Tensor]
    ) -> list[Tensor]:
        """Compute the probabilities of the register's values at each noise level, (R, 2^bits).

        Parameters
        ----------
        backend, p
            As for `register_probabilities`.
        known : dict
            What was computed for these rows, by backend; what is new is added.
        """
        backends = self.construct_backends(backend)
        for variant in backends:
            if variant not in known:
                known[variant] = register_probabilities(variant, p)
        return [known[variant] for variant in backends]

    def attained_levels(self, backend: QiskitQuantumBackend, n: int) -> list[float]:
        """Return the noise levels that the circuits for rows of n keys really have; see `fold`."""
        metadata = [variant.transpiled(n).metadata or {} for variant in self.construct_backends(backend)]
        return [float(x.get("noise_level", level)) for x, level in zip(metadata, self.levels, strict=True)]

    def planned_runs(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> list[PlannedRun]:
        """List all that `sample_rows` runs: calibrations that are not known yet, and every noise level.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            Rows, each with a key of probability above 0.
        shots : int
            Shots of each row, over all noise levels.

        Returns
        -------
        list of PlannedRun
        """
        n, runs = p.shape[-1], []
        self.check(backend, n)
        variants = self.construct_backends(backend)
        if self.readout:
            # Noise levels that measure the same qubits share one calibration.
            by_qubits = {tuple(calibration_qubits(v.transpiled(n))): v for v in variants}
            runs += [run for variant in by_qubits.values() for run in planned_calibration(variant, n)]
        attained = self.attained_levels(backend, n)
        for variant, level, level_shots in zip(variants, attained, self.allocate(shots), strict=True):
            runs.append(PlannedRun(variant.transpiled(n), len(p), level_shots, f"noise level {level:g}"))
        return runs

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
        rehearse: bool = True,
    ) -> RowCounts:
        """Measure rows and mitigate them; arguments are those of `Mitigation.sample_rows`.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
        shots : int
            Shots of each row, over all noise levels.
        generator : torch.Generator, optional
            The only source of randomness.
        rehearse : bool
            Whether to rehearse some of the rows first, by the errors that the device reports, and to warn if
            raw counts of as many shots are expected to be nearer to the rows.

        Returns
        -------
        RowCounts
            `counts` and `discarded` are those of all noise levels together; `estimate` and `std_error` are
            what is inferred from them. Its diagnostics hold `expected_error` and `expected_raw_error` where
            the rows were rehearsed: total variation from the rows, mean over rows.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As `QiskitQuantumBackend.sample_rows`, and as `check`.
        """
        check_flags(rehearse=rehearse)
        request = checked_request(backend, p, shots, generator)
        shots = request.shots
        if 0 in self.levels:
            warnings.warn(
                "noise_levels holds 0, which is the answer itself: only a simulator can give it.",
                FallbackWarning,
                stacklevel=2,
            )
        shots_by_level = self.allocate(shots)
        if not bool(request.running.any()):
            return backend.sample_rows(request.p, shots, generator=generator)
        running = request.p[request.running]
        n = running.shape[-1]
        self.check(backend, n)
        expected = self.expect(backend, running, shots) if rehearse else None
        if expected is not None and expected.warning:
            warnings.warn(expected.warning, FallbackWarning, stacklevel=2)
        if backend.engine.queues:
            facts = _expectation_facts(expected)
            return submit_call(self, backend, request, shots_by_level, facts).counts()
        variants = self.construct_backends(backend)
        errors = [readout_errors(v, n, seed=request.seed) for v in variants] if self.readout else None
        counts = [
            register_counts(
                variant,
                variant.transpiled(n),
                variant.loader.angles(running),
                level_shots,
                request.seed + SEED_STEP * i,
            )
            for i, (variant, level_shots) in enumerate(zip(variants, shots_by_level, strict=True))
        ]
        rows = self.combine_results(backend, running, counts, errors)
        attained = self.attained_levels(backend, n)
        facts = variants[0].diagnostics(variants[0].transpiled(n), request) | _expectation_facts(expected)
        request, register = replace(request, diagnostics=facts), LoaderRegister.of(variants[0], n)
        return self.finish(request, register, counts, rows, shots_by_level, attained)

    def submit_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
        confirm: Confirm | None = None,
        patience: float | None = None,
        progress: bool | Callable[[JobStatus], None] = True,
    ) -> MitigatedCall:
        """Send all that a device measures for mitigated rows, without waiting for it.

        Parameters
        ----------
        backend, p, shots, generator
            As for `sample_rows`.
        confirm : bool or callable, optional
            For this call, in place of the backend's: True sends it, whatever limit it exceeds.
        patience, progress
            As for `DeviceJob.outcomes`; None: the backend's own patience.

        Returns
        -------
        MitigatedCall
            `counts()` waits for the mitigated result. It outlives this process: see `find_mitigated_calls`.

        Raises
        ------
        ArgumentError
            If the backend queues no jobs, or no row has a key to measure.
        ArgumentError, ShapeError, DtypeError, BackendUnavailable, StorageError
            As `sample_rows`.
        """
        if confirm is not None:
            check_confirm(confirm)
        check_waiting(None, patience, progress)
        request = checked_request(backend, p, shots, generator)
        if not backend.engine.queues:
            raise ArgumentError(f"{backend.engine.name} queues no jobs: call `sample_rows`.")
        if not bool(request.running.any()):
            raise ArgumentError("p holds no row with mass: there is nothing to measure.")
        self.check(backend, request.p.shape[-1])
        return submit_call(
            self,
            backend,
            request,
            self.allocate(shots),
            {},
            confirm=confirm,
            patience=patience,
            progress=progress,
        )

    def finish(
        self,
        request: RowRequest,
        register: LoaderRegister,
        counts: Sequence[Tensor],
        rows: MitigatedRows,
        shots_by_level: Sequence[int],
        attained: Sequence[float],
    ) -> RowCounts:
        """Make the result of mitigated rows: see `finish_mitigated`."""
        return finish_mitigated(self, request, register, counts, rows, shots_by_level, attained)

    def expect(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> Expectation | None:
        """Rehearse some of the rows on the errors that the device reports; None if they cannot be simulated.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, float64, (R, n)
            Rows that `check_rows` returned, each with a key of probability above 0.
        shots : int
            Shots of each row, over all noise levels.
        """
        raw = CircuitMitigation(readout=False)
        if self == raw or backend.engine.ideal:
            return None
        key = (self, shots, backend.engine, backend.loader, p.shape, p.numpy().tobytes())
        if _EXPECTED.get(backend, (None, None))[0] != key:
            _EXPECTED[backend] = key, expected_errors(self, raw, backend, p, shots)
        return _EXPECTED[backend][1]

    def combine_results(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        counts: Sequence[Tensor],
        errors: Sequence[Tensor] | None,
    ) -> MitigatedRows:
        """Estimate rows from the register's counts at each noise level.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            The rows that were measured; only which keys are masked is used.
        counts : sequence of Tensor, (R, 2^bits)
            How often the register had each value, at each level. The expected counts of very many shots give
            what infinitely many shots would.
        errors : sequence of Tensor, (bits, 2, 2), or None
            Readout errors at each level, to be undone.

        Returns
        -------
        MitigatedRows
        """
        n = p.shape[-1]
        register = LoaderRegister.of(self.construct_backends(backend)[0], n)
        return self.combine_levels(register, p, counts, errors, self.attained_levels(backend, n))

    def combine_levels(
        self,
        register: LoaderRegister,
        p: Tensor,
        counts: Sequence[Tensor],
        errors: Sequence[Tensor] | None,
        attained: Sequence[float],
    ) -> MitigatedRows:
        """Estimate rows as `combine_results`, without a backend.

        Parameters
        ----------
        register : LoaderRegister
            How the register's values are read.
        p, counts, errors
            As for `combine_results`.
        attained : sequence of float
            The noise levels that the circuits really had.
        """
        support = p > 0
        levels = [
            estimate_register(
                level_counts,
                None if errors is None else errors[i],
                feeds_forward=register.loader.feeds_forward,
            )
            for i, level_counts in enumerate(counts)
        ]
        fallbacks: tuple[str, ...] = ()
        value, variance = levels[0].value, levels[0].variance
        if self.zne is not None:
            extrapolated = self.zne.infer(
                [level.value for level in levels],
                [level.variance.sqrt() for level in levels],
                attained,
            )
            assert extrapolated.std_error is not None
            value, variance = extrapolated.output, extrapolated.std_error.square()
            fallbacks = extrapolated.fallbacks
        keys, signs = register.keys, register.signs
        by_key = sum_by_key(value * signs, keys, support)
        variance = sum_by_key(variance, keys, support)
        mass = by_key.sum(-1, keepdim=True)
        weights = None
        if self.zne is not None and not self.zne.keeps_total:
            # The sum is badly known; what noise takes from the keys is at most what the lowest level shows.
            # The keys that are known worst make up for what is left.
            lowest_mass = sum_by_key(levels[0].value * signs, keys, support).sum(-1, keepdim=True)
            mass, weights = mass.clamp(lowest_mass.clamp(0, 1), torch.ones_like(lowest_mass)), variance
        known = mass > 0
        if not bool(known.all()):
            fallbacks += (
                f"{int((~known).sum())} of {len(p)} rows have no shots left on their keys: their weights are "
                "0.",
            )
        mass = mass.where(known, torch.ones_like(mass))
        estimate = project_to_simplex(by_key / mass, support, weights).where(known, 0)
        return MitigatedRows(estimate, (variance.sqrt() / mass).where(known, torch.nan), fallbacks)


def finish_mitigated(
    mitigation: CircuitMitigation,
    request: RowRequest,
    register: LoaderRegister,
    counts: Sequence[Tensor],
    rows: MitigatedRows,
    shots_by_level: Sequence[int],
    attained: Sequence[float],
) -> RowCounts:
    """Make the result of mitigated rows.

    Parameters
    ----------
    mitigation : CircuitMitigation
    request : RowRequest
        All rows, with the diagnostics of the first level.
    register : LoaderRegister
        How the register's values are read.
    counts : sequence of Tensor, (R', 2^bits)
        Of the rows that were run, at each level.
    rows : MitigatedRows
        What was estimated from them.
    shots_by_level : sequence of int
        Shots of each row at each level.
    attained : sequence of float
        The noise levels that the circuits really had.
    """
    shots_at = dict.fromkeys(mitigation.levels, 0)
    for level, shots in zip(mitigation.levels, shots_by_level, strict=True):
        shots_at[level] += shots  # a level may be measured more than once
    diagnostics = {
        **request.diagnostics,
        "mitigation": mitigation.name,
        "shots_by_level": shots_at,
        "attained_levels": tuple(attained),
    }
    running = request.p[request.running]
    all_counts = sum_by_key(torch.stack(list(counts)).sum(0), register.keys, running > 0)
    return finish_request(request, all_counts, rows, diagnostics)


def _expectation_facts(expected: Expectation | None) -> dict[str, Any]:
    """Diagnostics with the errors that were expected."""
    if expected is None:
        return {}
    return {"expected_error": expected.mitigated.error, "expected_raw_error": expected.raw.error}
