"""`CircuitSampler`: draws from attention rows by measuring circuits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..circuits import Loader, make_loader
from ..errors import BackendUnavailable, DtypeError, FallbackWarning
from ..estimates import Draws
from ..samplers import Sampler
from ..samplers.base import check_draw_arguments, row_masses
from .counts import RowCounts, draw_counts
from .hybrid import HybridPolicy
from .qiskit import QiskitQuantumBackend


class Mitigation(Protocol):
    """Measures rows on a backend in a way that corrects for its noise."""

    name: str

    def sample_rows(
        self,
        backend: QiskitQuantumBackend,
        p: Tensor,
        shots: int,
        *,
        generator: torch.Generator | None = None,
    ) -> RowCounts:
        """Arguments and result as for `QiskitQuantumBackend.sample_rows`; `shots` is the whole budget of a row."""
        ...


class CircuitSampler(Sampler):
    """Each row is loaded into a circuit and measured: a shot is a draw.

    Unbiased, with the variance of independent draws, on an ideal simulator with an exact loader: then the
    draws have the distribution of `monte-carlo`, and are no better. On a device, or its twin, the draws are
    from what noise makes of the row: biased by up to the total variation between the two, so error bars come
    from replicates and show the variance only. Shots that gave no key (padding, a masked key, a wrong Hamming
    weight) are discarded and the weights are those of the rest, 1 / valid shots: masked keys are never drawn.
    A row whose shots were all discarded has weight 0 and is reported.

    Parameters
    ----------
    backend : QiskitQuantumBackend
    loader : str or Loader, optional
        In place of the backend's.
    mitigation : Mitigation, optional
        Rows are measured by it, `num_samples` shots for each replicate; draws are as many of each key as its
        mitigated probability times `num_samples`, rounded up or down at random.
    hybrid_mode : bool or HybridPolicy
        What the backend cannot do, or the policy does not want it to, is drawn by pseudo-random numbers, with
        a FallbackWarning that tells each reason once, and the reasons in `diagnostics`; True is
        `HybridPolicy()`. False: an error.

    Attributes
    ----------
    diagnostics : mapping
        Of the latest draw: those of `RowCounts`, `quantum_rows`, `classical_rows`, `discarded_shots` and
        `fallbacks`.

    Source: Grover and Rudolph, Creating superpositions that correspond to efficiently integrable probability
    distributions (2002), for measuring a loaded distribution; discarding as in post-selection on a symmetry.

    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> sampler = CircuitSampler(QiskitQuantumBackend("aer"))
    >>> sampler.draw(torch.tensor([0.0, -torch.inf, 0.0]), 4, generator=g).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    name = "circuit"
    classical_baseline = "monte-carlo"
    """The sampler that draws as an ideal circuit would: `sampled_attention` shows it beside."""

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
        if mitigation is not None and not hasattr(mitigation, "sample_rows"):
            raise DtypeError(f"mitigation={mitigation!r} cannot measure rows: it must have `sample_rows`.")
        self.backend = backend if loader is None else backend.with_loader(make_loader(loader))
        self.mitigation = mitigation
        self.policy = HybridPolicy() if hybrid_mode is True else hybrid_mode or None
        self.unbiased = self.backend.engine.ideal and self.backend.loader.exact and mitigation is None
        self.independent = self.unbiased
        self.exchangeable = (
            mitigation is None
        )  # shots are independent, from p or not: see attention/gradients.py
        self.diagnostics: Mapping[str, Any] = {}
        self._warned: set[str] = set()

    @property
    def last_facts(self) -> Mapping[str, Any]:  # type: ignore[override]
        """`diagnostics`: see `Sampler.last_facts`."""
        return self.diagnostics

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys: see `Sampler.draw`. Raises BackendUnavailable where the backend cannot, and no policy says how else."""
        check_draw_arguments(logits, num_samples, replicates)
        *rows, n = logits.shape
        mass = row_masses(logits.reshape(-1, n).to("cpu", torch.float64))[:, :n]
        p = mass / mass.sum(-1, keepdim=True).clamp_min(1)
        total = num_samples * replicates
        if self.mitigation is None:
            result = self.measure(p, total, generator=generator)
            keys, weights = _deal(result.counts, total, replicates, generator)
        else:  # replicates are mitigated one by one, so that their spread is that of mitigated rows
            counts = torch.stack(
                [self._mitigated_counts(p, num_samples, generator) for _ in range(replicates)], dim=1
            ).flatten(0, 1)
            keys, weights = (x.reshape(len(p), total) for x in _deal(counts, num_samples, 1, generator))
            filled = (weights.view(len(p), replicates, -1).sum(-1) > 0).sum(-1, keepdim=True)
            weights = weights / filled.clamp_min(1)
        probabilities = p.gather(-1, keys).view(*rows, total).to(logits) if self.unbiased else None
        return Draws(
            keys.view(*rows, total).to(logits.device),
            weights.view(*rows, total).to(logits),
            probabilities,
            replicates,
        )

    def _mitigated_counts(self, p: Tensor, shots: int, generator: torch.Generator | None) -> Tensor:
        """Counts (R, n) of rows p that were measured and mitigated together."""
        result = self.measure(p, shots, generator=generator)
        return result.counts if result.estimate is None else _round(result.estimate, shots, generator)

    def measure(self, p: Tensor, shots: int, *, generator: torch.Generator | None = None) -> RowCounts:
        """Counts of `shots` draws of rows p (R, n), by the backend or, where the policy says so, classically."""
        if self.policy is None:
            result = self._quantum(p, shots, generator)
            kept = torch.ones(len(p), dtype=torch.bool)
            reasons: tuple[str, ...] = ()
        else:
            kept, reasons = self.policy.decide(self.backend, p)
            result, kept, reasons = self._hybrid(p, shots, kept, reasons, generator)
        reasons += tuple(result.diagnostics.get("fallbacks", ()))
        found = result.counts if result.estimate is None else result.estimate
        empty = int(((p.sum(-1) > 0) & (found.sum(-1) == 0)).sum())
        if empty:
            reasons += (
                f"All {shots} shots of {empty} of {len(p)} rows were discarded: their weights are 0.",
            )
        unheard = [reason for reason in reasons if reason not in self._warned]
        if unheard:
            self._warned.update(unheard)
            drawn = (
                f"{int((~kept).sum())} of {len(p)} rows drawn classically. " if not bool(kept.all()) else ""
            )
            warnings.warn(drawn + " ".join(unheard), FallbackWarning, stacklevel=3)
        self.diagnostics = {
            **result.diagnostics,
            "quantum_rows": int(kept.sum()),
            "classical_rows": int((~kept).sum()),
            "discarded_shots": result.discarded,
            "fallbacks": reasons,
        }
        return replace(result, diagnostics=self.diagnostics)

    def _quantum(self, p: Tensor, shots: int, generator: torch.Generator | None) -> RowCounts:
        if self.mitigation is not None:
            return self.mitigation.sample_rows(self.backend, p, shots, generator=generator)
        return self.backend.sample_rows(p, shots, generator=generator)

    def _hybrid(
        self, p: Tensor, shots: int, kept: Tensor, reasons: tuple[str, ...], generator: torch.Generator | None
    ) -> tuple[RowCounts, Tensor, tuple[str, ...]]:
        """The kept rows by the backend, cut to the keys that they need, and the others classically."""
        counts = torch.zeros(p.shape, dtype=torch.int64)
        discarded = torch.zeros(len(p), dtype=torch.int64)
        baseline, diagnostics = torch.zeros_like(counts), {}
        estimate: Tensor | None = None
        std_error: Tensor | None = None
        if bool(kept.any()):
            last = int(p[kept].sum(0).nonzero().amax()) + 1 if bool((p[kept] > 0).any()) else 1
            try:
                part = self._quantum(p[kept, :last], shots, generator)
                counts[kept, :last], discarded[kept] = part.counts, part.discarded
                diagnostics = dict(part.diagnostics)
                if part.classical is not None:
                    baseline[kept, :last] = part.classical.counts
                if part.estimate is not None:
                    estimate = torch.zeros(p.shape, dtype=torch.float64)
                    estimate[kept, :last] = part.estimate
                if part.std_error is not None:
                    std_error = torch.zeros(p.shape, dtype=torch.float64)
                    std_error[kept, :last] = part.std_error
            except BackendUnavailable as error:
                reasons, kept = (*reasons, str(error)), torch.zeros_like(kept)
        drawn = ~kept & (p.sum(-1) > 0)
        if bool(drawn.any()):
            device = "cpu" if generator is None else generator.device
            seed = int(torch.randint(2**31 - 1, (), generator=generator, device=device))
            counts[drawn] = draw_counts(p[drawn], shots, torch.Generator().manual_seed(seed))
            baseline[drawn] = counts[drawn]
            share = counts[drawn] / shots
            if estimate is not None:
                estimate[drawn] = share
            if std_error is not None:
                std_error[drawn] = (share * (1 - share) / shots).sqrt()
        classical = RowCounts(
            baseline,
            torch.zeros(len(p), dtype=torch.int64),
            shots,
            diagnostics={"device": "pseudo-random numbers"},
        )
        result = RowCounts(counts, discarded, shots, classical, diagnostics, estimate, std_error)
        return result, kept, reasons


def _round(p: Tensor, total: int, generator: torch.Generator | None) -> Tensor:
    """Counts (R, n) whose expectations are `total` times p (R, n): each one of the two next whole numbers."""
    device = "cpu" if generator is None else generator.device
    start = torch.rand(len(p), 1, generator=generator, dtype=torch.float64, device=device).cpu()
    ends = (p.cumsum(-1) * total + start).floor().clamp_max(total)
    ends[:, -1:] = total * (p.sum(-1, keepdim=True) > 0)
    # Rounding of the sum must not give keys behind the last one that has mass.
    last = (p > 0).long().cumsum(-1) == (p > 0).sum(-1, keepdim=True)
    ends = torch.where(last, ends[:, -1:], ends)
    return torch.diff(ends, prepend=torch.zeros_like(start)).long()


def _deal(
    counts: Tensor, total: int, replicates: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Keys and weights (R, total) of counts (R, n), dealt in random order to replicates like cards.

    Shots are exchangeable, so that any order is as good. What was discarded is left over at the end, with
    weight 0.
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
