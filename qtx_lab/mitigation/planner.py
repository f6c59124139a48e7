"""`MitigationPlanner`: rehearses all ways to measure rows on the device's calibration, and takes the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..backends import QiskitQuantumBackend, RowCounts
from ..backends.aer import AerEngine
from ..backends.requests import PlannedRun
from ..checks import check_count
from ..circuits import TreeLoader, check_rows
from ..circuits.base import num_bits
from ..circuits.fidelity import total_variation_distance
from ..errors import ArgumentError, DtypeError, ShapeError
from .boundary import HelpBoundary, rows_boundary
from .circuit import CircuitMitigation
from .decay import SharedDecay
from .distillation import MAX_COPY_QUBITS, TwoCopyLoader
from .pec import ProbabilisticErrorCancellation
from .rehearsal import Prediction, Rehearsal
from .results import bias_aware_std_error, check_backend
from .zne import ZeroNoiseExtrapolation

EXTRAPOLATIONS = (
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
"""Methods and noise levels of `ZeroNoiseExtrapolation` that are tried, with readout errors undone."""

RAW_EXTRAPOLATIONS = (("richardson", (1, 3)), ("richardson", (1, 5)))
"""Those that are tried without undoing readout errors."""

SHARED_DECAYS = (
    (False, (1, 3)),
    (False, (1, 5)),
    (True, (1, 3)),
    (True, (1, 5)),
    (True, (1, 3, 5)),
    (True, (1, 3, 7)),
)
"""`corrected` and noise levels of `SharedDecay` that are tried."""

PAULI_EXTRAPOLATIONS = (("richardson", (1, 2)), ("exponential", (1, 3)))
"""Those that are tried with amplified Pauli errors in place of folded gates."""

REHEARSED_ROWS = 16
"""Most rows on which a plan is rehearsed."""

FIRST_REHEARSALS = 3
"""Rehearsals of every option."""

REHEARSALS = 10
"""Rehearsals of the shortlisted options. With 16 rows, expected errors are then known to about 1 %."""

SHORTLIST_RATIO = 1.3
"""An option is shortlisted if its error is at most this many times the least error."""

MIN_GAIN = 0.03
"""Part of the raw error that an option has to save, or nothing is mitigated."""

Option: TypeAlias = CircuitMitigation | ProbabilisticErrorCancellation
"""A way to measure rows."""


@dataclass(frozen=True)
class Plan:
    """What the planner chose, and why.

    Parameters
    ----------
    choice : Prediction
        The option that was chosen.
    raw : Prediction
        The backend's own counts, without mitigation.
    predictions : tuple of Prediction
        All options, the best first.
    shots : int
        Shots of each row.
    reason : str
        Why it was chosen, in a sentence.
    rehearsed_on : str
        Which rows the options were rehearsed on: what the planner knew when it chose.
    """

    choice: Prediction
    raw: Prediction
    predictions: tuple[Prediction, ...]
    shots: int
    reason: str
    rehearsed_on: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.shots:,} shots a row. {self.reason}",
            f"Rehearsed on {self.rehearsed_on}.",
            f"  {'option':<44}{'error':>8}{'bias':>8}{'noise':>8}",
        ]
        for x in self.predictions:
            numbers = f"{x.error:>8.4f}{x.bias:>8.4f}{x.noise:>8.4f}" if not x.problem else f"  {x.problem}"
            lines.append(f"{'→' if x is self.choice else ' '} {x.option.name:<44}{numbers}")
        return "\n".join(lines)


class MitigationPlanner:
    """Measures rows in the way that is expected to have the least error with the given number of shots.

    Every option is rehearsed on some of the rows: the outcome probabilities are computed from the errors that
    the device's calibration reports, the shots that the option would spend are drawn from them, and the
    option estimates the rows. So the prediction contains bias, variance and everything that projections do to
    them, as far as the calibration is right. On a device's twin it is right by construction; a real device
    differs from its calibration. If no option is expected to be 3 % better than the backend's own counts,
    those are used.

    `CircuitSampler` takes the planner as its `mitigation`. The rows are known before they are measured. That
    is why options can be rehearsed on them, and also why circuits have no advantage here. A comparison with
    other mitigations has to say so: `Plan.rehearsed_on` and the diagnostics name the rows that the planner
    knew. With `rows` it is rehearsed on others like them, and does not look at those that it measures.

    Parameters
    ----------
    options : sequence of CircuitMitigation or ProbabilisticErrorCancellation, optional
        Options to try; `default_options` of the backend if None. The backend's own counts are always tried.
    model : QiskitQuantumBackend, optional
        Backend on which options are rehearsed, in place of the backend's own calibration.
    rows : Tensor, (R, n), optional
        Rows of probabilities on which options are rehearsed, in place of those that are measured.

    Raises
    ------
    DtypeError
        If options holds something else, or model is not a backend.
    ShapeError, DtypeError, ArgumentError
        If rows are not rows of probabilities, or all of their keys are masked.

    Examples
    --------
    >>> from qtx_lab.backends import ParametricNoise
    >>> noise = ParametricNoise(two_qubit=0.02, readout=0.02)
    >>> noisy = QiskitQuantumBackend("aer", noise=noise, loader="tree")
    >>> p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    >>> plan = MitigationPlanner().plan(noisy, p, 100_000, generator=torch.Generator().manual_seed(0))
    >>> plan.choice.option.readout, plan.choice.error < plan.raw.error / 2
    (True, True)
    """

    name = "planner"

    def __init__(
        self,
        options: Sequence[Option] | None = None,
        *,
        model: QiskitQuantumBackend | None = None,
        rows: Tensor | None = None,
    ):
        for option in options or ():
            if not isinstance(option, CircuitMitigation | ProbabilisticErrorCancellation):
                raise DtypeError(
                    f"options holds {option!r}; it must hold CircuitMitigation and "
                    "ProbabilisticErrorCancellation only."
                )
        if model is not None:
            check_backend(model, "model")
        self.options, self.model = None if options is None else tuple(options), model
        self.rows = None if rows is None else _rows_with_keys(rows, "rows")

    def plan(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Choose how to measure rows.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            Rows of probabilities.
        shots : int
            Shots of each row, over all noise levels.
        generator : torch.Generator, optional
            The only source of randomness.

        Returns
        -------
        Plan

        Raises
        ------
        ArgumentError, ShapeError, DtypeError
            As `sample_rows`; also if every key of every row is masked, or if the planner's own rows have
            another number of keys.
        """
        check_backend(backend)
        shots = check_count("shots", shots)
        p = _rows_with_keys(p, "p")
        if self.rows is not None and self.rows.shape[-1] != p.shape[-1]:
            raise ShapeError(
                f"The planner's rows have {self.rows.shape[-1]} keys and p has {p.shape[-1]}; they must have "
                "the same."
            )
        known, whose = (p, "rows themselves") if self.rows is None else (self.rows, "other rows")
        device = "cpu" if generator is None else generator.device
        rng = np.random.default_rng(int(torch.randint(2**31 - 1, (), generator=generator, device=device)))
        count = min(len(known), REHEARSED_ROWS)
        some = rng.choice(len(known), count, replace=False)  # rows may repeat with a period
        rows = known[torch.from_numpy(np.sort(some))]
        options = default_options(backend, p.shape[-1]) if self.options is None else self.options
        raw = CircuitMitigation(readout=False)
        rehearsal = Rehearsal(self.model or backend, rows)
        predictions = {
            option: rehearsal.predict(option, shots, FIRST_REHEARSALS, rng)
            for option in (raw, *(option for option in options if option != raw))
        }
        limit = SHORTLIST_RATIO * min(x.error for x in predictions.values())
        repeats = max(REHEARSALS, min(2 * REHEARSALS, REHEARSALS * REHEARSED_ROWS // len(rows)))
        # The shortlist is rehearsed anew and more often, so that luck in the first rehearsals does not count.
        shortlist = [option for option, x in predictions.items() if option is raw or x.error <= limit]
        predictions |= {option: rehearsal.predict(option, shots, repeats, rng) for option in shortlist}
        # The best of several rough estimates is also the luckiest: two standard errors count against each.
        best = min((predictions[option] for option in shortlist), key=lambda x: x.error + 2 * x.std_error)
        if not best.error + 2 * best.std_error <= (1 - MIN_GAIN) * predictions[raw].error:
            best = predictions[raw]
        return Plan(
            best,
            predictions[raw],
            tuple(sorted(predictions.values(), key=lambda x: x.error)),
            shots,
            _reason(best, predictions[raw], len(predictions)),
            f"{count} of the {len(known)} {whose}",
        )

    def help_boundary(
        self, backend: QiskitQuantumBackend, p: Tensor, zne: ZeroNoiseExtrapolation
    ) -> HelpBoundary:
        """Compute in closed form where an extrapolation helps the rows on which the planner rehearses.

        The boundary is about mean squared errors (`Prediction.mean_square`) by noise in units of the
        simulator's own; errors are as for `rows_boundary`.

        Examples
        --------
        >>> from qtx_lab.backends import ParametricNoise
        >>> backend = QiskitQuantumBackend("aer", noise=ParametricNoise(two_qubit=0.01), loader="tree")
        >>> p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
        >>> boundary = MitigationPlanner().help_boundary(backend, p, ZeroNoiseExtrapolation([1, 3]))
        >>> f"{boundary.shots(noise=1):.2g} shots, {boundary.shots(noise=0.1):.2g} with a tenth of the noise"
        '4.2e+05 shots, 4.2e+07 with a tenth of the noise'
        """
        return rows_boundary(self.model or backend, p if self.rows is None else self.rows, zne)

    def expected_bias(self, backend: QiskitQuantumBackend, p: Tensor, option: Option) -> Tensor:
        """Compute the bias that an option is expected to leave in rows, by the errors that the planner knows.

        Parameters
        ----------
        backend : QiskitQuantumBackend
        p : Tensor, (R, n)
            Rows of probabilities, each with a key above 0.
        option : CircuitMitigation or ProbabilisticErrorCancellation

        Returns
        -------
        Tensor, float64, (R, n)
            For each key; where the planner has rows of its own, the root mean square over their keys.

        Raises
        ------
        ArgumentError, BackendUnavailable
            If the option cannot measure these rows.
        """
        known = p if self.rows is None else self.rows
        bias = Rehearsal(self.model or backend, known).limit(option) - known
        return bias if self.rows is None else bias.square().mean().sqrt().expand(p.shape)

    def planned_runs(self, backend: QiskitQuantumBackend, p: Tensor, shots: int) -> list[PlannedRun]:
        """List what `sample_rows` would run with the option that is chosen by a generator of its own.

        See `CircuitMitigation.planned_runs`. Other rehearsals may choose another option.
        """
        option = self.plan(backend, p, shots, generator=torch.Generator().manual_seed(0)).choice.option
        return option.planned_runs(backend, p, shots)

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Plan, measure rows and mitigate them; arguments are those of `Mitigation.sample_rows`.

        Returns
        -------
        RowCounts
            Its standard errors allow for the bias that the choice is expected to leave
            (`bias_aware_std_error`); those of raw counts do not. Its diagnostics hold `plan`, `rehearsed_on`,
            `expected_error` and `error`: the rows that the planner knew, and the expected and the attained
            total variation between estimated and true rows, mean over rows.

        Raises
        ------
        ArgumentError, ShapeError, DtypeError, BackendUnavailable
            As `QiskitQuantumBackend.sample_rows`.
        """
        p = check_rows(p)
        running = p.sum(-1) > 0
        if not bool(running.any()):
            return backend.sample_rows(p, shots, generator=generator)
        plan = self.plan(backend, p, shots, generator=generator)
        if plan.choice is plan.raw:
            result = backend.sample_rows(p, shots, generator=generator)
        else:
            option = plan.choice.option
            result = option.sample_rows(backend, p, shots, generator=generator, rehearse=False)
            assert result.std_error is not None
            bias = torch.zeros_like(p)
            bias[running] = self.expected_bias(backend, p[running], option)
            result = replace(result, std_error=bias_aware_std_error(result.std_error, bias))
        error = total_variation_distance(result.probabilities(), p)[running].mean()
        diagnostics = {
            "mitigation": plan.choice.option.name,
            **result.diagnostics,
            "plan": plan,
            "rehearsed_on": plan.rehearsed_on,
            "expected_error": plan.choice.error,
            "error": float(error),
        }
        return replace(result, diagnostics=diagnostics)


def _rows_with_keys(p: Tensor, argument: str) -> Tensor:
    """Rows that `check_rows` returned and that have a key of probability above 0, or an error."""
    checked = check_rows(p)
    checked = checked[checked.sum(-1) > 0]
    if not len(checked):
        raise ArgumentError(
            f"{argument} has no row with a key of probability above 0: there is nothing to plan."
        )
    return checked


def default_options(backend: QiskitQuantumBackend, n: int) -> tuple[Option, ...]:
    """List the options to try for rows of n keys.

    These are the backend's loader with readout errors undone or not, and extrapolated in several ways; two
    copies of rows of few keys; and on a simulator error cancellation, extrapolation from amplified Pauli
    errors, and the loader without entanglement. On a device these are left out, because the calibration
    does not say what the Pauli errors are, nor what feeding forward costs there.
    """
    options: list[Option] = [CircuitMitigation(readout=False), CircuitMitigation()]
    if backend.loader.feeds_forward:
        return tuple(options)
    bits = backend.loader.circuit(backend.loader.size(n)).num_clbits

    def extrapolation(method: str, levels: Sequence[float]) -> ZeroNoiseExtrapolation:
        asymptote = 0.5**bits if method == "exponential" else 0.0
        return ZeroNoiseExtrapolation(levels, method, asymptote=asymptote)

    options += [CircuitMitigation(extrapolation(*x), readout=False) for x in RAW_EXTRAPOLATIONS]
    options += [CircuitMitigation(extrapolation(*x)) for x in EXTRAPOLATIONS]
    options += [
        CircuitMitigation(SharedDecay(levels, corrected=corrected)) for corrected, levels in SHARED_DECAYS
    ]
    if num_bits(n) <= MAX_COPY_QUBITS and isinstance(backend.loader, TreeLoader):
        options.append(CircuitMitigation(loader=TwoCopyLoader()))
    if isinstance(backend.engine, AerEngine):
        options += [ProbabilisticErrorCancellation()]
        options += [CircuitMitigation(extrapolation(*x), scaling="pauli") for x in PAULI_EXTRAPOLATIONS]
        options += [CircuitMitigation(SharedDecay((1, 3)), scaling="pauli")]
        options += [CircuitMitigation(loader="dynamic", readout=readout) for readout in (False, True)]
    return tuple(options)


def _reason(best: Prediction, raw: Prediction, count: int) -> str:
    if raw.problem and best is not raw:
        return (
            f"{best.option.name!r} is expected to have an error of {best.error:.4f}. The raw counts could "
            f"not be rehearsed: {raw.problem}"
        )
    if raw.problem:
        return f"Nothing was mitigated, because no option could be rehearsed: {raw.problem}"
    if best is raw:
        return (
            f"Nothing was mitigated: none of {count} options is expected to be {100 * MIN_GAIN:.0f} % better "
            f"than the raw counts, whose expected error is {raw.error:.4f}."
        )
    return (
        f"{best.option.name!r} is expected to have an error of {best.error:.4f} (bias {best.bias:.4f}, noise "
        f"{best.noise:.4f}), the raw counts {raw.error:.4f} (bias {raw.bias:.4f}, noise {raw.noise:.4f})."
    )
