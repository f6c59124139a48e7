"""`MitigationPlanner`: rehearses every way to measure rows on the device's own calibration, and takes the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.aer import AerEngine
from ..checks import check_count
from ..circuits import DynamicLoader, TreeLoader, check_rows
from ..circuits.base import num_bits
from ..errors import ArgumentError, BackendUnavailable, DtypeError
from .circuit import CircuitMitigation, modelled_readout, register_probabilities
from .decay import SharedDecay
from .distillation import MOST as MOST_COPIED
from .distillation import TwoCopyLoader
from .zne import ZeroNoiseExtrapolation

LEVELS = (
    ("richardson", (1, 2)),
    ("richardson", (1, 3)),
    ("richardson", (1, 5)),
    ("exponential", (1, 3)),
    ("exponential", (1, 5)),
    ("linear", (1, 3, 5)),
    ("richardson", (1, 3, 5)),
    ("richardson", (1, 3, 7)),
    ("polynomial", (1, 3, 5, 7)),
)
"""Methods and noise levels that are tried; readout errors are undone first."""

DECAYS = (
    (False, (1, 3)),
    (False, (1, 5)),
    (True, (1, 3)),
    (True, (1, 5)),
    (True, (1, 3, 5)),
    (True, (1, 3, 7)),
)
"""Whether corrected, and noise levels, of `SharedDecay`."""

REHEARSED_ROWS, REHEARSALS = 16, 10
"""Rows a plan is rehearsed on, and how often: expected errors are then known to about 1 %."""

FIRST, SHORTLISTED = 3, 1.3
"""How often all options are rehearsed; and those whose error is at most so many times the least go on."""

ENDLESS = 1e15
"""Shots whose noise does not matter."""

MARGIN = 0.03
"""Part of the raw error that must be gained, or nothing is mitigated."""


@dataclass(frozen=True)
class Prediction:
    """What is expected of an option.

    Parameters
    ----------
    option : CircuitMitigation
    error : float
        Total variation from the rows, on average; infinite where the option cannot be used.
    bias : float
        Total variation with infinitely many shots.
    noise : float
        Total variation between what the shots give and what infinitely many would, on average.
    std_error : float
        Of `error`: rehearsals are few.
    trouble : str
        Why it cannot be used.
    """

    option: CircuitMitigation
    error: float
    bias: float
    noise: float
    std_error: float = 0.0
    trouble: str = ""


@dataclass(frozen=True)
class Plan:
    """What the planner picked, and why.

    Parameters
    ----------
    choice, raw : Prediction
        What was picked; the backend's own counts.
    predictions : tuple of Prediction
        All options, best first.
    shots : int
        Of each row.
    reason : str
    """

    choice: Prediction
    raw: Prediction
    predictions: tuple[Prediction, ...]
    shots: int
    reason: str

    def __str__(self) -> str:
        lines = [
            f"{self.shots:,} shots a row. {self.reason}",
            f"  {'option':<44}{'error':>8}{'bias':>8}{'noise':>8}",
        ]
        for x in self.predictions:
            numbers = f"{x.error:>8.4f}{x.bias:>8.4f}{x.noise:>8.4f}" if not x.trouble else f"  {x.trouble}"
            lines.append(f"{'→' if x is self.choice else ' '} {x.option.name:<44}{numbers}")
        return "\n".join(lines)


class MitigationPlanner:
    """Measures rows in the way that is expected to miss them least, given how many shots there are.

    Every option is rehearsed on some of the rows: exact outcome probabilities by the errors that the device's
    calibration reports, then the shots that the option would spend, then what it makes of them. So bias, variance, and
    all that projections do to them are in the prediction, as far as the calibration is right. On a device's twin it is
    right by construction; a device differs from its calibration. Where nothing is expected to be 3 % better than the
    backend's own counts, those are taken.

    A `Mitigation` for `CircuitSampler`. Rows are known before they are measured: that is why an option can be rehearsed
    on them, and why circuits have no advantage here.

    Parameters
    ----------
    options : sequence of CircuitMitigation, optional
        What is tried; `default_options` of the backend where None. The backend's own counts are always tried.
    model : QiskitQuantumBackend, optional
        What options are rehearsed on, in place of the backend's own calibration.

    Examples
    --------
    >>> from qtx_lab.backends import ParametricNoise
    >>> noisy = QiskitQuantumBackend("aer", noise=ParametricNoise(two_qubit=0.02, readout=0.02), loader="tree")
    >>> p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    >>> plan = MitigationPlanner().plan(noisy, p, 100_000, generator=torch.Generator().manual_seed(0))
    >>> plan.choice.option.readout, plan.choice.error < plan.raw.error / 2
    (True, True)
    """

    name = "planner"

    def __init__(
        self,
        options: Sequence[CircuitMitigation] | None = None,
        *,
        model: QiskitQuantumBackend | None = None,
    ):
        for option in options or ():
            if not isinstance(option, CircuitMitigation):
                raise DtypeError(f"options holds {option!r}; it must hold CircuitMitigation only.")
        if model is not None and not isinstance(model, QiskitQuantumBackend):
            raise DtypeError(f"model is a {type(model).__name__}; it must be a QiskitQuantumBackend.")
        self.options, self.model = None if options is None else tuple(options), model

    def plan(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """What to do with rows p (R, n), `shots` in all for each.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            As for `sample_rows`; if no row has mass.
        """
        if not isinstance(backend, QiskitQuantumBackend):
            raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
        check_count("shots", shots)
        p = check_rows(p)
        p = p[p.sum(-1) > 0]
        if not len(p):
            raise ArgumentError("p has no row with mass: there is nothing to plan.")
        device = "cpu" if generator is None else generator.device
        rng = np.random.default_rng(int(torch.randint(2**31 - 1, (), generator=generator, device=device)))
        some = rng.choice(len(p), min(len(p), REHEARSED_ROWS), replace=False)  # rows may repeat with a period
        rows = p[torch.from_numpy(np.sort(some))]
        options = default_options(backend, p.shape[-1]) if self.options is None else self.options
        raw = CircuitMitigation()
        stage = Rehearsal(self.model or backend, rows)
        found = {o: stage.predict(o, shots, FIRST, rng) for o in (raw, *(o for o in options if o != raw))}
        near = SHORTLISTED * min(x.error for x in found.values())
        repeats = max(REHEARSALS, min(2 * REHEARSALS, REHEARSALS * REHEARSED_ROWS // len(rows)))
        # Those that may win are rehearsed anew and more often, so that luck does not carry over.
        shortlist = [option for option, x in found.items() if option is raw or x.error <= near]
        found |= {option: stage.predict(option, shots, repeats, rng) for option in shortlist}
        # The best of several that are known roughly only is best by luck too: twice the doubt counts against it.
        best = min((found[option] for option in shortlist), key=lambda x: x.error + 2 * x.std_error)
        if not best.error + 2 * best.std_error <= (1 - MARGIN) * found[raw].error:
            best = found[raw]
        return Plan(
            best,
            found[raw],
            tuple(sorted(found.values(), key=lambda x: x.error)),
            shots,
            _reason(best, found[raw], len(found)),
        )

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Plan, then measure; see `Mitigation`.

        Returns
        -------
        RowCounts
            Its diagnostics hold `plan`, `expected_error` and `error`: total variation from the rows, on average.
        """
        p = check_rows(p)
        if not bool((p.sum(-1) > 0).any()):
            return backend.sample_rows(p, shots, generator=generator)
        plan = self.plan(backend, p, shots, generator=generator)
        result = (
            backend.sample_rows(p, shots, generator=generator)
            if plan.choice is plan.raw
            else plan.choice.option.sample_rows(backend, p, shots, generator=generator)
        )
        running = p.sum(-1) > 0
        error = float(total_variation(result.probabilities(), p)[running].mean())
        facts: dict[str, Any] = {
            "mitigation": plan.choice.option.name,
            **result.diagnostics,
            "plan": plan,
            "expected_error": plan.choice.error,
            "error": error,
        }
        return replace(result, diagnostics=facts)


def default_options(backend: QiskitQuantumBackend, n: int) -> tuple[CircuitMitigation, ...]:
    """What is tried for rows of n keys: the backend's loader with and without readout, extrapolated in several ways; two
    copies of few keys; and, on a simulator, the loader without entanglement.

    On a device that one is left out, since its calibration says nothing of what feeding forward costs there.
    """
    own = [CircuitMitigation(), CircuitMitigation(readout=True)]
    if not isinstance(backend.loader, DynamicLoader):
        bits = backend.loader.circuit(backend.loader.size(n)).num_clbits
        zne = [
            ZeroNoiseExtrapolation(levels, method, asymptote=0.5**bits if method == "exponential" else 0.0)
            for method, levels in LEVELS
        ]
        own += [CircuitMitigation(z) for z in zne[1:3]]
        own += [CircuitMitigation(z, readout=True) for z in zne]
        own += [CircuitMitigation(SharedDecay(x, corrected=c), readout=True) for c, x in DECAYS]
        if num_bits(n) <= MOST_COPIED and isinstance(backend.loader, TreeLoader):
            own.append(CircuitMitigation(loader=TwoCopyLoader(), readout=True))
        if isinstance(backend.engine, AerEngine):
            own += [CircuitMitigation(loader="dynamic", readout=readout) for readout in (False, True)]
    return tuple(own)


class Rehearsal:
    """Options tried out on rows by the errors that a device reports; what they share is computed once.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    p : Tensor, float64, (R, n)
        From `check_rows`, each row with mass.
    readout : callable
        (backend, keys) to the readout errors that are undone: `modelled_readout`, or `readout_errors` for those that
        were measured.
    """

    def __init__(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        readout: Callable[[QiskitQuantumBackend, int], Tensor] = modelled_readout,
    ):
        self.backend, self.p, self._readout = backend, p, readout
        self._outcomes: dict[QiskitQuantumBackend, Tensor] = {}
        self._errors: dict[QiskitQuantumBackend, Tensor] = {}

    def predict(
        self, option: CircuitMitigation, shots: int, repeats: int, rng: np.random.Generator
    ) -> Prediction:
        """What `option` gives with `shots` a row, from `repeats` rehearsals."""
        try:
            each = option.allocate(shots)
            option.check(self.backend, self.p.shape[-1])
            outcomes, errors = self._expected(option)
            limit = option.combine(self.backend, self.p, [ENDLESS * x for x in outcomes], errors).p
        except (ArgumentError, BackendUnavailable, torch.linalg.LinAlgError) as error:
            return Prediction(option, inf, inf, inf, trouble=str(error))
        misses, noises = [], []
        for _ in range(repeats):
            drawn = [
                torch.from_numpy(rng.multinomial(count, x.numpy()))
                for count, x in zip(each, outcomes, strict=True)
            ]
            got = option.combine(self.backend, self.p, drawn, errors).p
            misses.append(float(total_variation(got, self.p).mean()))
            noises.append(float(total_variation(got, limit).mean()))
        bias = float(total_variation(limit, self.p).mean())
        known = stdev(misses) / repeats**0.5 if repeats > 1 else 0.0
        return Prediction(option, fmean(misses), bias, fmean(noises), known)

    def _expected(self, option: CircuitMitigation) -> tuple[list[Tensor], list[Tensor] | None]:
        variants = option.variants(self.backend)
        for v in variants:
            if v not in self._outcomes:
                self._outcomes[v] = register_probabilities(v, self.p)
            if option.readout and v not in self._errors:
                self._errors[v] = self._readout(v, self.p.shape[-1])
        return [self._outcomes[v] for v in variants], (
            [self._errors[v] for v in variants] if option.readout else None
        )


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the sum of absolute differences, (..., n) -> (...)."""
    return (a - b).abs().sum(-1) / 2


def _reason(best: Prediction, raw: Prediction, count: int) -> str:
    if raw.trouble and best is not raw:
        return (
            f"{best.option.name!r} is expected to miss by {best.error:.4f}; what the counts themselves would miss by could "
            f"not be rehearsed. {raw.trouble}"
        )
    if raw.trouble:
        return f"Nothing was mitigated: no option could be rehearsed. {raw.trouble}"
    if best is raw:
        return (
            f"Nothing was mitigated: of {count} options none is expected to be {MARGIN:.0%} better than "
            f"the error {raw.error:.4f} of the counts themselves."
        )
    return (
        f"{best.option.name!r} is expected to miss by {best.error:.4f} (bias {best.bias:.4f}, noise {best.noise:.4f}), "
        f"the counts themselves by {raw.error:.4f} (bias {raw.bias:.4f}, noise {raw.noise:.4f})."
    )
