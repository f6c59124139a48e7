"""`CircuitSampler`: draws from attention rows by measuring circuits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..circuits import Loader, make_loader
from ..errors import BackendUnavailable, CostError, DtypeError, FallbackWarning
from ..estimates import Draws
from ..samplers import Sampler
from ..samplers.base import check_draw_arguments
from ..samplers.inversion import row_masses
from .counts import RowCounts, draw_counts
from .hybrid import HybridPolicy
from .qiskit import PlannedMitigation, QiskitQuantumBackend
from .requests import PlannedRun


@runtime_checkable
class Mitigation(Protocol):
    """A way to measure rows on a backend that corrects for its noise."""

    name: str
    """What is done, in a few words."""

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Measure rows, with the arguments and the result of `QiskitQuantumBackend.sample_rows`.

        `shots` is the whole budget of a row.
        """
        ...


class CircuitSampler(Sampler):
    """A sampler that loads each row into a circuit and measures it: each shot is a draw.

    On an ideal simulator with an exact loader, draws have the distribution of those of `monte-carlo`, and are
    no better: unbiased, with the variance of independent draws. On a device, or its twin, draws come from the
    distribution that noise makes of the row. They are biased by up to the total variation between the two, so
    that error bars come from replicates and show the variance only.

    Shots that give no key (padding, a masked key, a wrong Hamming weight) are discarded, and the others have
    the weight 1 / valid shots. So masked keys are never drawn. A row whose shots are all discarded has weight
    0 and is reported.

    Parameters
    ----------
    backend : QiskitQuantumBackend
        Where circuits are run.
    loader : str or Loader, optional
        Used in place of the backend's.
    mitigation : Mitigation, optional
        Measures the rows, with `num_samples` shots for each replicate. Each key is drawn as often as its
        mitigated probability times `num_samples` says, rounded up or down at random.
    hybrid_mode : bool or HybridPolicy
        With a policy, rows that it does not send to the backend, or that the backend cannot run or not within
        the limits of its cost, are drawn by pseudo-random numbers. A FallbackWarning gives each reason once,
        and `diagnostics` all of them. True is `HybridPolicy()`. With False, a backend that cannot run is an
        error.

    Raises
    ------
    DtypeError
        If an argument has the wrong type.
    ArgumentError
        If the loader's name is unknown.

    Source: Grover and Rudolph, Creating superpositions that correspond to efficiently integrable probability
    distributions (2002), for measuring a loaded distribution. Discarding shots is post-selection on a
    symmetry.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> sampler = CircuitSampler(QiskitQuantumBackend("aer"))
    >>> sampler.draw(torch.tensor([0.0, -torch.inf, 0.0]), 4, generator=g).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    name = "circuit"
    classical_baseline = "monte-carlo"  # draws as an ideal circuit does

    def __init__(
        self,
        backend: QiskitQuantumBackend,
        loader: str | Loader | None = None,
        mitigation: Mitigation | None = None,
        *,
        hybrid_mode: bool | HybridPolicy = False,
    ):
        if not isinstance(backend, QiskitQuantumBackend):
            raise DtypeError(f"backend is a {type(backend).__name__}; it must be a QiskitQuantumBackend.")
        if not isinstance(hybrid_mode, bool | HybridPolicy):
            raise DtypeError(f"hybrid_mode={hybrid_mode!r}: it must be True, False or a HybridPolicy.")
        if mitigation is not None and not isinstance(mitigation, Mitigation):
            raise DtypeError(
                f"mitigation={mitigation!r} cannot measure rows: it must have a `name` and `sample_rows`."
            )
        self.backend = backend if loader is None else backend.with_loader(make_loader(loader))
        self.mitigation = mitigation
        self.policy = HybridPolicy() if hybrid_mode is True else hybrid_mode or None
        self.unbiased = self.backend.engine.ideal and self.backend.loader.exact and mitigation is None
        self.independent = self.unbiased
        self.exchangeable = mitigation is None  # shots are independent, whether they come from p or not
        self.last_facts: Mapping[str, Any] = {}
        self._warned: set[str] = set()

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """Facts about the latest draw.

        Those of `RowCounts`, and `quantum_rows`, `classical_rows`, `discarded_shots` (of each row) and
        `fallbacks`.
        """
        return self.last_facts

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys; arguments and result as for `Sampler.draw`.

        Raises
        ------
        BackendUnavailable
            If the backend cannot run, and there is no policy.
        CostError
            If all replicates together cost more than is allowed, and there is no policy. Nothing is sent.
        """
        num_samples, replicates = check_draw_arguments(logits, num_samples, replicates)
        *rows, n = logits.shape
        mass = row_masses(logits.reshape(-1, n).to("cpu", torch.float64))[:, :n]
        p = mass / mass.sum(-1, keepdim=True).clamp_min(1)
        total = num_samples * replicates
        if self.mitigation is None:
            result = self.measure(p, total, generator=generator)
            keys, weights = deal(result.counts, total, replicates, generator)
        else:  # replicates are mitigated one by one, so that their spread is that of mitigated rows
            with self._reserved(p, num_samples, replicates) as refused:
                counts = torch.stack(
                    [self._mitigated_counts(p, num_samples, generator, refused) for _ in range(replicates)],
                    dim=1,
                ).flatten(0, 1)
            keys, weights = (x.reshape(len(p), total) for x in deal(counts, num_samples, 1, generator))
            filled = (weights.view(len(p), replicates, -1).sum(-1) > 0).sum(-1, keepdim=True)
            weights = weights / filled.clamp_min(1)
        probabilities = p.gather(-1, keys).view(*rows, total).to(logits) if self.unbiased else None
        return Draws(
            keys.view(*rows, total).to(logits.device),
            weights.view(*rows, total).to(logits),
            probabilities,
            replicates,
        )

    def measure(self, p: Tensor, shots: int, *, generator: torch.Generator | None = None) -> RowCounts:
        """Measure rows on the backend or, where the policy says so, draw them classically.

        Parameters
        ----------
        p : Tensor, (R, n)
            Probabilities. A row of all zeros is not drawn.
        shots : int
            Shots of each row.
        generator : torch.Generator, optional
            The only source of randomness.

        Returns
        -------
        RowCounts
            Its diagnostics are those of the sampler.

        Raises
        ------
        BackendUnavailable
            If the backend cannot run, and there is no policy.
        CostError
            If it would cost more than is allowed, and there is no policy. Nothing is sent.
        """
        with self._reserved(p, shots, 1) as refused:
            return self._measure(p, shots, generator, refused)

    @contextmanager
    def _reserved(self, p: Tensor, shots: int, times: int) -> Iterator[tuple[str, ...]]:
        """While this lasts, rows may be measured so often; why they may not, where a policy then draws them.

        Measurements that belong together are paid for together, or none of them is sent.
        """
        refused: tuple[str, ...] = ()
        with ExitStack() as stack:
            try:
                runs = self._planned_runs(p, shots, times) if times > 1 else []
                stack.enter_context(self.backend.engine.reserved(runs))
            except (BackendUnavailable, CostError) as error:
                if self.policy is None:
                    raise
                refused = (str(error),)
            yield refused

    def _planned_runs(self, p: Tensor, shots: int, times: int) -> list[PlannedRun]:
        """All that is known to be run where rows are measured so often with the mitigation."""
        mitigation: object = self.mitigation  # mypy knows no object that keeps both protocols
        if not self.backend.engine.queues or not isinstance(mitigation, PlannedMitigation):
            return []
        running = p.sum(-1) > 0
        if self.policy is not None:
            running &= self.policy.decide(self.backend, p)[0]
        if not bool(running.any()):
            return []
        planned = mitigation.planned_runs(self.backend, p[running], shots)
        return [run for run in planned for _ in range(1 if run.kept else times)]

    def _measure(
        self, p: Tensor, shots: int, generator: torch.Generator | None, refused: tuple[str, ...]
    ) -> RowCounts:
        """`measure` inside what is reserved for it, or refused."""
        quantum = torch.ones(len(p), dtype=torch.bool)
        reasons: tuple[str, ...] = ()
        if self.policy is None:
            result = self._measure_on_backend(p, shots, generator)
        else:
            quantum, reasons = self.policy.decide(self.backend, p)
            if refused:
                quantum, reasons = torch.zeros_like(quantum), (*reasons, *refused)
            part = None
            if bool(quantum.any()):
                used = (p[quantum] > 0).any(0).nonzero()
                width = int(used.amax()) + 1 if len(used) else 1  # these rows need circuits of no more keys
                try:
                    part = self._measure_on_backend(p[quantum, :width], shots, generator)
                except (BackendUnavailable, CostError) as error:
                    reasons, quantum = (*reasons, str(error)), torch.zeros_like(quantum)
            result = _with_classical_rows(part, p, quantum, shots, generator)
        reasons += tuple(result.diagnostics.get("fallbacks", ()))
        estimate = result.counts if result.estimate is None else result.estimate
        empty = int(((p.sum(-1) > 0) & (estimate.sum(-1) == 0)).sum())
        if empty:
            reasons += (all_discarded(shots, empty, len(p)),)
        self._warn(reasons, int((~quantum).sum()), len(p))
        self.last_facts = {
            **result.diagnostics,
            "quantum_rows": int(quantum.sum()),
            "classical_rows": int((~quantum).sum()),
            "discarded_shots": result.discarded,
            "fallbacks": reasons,
        }
        return replace(result, diagnostics=self.last_facts)

    def _measure_on_backend(self, p: Tensor, shots: int, generator: torch.Generator | None) -> RowCounts:
        if self.mitigation is not None:
            return self.mitigation.sample_rows(self.backend, p, shots, generator=generator)
        return self.backend.sample_rows(p, shots, generator=generator)

    def _mitigated_counts(
        self, p: Tensor, shots: int, generator: torch.Generator | None, refused: tuple[str, ...]
    ) -> Tensor:
        """Counts (R, n) of rows p that are measured and mitigated together."""
        result = self._measure(p, shots, generator, refused)
        return result.counts if result.estimate is None else _round(result.estimate, shots, generator)

    def _warn(self, reasons: tuple[str, ...], classical_rows: int, rows: int) -> None:
        """Warn of each reason once in the life of the sampler."""
        new = [reason for reason in reasons if reason not in self._warned]
        if new:
            self._warned.update(new)
            drawn = f"{classical_rows} of {rows} rows drawn classically. " if classical_rows else ""
            warnings.warn(drawn + " ".join(new), FallbackWarning, stacklevel=5)


def _with_classical_rows(
    part: RowCounts | None, p: Tensor, quantum: Tensor, shots: int, generator: torch.Generator | None
) -> RowCounts:
    """Counts of all rows p (R, n): `part` has those of the quantum rows, the others are drawn here.

    `part` has no more keys than its rows need, and is None where there are no quantum rows.
    """
    classical = ~quantum & (p.sum(-1) > 0)
    drawn = torch.zeros(p.shape, dtype=torch.int64)
    if bool(classical.any()):
        device = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
        drawn[classical] = draw_counts(p[classical], shots, torch.Generator().manual_seed(seed))

    def add(x: Tensor, to: Tensor) -> Tensor:
        """Rows `to` (R, n), which are zero in quantum rows, with x in those."""
        out = to.clone()
        out[quantum, : x.shape[-1]] = x
        return out

    counts, baseline, discarded = drawn, drawn, torch.zeros(len(p), dtype=torch.int64)
    estimate, std_error, diagnostics = None, None, {}
    if part is not None:
        share = drawn.double() / shots
        counts, diagnostics = add(part.counts, drawn), dict(part.diagnostics)
        discarded[quantum] = part.discarded
        if part.classical is not None:
            baseline = add(part.classical.counts, drawn)
        if part.estimate is not None:
            estimate = add(part.estimate, share)
        if part.std_error is not None:
            # These rows are known, so that the error of their draws is, too.
            known = p.double().clamp(0, 1)
            std_error = add(part.std_error, (known * (1 - known) / shots).sqrt() * classical[:, None])
    facts = {"device": "pseudo-random numbers"}
    other = RowCounts(baseline, torch.zeros(len(p), dtype=torch.int64), shots, diagnostics=facts)
    return RowCounts(counts, discarded, shots, other, diagnostics, estimate, std_error)


def _round(p: Tensor, total: int, generator: torch.Generator | None) -> Tensor:
    """Counts (R, n) with the expectations `total` times p (R, n), each rounded up or down at random."""
    device = "cpu" if generator is None else generator.device
    start = torch.rand(len(p), 1, generator=generator, dtype=torch.float64, device=device).cpu()
    ends = (p.cumsum(-1) * total + start).floor().clamp_max(total)
    ends[:, -1:] = total * (p.sum(-1, keepdim=True) > 0)
    # Rounding errors of the sum must not give counts to keys after the last one that has mass.
    last = (p > 0).long().cumsum(-1) == (p > 0).sum(-1, keepdim=True)
    ends = torch.where(last, ends[:, -1:], ends)
    return torch.diff(ends, prepend=torch.zeros_like(start)).long()


def all_discarded(shots: int, empty: int, rows: int) -> str:
    """The sentence about rows that have lost all their shots."""
    return f"All {shots} shots of {empty} of {rows} rows were discarded: their weights are 0."


def deal(
    counts: Tensor, total: int, replicates: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Keys and weights (R, total) of counts (R, n), dealt in random order to replicates, as cards are.

    Any order is as good as another, because shots are exchangeable. Discarded shots come last, with weight 0.
    """
    rows, n = counts.shape
    ends = counts.cumsum(-1)
    place = torch.arange(total).expand(rows, total).contiguous()
    keys = torch.searchsorted(ends, place, right=True)
    valid = keys < n
    if replicates > 1:
        device = "cpu" if generator is None else generator.device
        order = (
            torch.rand(rows, total, generator=generator, dtype=torch.float64, device=device).cpu() + ~valid
        )
        keys = keys.gather(-1, order.argsort(-1))  # valid ones first, as before
        keys, valid = (x.view(rows, total // replicates, replicates).mT.contiguous() for x in (keys, valid))
    else:
        keys, valid = keys[:, None], valid[:, None]
    share = valid.sum(-1, keepdim=True)  # [R, replicates, 1]
    filled = (share > 0).sum(1, keepdim=True)
    weights = valid.double() / (share * filled).clamp_min(1)
    return keys.clamp_max(n - 1).reshape(rows, total), weights.reshape(rows, total)
