"""`CircuitMitigation`: rows measured at one noise level or several, readout undone, extrapolated, made distributions again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from qiskit import QuantumCircuit
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.counts import rows_at_once
from ..backends.exact import compile_steps, outcome_probabilities
from ..backends.requests import RowRequest
from ..checks import check_count
from ..circuits import DynamicLoader, Loader, make_loader
from ..circuits.base import pack_values, unpack_values
from ..errors import ArgumentError, BackendUnavailable, DtypeError, FallbackWarning, unknown_name
from .decay import SharedDecay
from .readout import can_undo, readout_errors, undo_dynamic_readout, undo_readout
from .scaling import FOLDINGS, is_static, scale_noise
from .symmetry import keep_keys, project_to_simplex
from .zne import ZeroNoiseExtrapolation

MOST_BITS = 16
"""Bits of a register whose values are all kept, for every row."""

_VARIANTS: WeakKeyDictionary[QiskitQuantumBackend, dict[Any, QiskitQuantumBackend]] = WeakKeyDictionary()
"""Backends with other loaders or more noise, so that circuits are transpiled and compiled once."""


@dataclass(frozen=True)
class CircuitMitigation:
    """One way to measure rows; a `Mitigation` for `CircuitSampler`.

    Outcomes on masked keys, padding and wrong Hamming weights are always discarded, and what is left is projected
    onto the distributions on the keys that are not masked.

    Parameters
    ----------
    zne : ZeroNoiseExtrapolation or SharedDecay, optional
        Its levels are 1 for the device's own noise; shots are spread over them by its `allocate`.
    readout : bool
        Undo readout errors; see `readout_errors`, whose shots are counted nowhere: they are spent once a calibration.
    loader : str or Loader, optional
        In place of the backend's; `TwoCopyLoader()` is virtual distillation.
    scaling : str
        What makes the levels of `zne`: one of `FOLDINGS`, or "model" on a simulator; see `scale_noise`.

    Raises
    ------
    ArgumentError, DtypeError
        Unknown names; levels below 1 where gates are folded.

    Examples
    --------
    >>> from qtx_lab.backends import QiskitQuantumBackend
    >>> how = CircuitMitigation(ZeroNoiseExtrapolation([1, 3]), readout=True)
    >>> how.name
    'readout, richardson 1 3 (local)'
    >>> backend = QiskitQuantumBackend("aer", loader="tree")
    >>> g = torch.Generator().manual_seed(0)
    >>> how.sample_rows(backend, torch.tensor([[0.0, 1.0]]), 100, generator=g).probabilities()
    tensor([[0., 1.]], dtype=torch.float64)
    """

    zne: ZeroNoiseExtrapolation | SharedDecay | None = None
    readout: bool = False
    loader: str | Loader | None = None
    scaling: str = "local"

    def __post_init__(self) -> None:
        if self.zne is not None and not isinstance(self.zne, ZeroNoiseExtrapolation | SharedDecay):
            raise DtypeError(
                f"zne={self.zne!r} is not allowed: it must be a ZeroNoiseExtrapolation, a SharedDecay or None."
            )
        if self.scaling not in ("model", *FOLDINGS):
            raise unknown_name("scaling", self.scaling, ("model", *FOLDINGS))
        if self.loader is not None:
            make_loader(self.loader)
        if self.zne is not None and self.scaling != "model" and min(self.zne.noise_levels) < 1:
            raise ArgumentError(
                f"noise_levels={list(self.zne.noise_levels)} is not allowed on circuits: 1 is the device's own noise, "
                "and no folding goes below it; 0 would be the answer itself."
            )

    @cached_property
    def name(self) -> str:
        """What is done, in words."""
        parts = [make_loader(self.loader).name] if self.loader else []
        parts += ["readout"] if self.readout else []
        if self.zne is not None:
            levels = " ".join(f"{x:g}" for x in self.zne.noise_levels)
            parts.append(f"{self.zne.method} {levels} ({self.scaling})")
        return ", ".join(parts if self.zne or self.readout else [*parts, "raw"])

    @property
    def levels(self) -> tuple[float, ...]:
        return self.zne.noise_levels if self.zne else (1.0,)

    def allocate(self, shots: int) -> list[int]:
        """Shots of each level."""
        return self.zne.allocate(shots) if self.zne else [shots]

    def variants(self, backend: QiskitQuantumBackend) -> list[QiskitQuantumBackend]:
        """The backend with the loader, at each level."""
        kept = _VARIANTS.setdefault(backend, {})
        out = []
        for level in self.levels:
            scaling = self.scaling if self.zne and level != 1 else None
            loader = make_loader(self.loader) if self.loader else None
            how = (
                (type(loader), str(sorted(getattr(loader, "__dict__", {}).items())))
                if loader
                else backend.loader
            )
            key = (how, backend.engine, backend.optimization_level, level, scaling)
            if key not in kept:
                other = backend.with_loader(loader) if loader else backend
                if scaling is not None:
                    other = scale_noise(other, level, scaling)
                if other is backend:  # it would keep itself alive
                    out.append(backend)
                    continue
                kept[key] = other
            out.append(kept[key])
        return out

    def check(self, backend: QiskitQuantumBackend, n: int) -> None:
        """Refuse, before any work, what cannot be done with rows of n keys on this backend.

        Raises
        ------
        ArgumentError, BackendUnavailable
        """
        for variant in self.variants(backend):
            circuit = variant.transpiled(n)
            if circuit.num_clbits > MOST_BITS:
                raise ArgumentError(
                    f"{n} keys take {circuit.num_clbits} bits with the loader {variant.loader.name!r}; at most "
                    f"{MOST_BITS} are mitigated: take 'tree' or 'dynamic'."
                )
            if self.readout and not can_undo(variant.loader, is_static(circuit)):
                raise ArgumentError(
                    f"The readout of the loader {variant.loader.name!r} cannot be undone: it measures on the way."
                )
        attained = self.attained(backend, n)
        if len(set(attained)) < len(attained):
            raise ArgumentError(
                f"noise_levels={list(self.levels)} become {attained} on this circuit, which has too few gates to fold: "
                "take levels further apart, or scaling='local'."
            )

    def attained(self, backend: QiskitQuantumBackend, n: int) -> list[float]:
        """The levels that the circuits have in truth; see `fold`."""
        metadata = [variant.transpiled(n).metadata or {} for variant in self.variants(backend)]
        return [float(x.get("noise_level", level)) for x, level in zip(metadata, self.levels, strict=True)]

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows; see `Mitigation`.

        Returns
        -------
        RowCounts
            `counts` and `discarded` are of all levels together; `estimate` and `std_error` are what is made of them.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As `QiskitQuantumBackend.sample_rows`; as `check`.
        """
        request = checked_request(backend, p, shots, generator)
        p = request.p
        if 0 in self.levels:
            warnings.warn(
                "noise_levels holds 0, which is the answer itself: only a simulator can give it.",
                FallbackWarning,
                stacklevel=2,
            )
        each = self.allocate(shots)
        if not bool(request.running.any()):
            return backend.sample_rows(p, shots, generator=generator)
        n = p.shape[-1]
        self.check(backend, n)
        variants = self.variants(backend)
        errors = [readout_errors(v, n, seed=request.seed) for v in variants] if self.readout else None
        running = request.running
        measured = [
            register_counts(v, v.transpiled(n), v.loader.angles(p[running]), count, request.seed + 7919 * i)
            for i, (v, count) in enumerate(zip(variants, each, strict=True))
        ]
        estimate = self.combine(backend, p[running], measured, errors)
        counts, _ = keep_keys(torch.stack(measured).sum(0), register_keys(variants[0], n), p[running] > 0)
        return counted(
            request,
            counts,
            estimate.p,
            estimate.std_error,
            {
                **variants[0].diagnostics(variants[0].transpiled(n), request),
                "mitigation": self.name,
                "shots_by_level": dict(zip(self.levels, each, strict=True)),
                "fallbacks": estimate.fallbacks,
            },
        )

    def combine(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        measured: Sequence[Tensor],
        errors: Sequence[Tensor] | None,
    ) -> Mitigated:
        """What the register counts of each level (R, V) say about rows on the keys of p (R, n), with readout errors known.

        Expectations of very many shots in place of counts give what infinitely many would.
        """
        variants = self.variants(backend)
        n = p.shape[-1]
        values, variances = [], []
        for level, counts in enumerate(measured):
            shots = counts.sum(-1, keepdim=True).double()
            shares = counts / shots
            if errors is None:
                value, variance = shares, shares * (1 - shares) / shots
            elif isinstance(variants[0].loader, DynamicLoader):
                value, variance = undo_dynamic_readout(counts, errors[level])
            else:
                value = undo_readout(shares, errors[level])
                variance = (undo_readout(shares, errors[level], squared=True) - value.square()) / shots
            values.append(value)
            variances.append(variance.clamp_min(0))
        fallbacks: tuple[str, ...] = ()
        value, variance = values[0], variances[0]
        if self.zne is not None:
            levels = self.attained(backend, n)
            extrapolated = self.zne.extrapolate(values, [v.sqrt() for v in variances], levels=levels)
            assert extrapolated.std_error is not None
            value, variance = extrapolated.output, extrapolated.std_error.square()
            fallbacks = extrapolated.fallbacks
        keys, signs = register_keys(variants[0], n), register_signs(variants[0], n)
        kept, _ = keep_keys(value * signs, keys, p > 0)
        variance, _ = keep_keys(variance, keys, p > 0)
        mass = kept.sum(-1, keepdim=True)
        told = mass > 0
        if not bool(told.all()):
            fallbacks += (
                f"Of {int((~told).sum())} of {len(p)} rows nothing was left on their keys: their weights are 0.",
            )
        mass = mass.where(told, torch.ones_like(mass))
        found = project_to_simplex(kept / mass, p > 0)
        return Mitigated(found.where(told, 0), (variance.sqrt() / mass).where(told, torch.nan), fallbacks)


@dataclass(frozen=True, eq=False)
class Mitigated:
    """Mitigated rows.

    Parameters
    ----------
    p : Tensor, float64, (R, n)
    std_error : Tensor, float64, (R, n)
        Before the projection, which can only bring a row closer to every distribution. NaN in a row of which all shots
        were lost, whose p is 0.
    fallbacks : tuple of str
    """

    p: Tensor
    std_error: Tensor
    fallbacks: tuple[str, ...] = ()


def counted(
    request: RowRequest,
    counts: Tensor,
    estimate: Tensor,
    std_error: Tensor,
    diagnostics: dict[str, Any],
) -> RowCounts:
    """The result for all rows of a request, of what was found for those that were run; all other shots were discarded."""
    at = request.running.nonzero()[:, 0]

    def all_rows(x: Tensor) -> Tensor:
        return x.new_zeros(request.p.shape).index_copy(0, at, x)

    spent = request.shots * request.running.long()
    classical = request.classical()
    baseline = {"device": "pseudo-random numbers"}
    kept = all_rows(counts)
    return RowCounts(
        kept,
        spent - kept.sum(-1),
        request.shots,
        RowCounts(classical, spent - classical.sum(-1), request.shots, diagnostics=baseline),
        diagnostics,
        all_rows(estimate),
        all_rows(std_error),
    )


def register_counts(
    backend: QiskitQuantumBackend, circuit: QuantumCircuit, bindings: np.ndarray, shots: int, seed: int
) -> Tensor:
    """How often each value of the register was measured with each of the bindings, int64 (R, 2^bits)."""
    step = rows_at_once(shots)
    parts = []
    for start in range(0, len(bindings), step):
        outcomes = backend.engine.run(circuit, bindings[start : start + step], shots, seed + start)
        values = torch.from_numpy(unpack_values(outcomes[:, :shots]))
        counts = torch.zeros(len(values), 1 << circuit.num_clbits, dtype=torch.int64)
        parts.append(counts.scatter_add_(-1, values, torch.ones_like(values)))
    return torch.cat(parts)


def register_probabilities(backend: QiskitQuantumBackend, p: Tensor) -> Tensor:
    """How probable each value of the register is by the calibration that the device reports, float64 (R, 2^bits).

    Raises
    ------
    BackendUnavailable
        If the circuit is too large to be simulated exactly.
    """
    n = p.shape[-1]
    circuit = backend.transpiled(n)
    steps = compile_steps(*backend.engine.calibrated(circuit))
    if steps is None:
        raise BackendUnavailable(f"{circuit.name} for {n} keys is too large to be simulated with its noise.")
    probabilities, values = outcome_probabilities(steps, backend.loader.angles(p))
    out = torch.zeros(len(p), 1 << circuit.num_clbits, dtype=torch.float64)
    out[:, torch.from_numpy(values)] = probabilities
    return out / out.sum(-1, keepdim=True)


def register_keys(backend: QiskitQuantumBackend, n: int) -> Tensor:
    """The key of each value of the register, int64 (2^bits,); -1 for none."""
    bits = backend.transpiled(n).num_clbits
    return torch.from_numpy(backend.loader.keys(pack_values(np.arange(1 << bits), bits), n))


def register_signs(backend: QiskitQuantumBackend, n: int) -> Tensor:
    """What a shot with each value of the register counts, int64 (2^bits,): 1, or what the loader's `signs` say."""
    bits = backend.transpiled(n).num_clbits
    signs = getattr(backend.loader, "signs", None)
    if signs is None:
        return torch.ones(1 << bits, dtype=torch.int64)
    return torch.from_numpy(signs(pack_values(np.arange(1 << bits), bits), n))


def modelled_readout(backend: QiskitQuantumBackend, n: int) -> Tensor:
    """As `readout_errors`, by the calibration that the device reports."""
    from .readout import _measured, checked

    circuit, noise = backend.engine.calibrated(backend.transpiled(n))
    matrices = [noise.readout.get(qubit, np.eye(2)) for qubit in _measured(circuit)]
    return checked(torch.from_numpy(np.stack(matrices)).double(), backend.engine.name)


def checked_request(
    backend: QiskitQuantumBackend, p: Tensor, shots: int, generator: torch.Generator | None
) -> RowRequest:
    """What is asked of a backend, checked; shots are to be said, since levels share them."""
    if not isinstance(backend, QiskitQuantumBackend):
        raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
    check_count("shots", shots)
    return backend.request(p, shots, generator)
