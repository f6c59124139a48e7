"""`MultilevelControlVariate`: several controls at once, on per-draw contributions from any source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, ShapeError
from ..estimates import Draws
from .base import Control, control_ratios
from .registry import make_control
from .regression import regress

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LevelDraws:
    """What each level says at the draws, and what it is known to say on average.

    Parameters
    ----------
    names : tuple of str
    noise : Tensor, (C, T, ..., d)
        T times each draw's part of each level's error; of mean 0.
    means : Tensor, (C, ..., d)
        Each level's known sum.
    target : Tensor, (T, ..., d)
        T weights_s v_{j_s}: the samples whose mean over axis 0 is the uncorrected estimate.
    costs : mapping
        Multiply-adds a query of each level's sum and of its weights at the T draws.
    replicates : int
        How many independent repetitions the T draws hold, one after the other.
    independent : bool
        Whether all T draws are independent.
    oracle : str or None
        The level that is the target itself, if one is.
    """

    names: tuple[str, ...]
    noise: Tensor
    means: Tensor
    target: Tensor
    costs: Mapping[str, float]
    replicates: int
    independent: bool
    oracle: str | None

    def __getitem__(self, name: str) -> Pair:
        """(samples (T, ..., d), known mean (..., d)) of a level."""
        c = self.names.index(name)
        return self.noise[c] + self.means[c], self.means[c]


class MultilevelControlVariate:
    """Corrects samples of an attention output by levels whose means are known.

    The coefficients are the regression optimum of each head over its rows and coordinates, cross-fitted so that
    the corrected estimate is unbiased and shrunk so that a useless level does no harm (`regress`). With the
    level "exact" the exact output is known, and returned, with variance 0.

    Parameters
    ----------
    levels : sequence of str or Control
        Names in `CONTROLS` or controls, each name once. In which order matters little: where two say the same,
        the first gets the coefficient.

    Attributes
    ----------
    coefficients : dict of str to Tensor
        Of the last `variance_reduced_estimate`: (...,) a head, float64, the mean over the folds.
    variance_before, variance_after : Tensor or None, (...,)
        Variance of the plain and of the corrected estimate, the mean over a head's rows, summed over
        coordinates; None where the samples cannot tell.
    costs : dict of str to float
        Multiply-adds a query.
    notes : tuple of str
        What was not done as asked, and why.

    Raises
    ------
    ArgumentError, DtypeError
        If there are no levels, a name is unknown or comes twice, or an object cannot be prepared.

    Examples
    --------
    >>> from qtx_lab.samplers import MonteCarloSampler
    >>> g = torch.Generator().manual_seed(0)
    >>> q, k, v = (0.5 * torch.randn(4, 64, 16, generator=g) for _ in range(3))
    >>> draws = MonteCarloSampler().draw(q @ k.mT / 4, 32, generator=g)
    >>> control = MultilevelControlVariate(["linformer", "performer"])
    >>> controls = control.evaluate(q, k, v, draws, generator=g, independent=True)
    >>> output = control.variance_reduced_estimate(controls.target, controls)
    >>> bool((control.variance_after < control.variance_before / 2).all())
    True
    """

    def __init__(self, levels: Sequence[str | Control] = ("linformer", "performer", "topk")):
        if isinstance(levels, str) or not isinstance(levels, Sequence) or not levels:
            raise ArgumentError(
                f"levels={levels!r} is not allowed: it must be a list of at least one control."
            )
        self.controls = [make_control(level) for level in levels]
        self.levels = tuple(control.name for control in self.controls)
        if len(set(self.levels)) < len(self.levels):
            raise ArgumentError(f"levels={list(self.levels)} is not allowed: each name may come once.")
        self.coefficients: dict[str, Tensor] = {}
        self.variance_before: Tensor | None = None
        self.variance_after: Tensor | None = None
        self.costs: dict[str, float] = {}
        self.notes: tuple[str, ...] = ()

    def evaluate(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        draws: Draws,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        independent: bool = False,
    ) -> LevelDraws:
        """What every level says at the draws; memory C T d numbers a row.

        Parameters
        ----------
        Q : Tensor, (..., L, E), float32 or float64
        K, V : Tensor, (..., n, E) and (..., n, d), of the same dtype and leading dimensions
        draws : Draws
            Rows (..., L), of known probabilities under softmax(scale Q·K).
        is_causal : bool
            Query i sees keys 0..i.
        scale : float, optional
            1 / sqrt(E) where None.
        generator : torch.Generator, optional
            Of the random features.
        independent : bool
            Whether the draws of a row are independent of each other ("monte-carlo", shots of a circuit). If
            not, coefficients are fitted over replicates, or over halves of the rows.

        Returns
        -------
        LevelDraws

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If the shapes do not fit, or the draws have no probabilities.
        """
        leading, length = Q.shape[:-2], Q.shape[-2] if Q.ndim >= 2 else 0
        if Q.ndim < 2 or K.shape[:-2] != leading or V.shape[:-1] != K.shape[:-1]:
            raise ShapeError(
                f"Q {tuple(Q.shape)}, K {tuple(K.shape)} and V {tuple(V.shape)} must be (..., L, E), (..., n, E) "
                "and (..., n, d) with the same leading dimensions."
            )
        if draws.indices.shape[:-1] != Q.shape[:-1]:
            raise ShapeError(
                f"draws has rows {tuple(draws.indices.shape[:-1])}; Q has {tuple(Q.shape[:-1])}."
            )
        count, total, d = leading.numel(), draws.indices.shape[-1], V.shape[-1]
        q, k, v = (x.reshape(count, *x.shape[-2:]) for x in (Q, K, V))
        scale = 1 / math.sqrt(Q.shape[-1]) if scale is None else float(scale)
        flat = draws.view((count, length))
        positions = torch.arange(length, device=Q.device)
        drawn = v[torch.arange(count, device=Q.device)[:, None, None], flat.indices]  # [N, L, T, d]
        noise, means, costs = [], [], {}
        for control in self.controls:
            prepared = control.prepare(k, v, scale=scale, causal=is_causal, q=q, generator=generator)
            mean = prepared.sums(q, positions)
            w = control_ratios(prepared, q, positions, k, flat, scale=scale, causal=is_causal)
            noise.append(total * w[..., None] * (drawn - mean[..., None, :]))
            means.append(mean)
            costs[control.name] = prepared.cost(k.shape[1]) + total * prepared.cost_at()
        target = total * flat.weights[..., None] * drawn

        return LevelDraws(
            self.levels,
            torch.stack(noise).movedim(3, 1).reshape(len(noise), total, *leading, length, d),
            torch.stack(means).view(len(means), *leading, length, d),
            target.movedim(2, 0).reshape(total, *leading, length, d),
            costs,
            draws.replicates,
            independent,
            next((c.name for c in self.controls if c.oracle), None),
        )

    def variance_reduced_estimate(
        self,
        quantum_samples: Tensor,
        controls: LevelDraws | Mapping[str, Pair] | Sequence[Pair],
    ) -> Tensor:
        """The corrected estimate.

        Parameters
        ----------
        quantum_samples : Tensor, (S, ..., d), float32 or float64
            Per-draw contributions: the estimate is their mean over axis 0, so that the sample of draw s is
            S weights_s v_{j_s} (the value itself for shots of equal weight). The dimension before the last
            holds rows, those before it heads.
        controls : LevelDraws, or mapping or sequence of (samples (S, ..., d), mean (..., d))
            What `evaluate` gave for the same draws; or any controls of known mean, a pair each, whose S
            samples are taken to be independent of each other, as shots are.

        Returns
        -------
        Tensor, (..., d)

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If samples and controls do not fit, or hold NaN or infinities.
        """
        x = quantum_samples
        if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise DtypeError(f"quantum_samples is {given}; it must be a float32 or float64 tensor.")
        if x.ndim < 2 or 0 in x.shape:
            raise ShapeError(f"quantum_samples has shape {tuple(x.shape)}; it must be (S, ..., d), S >= 1.")
        if isinstance(controls, LevelDraws):
            levels = controls
            if levels.noise.shape[1:] != x.shape:
                raise ShapeError(
                    f"controls are of samples {tuple(levels.noise.shape[1:])}; quantum_samples has {tuple(x.shape)}."
                )
        else:
            levels = _from_pairs(x, controls)
        for name, y in (("quantum_samples", x), ("controls", levels.noise)):
            if not bool(y.isfinite().all()):
                raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")

        samples, *lead, d = x.shape
        heads, rows = torch.Size(lead[:-1]), lead[-1] if lead else 1
        # [N, M, S, d] and [C, N, M, S, d]
        target = x.reshape(samples, heads.numel(), rows, d).movedim(0, 2)
        noise = levels.noise.reshape(-1, samples, heads.numel(), rows, d).movedim(1, 3)
        means = levels.means.reshape(-1, heads.numel(), rows, d)
        units = samples if levels.independent else levels.replicates
        estimates = target.unflatten(2, (units, -1)).mean(3)
        own = noise.unflatten(3, (units, -1)).mean(4)

        self.notes = ()
        if levels.oracle is not None:
            index = levels.names.index(levels.oracle)
            beta = torch.zeros(heads.numel(), len(levels.names), dtype=torch.float64, device=x.device)
            beta[:, index] = 1
            output, corrected = means[index], estimates - own[index]
        elif units == 1 and rows == 1:
            beta = torch.zeros(heads.numel(), len(levels.names), dtype=torch.float64, device=x.device)
            output, corrected = estimates.mean(2), estimates
            self.notes = (
                "Not corrected: one row of one replicate leaves nothing to estimate coefficients from without "
                "bias. Draw replicates, or say independent=True where the draws are.",
            )
        else:
            most = 1.0 if isinstance(controls, LevelDraws) else math.inf
            fit = regress(estimates, own, means.mean(0), most=most)
            output, corrected, beta = fit.output, fit.by_replicate, fit.coefficients.mean(1)
            if not bool(beta.any()):
                self.notes = (
                    "No level explains noise beyond doubt: all coefficients are 0. If the samples of a row are independent, as "
                    "shots are, independent=True tells more.",
                )
        self.coefficients = {name: beta[:, c].reshape(heads) for c, name in enumerate(levels.names)}
        self.variance_before = self.variance_after = None
        if units > 1:
            before, after = (
                (y.var(2).sum(-1).mean(1) / units).reshape(heads) for y in (estimates, corrected)
            )
            # With an oracle, what is left is rounding.
            after = after if levels.oracle is None else torch.zeros_like(after)
            self.variance_before, self.variance_after = before, after
        self.costs = dict(levels.costs)
        return output.reshape(*lead, d)

    def report(self) -> str:
        """The last estimate in words: a line a level, and the variance before and after.

        Raises
        ------
        ArgumentError
            If nothing was estimated yet.
        """
        if not self.coefficients:
            raise ArgumentError("There is nothing to report: call variance_reduced_estimate first.")
        lines = ["level         coefficient (lowest to highest head)   multiply-adds a query"]
        for name, beta in self.coefficients.items():
            spread = f"{beta.mean():.3f} ({beta.min():.3f} to {beta.max():.3f})"
            cost = f"{self.costs[name]:,.0f}" if name in self.costs else "unknown"
            lines.append(f"{name:<14}{spread:<41}{cost}")
        if self.variance_before is None or self.variance_after is None:
            lines.append("variance: one replicate cannot tell")
        else:
            before, after = (x.double().mean().item() for x in (self.variance_before, self.variance_after))
            ratio = f"{after / before:.3f}" if before else "unknown: there was none"
            lines.append(f"variance: {before:.3g} before, {after:.3g} after, ratio {ratio}")
        return "\n".join([*lines, *self.notes])


def _from_pairs(x: Tensor, controls: Mapping[str, Pair] | Sequence[Pair]) -> LevelDraws:
    """Controls given as (samples, mean) pairs, of independent samples."""
    if not isinstance(controls, Mapping | list | tuple) or not controls:
        raise ArgumentError(
            f"controls={controls!r} is not allowed: it must be what evaluate gave, or (samples, mean) pairs."
        )
    named = controls if isinstance(controls, Mapping) else {str(i): c for i, c in enumerate(controls)}
    noise, means = [], []
    for name, pair in named.items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise ArgumentError(f"controls[{name!r}] must be a pair of tensors, (samples, mean).")
        samples, mean = pair
        if samples.shape != x.shape or mean.shape != x.shape[1:]:
            raise ShapeError(
                f"controls[{name!r}] has samples {tuple(samples.shape)} and mean {tuple(mean.shape)}; they must "
                f"be {tuple(x.shape)} and {tuple(x.shape[1:])}, as quantum_samples."
            )
        noise.append((samples - mean).to(x.dtype))
        means.append(mean.to(x.dtype))
    return LevelDraws(tuple(named), torch.stack(noise), torch.stack(means), x, {}, 1, True, None)
