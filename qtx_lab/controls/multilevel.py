"""`MultilevelControlVariate`: corrects samples of an attention output by several controls at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_flags, check_scale
from ..errors import ArgumentError, DtypeError, ShapeError, quoted
from ..estimates import Draws
from ..problem import FIRST_KNOWN
from .base import Control, masked_logits
from .mixture import RowVariance, mix_controls, value_spread
from .registry import make_control
from .regression import Folds, regress

SamplesAndMean = tuple[Tensor, Tensor]
"""Samples of a control, (S, ..., d), and their known mean, (..., d)."""


@dataclass(frozen=True, eq=False)
class LevelDraws:
    """What each level gives at the draws, and what it is known to give on average.

    Parameters
    ----------
    names : tuple of str
        Names of the C levels.
    noise : Tensor, (C, T, ..., d)
        T times the part of each draw in the level's error, times the level's weight in the row; its mean is
        0.
    means : Tensor, (C, ..., d)
        Known sum of each level.
    target : Tensor, (T, ..., d)
        The samples T weights_s v_{j_s}, whose mean over axis 0 is the uncorrected estimate.
    costs : mapping of str to float
        Multiply-adds a query of each level: its sum, and its weights at the T draws.
    replicates : int
        Number of independent repetitions that the T draws hold, one after the other.
    independent : bool
        Whether all T draws are independent of each other.
    oracle : str or None
        The level that is the target itself, if there is one.
    weights : Tensor, (C, ..., L), or None
        The weight of each level in each row (`row_weights`), which the levels' probabilities tell. None where
        nothing but samples is known: each level then gets a coefficient of its own from them.
    causal : bool
        Whether no row may know of later ones.
    """

    names: tuple[str, ...]
    noise: Tensor
    means: Tensor
    target: Tensor
    costs: Mapping[str, float]
    replicates: int
    independent: bool
    oracle: str | None
    weights: Tensor | None = None
    causal: bool = False

    def __getitem__(self, name: str) -> SamplesAndMean:
        """Return the samples (T, ..., d) and the known mean (..., d) of a level."""
        c = self.names.index(name)
        return self.noise[c] + self.means[c], self.means[c]


class MultilevelControlVariate:
    """Corrects samples of an attention output by levels whose means are known.

    Each row mixes the levels by weights that follow from its probabilities (`row_weights`), and each head has
    a coefficient for its mixture, the optimum of a regression over its rows and coordinates. For pairs of
    samples and mean, each level has a coefficient. Coefficients are cross-fitted, so that the corrected
    estimate is unbiased, and shrunk, so that a useless level does no harm; see `regress`. If "exact" is among
    the levels, the exact output is known: it is returned, with variance 0.

    Parameters
    ----------
    levels : sequence of str or Control
        Names in `CONTROLS`, or controls; each name may come once. Their order matters only where two levels
        explain the same: the first gets the coefficient.

    Attributes
    ----------
    coefficients : dict of str to Tensor, float64, (...)
        Coefficient of each level and head in the last `variance_reduced_estimate`, times its weight: the mean
        over rows and folds.
    variance_before, variance_after : Tensor or None, (...)
        Variance of the plain and of the corrected estimate, summed over coordinates, the mean over a head's
        rows; None if there is only one replicate.
    costs : dict of str to float
        Multiply-adds a query of each level.
    notes : tuple of str
        What was done in another way than asked, and why.

    Raises
    ------
    ArgumentError
        If there is no level, or a name is unknown or comes twice.
    DtypeError
        If a level is neither a name nor a control.

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
                f"levels={quoted(levels)} is not allowed: it must be a list of at least one control."
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
        """Evaluate every level at the draws. This takes memory for C T d numbers a row.

        Parameters
        ----------
        Q : Tensor, (..., L, E), float32 or float64
        K, V : Tensor, (..., n, E) and (..., n, d), of the same dtype and leading dimensions
        draws : Draws
            Draws of rows (..., L) with known probabilities under softmax(scale Q·K).
        is_causal : bool
            Whether query i sees only the keys 0 to i.
        scale : float, optional
            1 / sqrt(E) if None.
        generator : torch.Generator, optional
            Source of the random features.
        independent : bool
            Whether the draws of a row are independent of each other, as those of "monte-carlo" or shots of a
            circuit. If not, coefficients are fitted over replicates, or over halves of the rows: a single
            replicate whose rows share random numbers, as those of "sobol", must not be corrected so.

        Returns
        -------
        LevelDraws

        Raises
        ------
        ShapeError
            If the shapes do not fit each other.
        DtypeError
            If the dtypes are not allowed.
        ArgumentError
            If the draws have no probabilities, or scale is not finite.
        """
        check_flags(is_causal=is_causal, independent=independent)
        scale = check_scale(scale)
        for name, x in (("Q", Q), ("K", K), ("V", V)):
            if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
                given = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise DtypeError(f"{name} is {given}; it must be a float32 or float64 tensor.")
        if not Q.dtype == K.dtype == V.dtype:
            raise DtypeError(f"Q is {Q.dtype}, K {K.dtype} and V {V.dtype}; they must agree.")
        leading, length = Q.shape[:-2], Q.shape[-2] if Q.ndim >= 2 else 0
        fits = Q.ndim >= 2 and K.shape[:-2] == leading and V.shape[:-1] == K.shape[:-1]
        if not fits or Q.shape[-1] != K.shape[-1]:
            raise ShapeError(
                f"Q {tuple(Q.shape)}, K {tuple(K.shape)} and V {tuple(V.shape)} must be (..., L, E), (..., "
                "n, E) and (..., n, d) with the same leading dimensions."
            )
        if draws.indices.shape[:-1] != Q.shape[:-1]:
            raise ShapeError(
                f"draws has rows {tuple(draws.indices.shape[:-1])}; Q has {tuple(Q.shape[:-1])}."
            )
        count, total, d = leading.numel(), draws.indices.shape[-1], V.shape[-1]
        q, k, v = (x.reshape(count, *x.shape[-2:]) for x in (Q, K, V))
        scale = 1 / math.sqrt(Q.shape[-1]) if scale is None else scale
        flat = draws.view((count, length))
        positions = torch.arange(length, device=Q.device)
        drawn = v[torch.arange(count, device=Q.device)[:, None, None], flat.indices]  # [N, L, T, d]
        known = q[:, :FIRST_KNOWN] if is_causal else q
        prepared = [
            control.prepare(k, v, scale=scale, causal=is_causal, q=known, generator=generator)
            for control in self.controls
        ]
        log_p = masked_logits(q, k, positions, scale, is_causal).log_softmax(-1)
        mixed = mix_controls(prepared, q, positions, flat, RowVariance(log_p, value_spread(v)))
        noise, costs = [], {}
        w = total * flat.weights * mixed.ratios * mixed.weights[..., None]  # [C, N, L, T]
        for each, mean in zip(w, mixed.means, strict=True):  # one level at a time: (N, L, T, d) is large
            noise.append((each[..., None] * (drawn - mean[..., None, :])).movedim(2, 0))
        for name, control in zip(self.levels, prepared, strict=True):
            costs[name] = control.cost(k.shape[1]) + total * control.cost_at()
        target = total * flat.weights[..., None] * drawn
        return LevelDraws(
            self.levels,
            torch.stack(noise).view(len(noise), total, *leading, length, d),
            mixed.means.view(len(noise), *leading, length, d),
            target.movedim(2, 0).reshape(total, *leading, length, d),
            costs,
            draws.replicates,
            independent,
            next((c.name for c in self.controls if c.oracle), None),
            mixed.weights.view(len(noise), *leading, length),
            is_causal,
        )

    def variance_reduced_estimate(
        self,
        quantum_samples: Tensor,
        controls: LevelDraws | Mapping[str, SamplesAndMean] | Sequence[SamplesAndMean],
    ) -> Tensor:
        """Correct an estimate by its controls.

        Parameters
        ----------
        quantum_samples : Tensor, (S, ..., d), float32 or float64
            Contribution of each draw: the estimate is their mean over axis 0, so the sample of draw s is S
            weights_s v_{j_s}, or the value itself for shots of equal weight. The dimension before the last
            holds rows, those before it heads.
        controls : LevelDraws, or mapping or sequence of (samples (S, ..., d), mean (..., d))
            What `evaluate` returned for the same draws, or pairs of any controls with known means. The S
            samples of pairs are taken to be independent of each other, as shots are.

        Returns
        -------
        Tensor, (..., d)

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If samples and controls do not fit each other, or hold NaN or infinities.
        """
        x = quantum_samples
        levels = _checked_levels(x, controls)
        samples, *lead, d = x.shape
        heads, rows = torch.Size(lead[:-1]), lead[-1] if lead else 1
        target = x.reshape(samples, heads.numel(), rows, d).movedim(0, 2)  # [N, M, S, d]
        noise = levels.noise.reshape(-1, samples, heads.numel(), rows, d).movedim(1, 3)  # [C, N, M, S, d]
        means = levels.means.reshape(-1, heads.numel(), rows, d)
        replicates = samples if levels.independent else levels.replicates
        estimates = target.unflatten(2, (replicates, -1)).mean(3)  # [N, M, R, d]
        correction = _correct(estimates, noise.unflatten(3, (replicates, -1)).mean(4), means, levels)
        self.notes = correction.notes
        self.coefficients = {
            name: correction.coefficients[:, c].reshape(heads) for c, name in enumerate(levels.names)
        }
        self.variance_before = self.variance_after = None
        if replicates > 1:
            before, after = (
                (y.var(2).sum(-1).mean(1) / replicates).reshape(heads)
                for y in (estimates, correction.by_replicate)
            )
            # With an oracle, what is left is rounding.
            self.variance_before = before
            self.variance_after = after if levels.oracle is None else torch.zeros_like(after)
        self.costs = dict(levels.costs)
        return correction.output.reshape(*lead, d)

    def report(self) -> str:
        """Describe the last estimate: a line for each level, and the variance before and after.

        Raises
        ------
        ArgumentError
            If there is no estimate yet.
        """
        if not self.coefficients:
            raise ArgumentError("There is no estimate to report: call variance_reduced_estimate first.")
        lines = ["level         coefficient (lowest to highest head)   multiply-adds a query"]
        for name, beta in self.coefficients.items():
            spread = f"{beta.mean():.3f} ({beta.min():.3f} to {beta.max():.3f})"
            cost = f"{self.costs[name]:,.0f}" if name in self.costs else "unknown"
            lines.append(f"{name:<14}{spread:<41}{cost}")
        if self.variance_before is None or self.variance_after is None:
            lines.append("variance: unknown, because there is only one replicate")
        else:
            before, after = (x.double().mean().item() for x in (self.variance_before, self.variance_after))
            ratio = f"{after / before:.3f}" if before else "unknown, because there was none"
            lines.append(f"variance: {before:.3g} before, {after:.3g} after, ratio {ratio}")
        return "\n".join([*lines, *self.notes])


def _checked_levels(
    x: Tensor, controls: LevelDraws | Mapping[str, SamplesAndMean] | Sequence[SamplesAndMean]
) -> LevelDraws:
    """Check samples and their controls, and return the controls as LevelDraws."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise DtypeError(f"quantum_samples is {given}; it must be a float32 or float64 tensor.")
    if x.ndim < 2 or 0 in x.shape:
        raise ShapeError(f"quantum_samples has shape {tuple(x.shape)}; it must be (S, ..., d), S >= 1.")
    if not isinstance(controls, LevelDraws):
        levels = _from_pairs(x, controls)
    elif controls.noise.shape[1:] == x.shape:
        levels = controls
    else:
        raise ShapeError(
            f"quantum_samples has shape {tuple(x.shape)}, but controls belong to samples of shape "
            f"{tuple(controls.noise.shape[1:])}."
        )
    for name, y in (("quantum_samples", x), ("controls", levels.noise)):
        if not bool(y.isfinite().all()):
            raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")
    return levels


@dataclass(frozen=True, eq=False)
class _Correction:
    """A corrected estimate.

    Parameters
    ----------
    output : Tensor, (N, M, d)
    by_replicate : Tensor, (N, M, R, d)
    coefficients : Tensor, float64, (N, C)
    notes : tuple of str
        What was done in another way than asked, and why.
    """

    output: Tensor
    by_replicate: Tensor
    coefficients: Tensor
    notes: tuple[str, ...] = ()


def _correct(estimates: Tensor, noise: Tensor, means: Tensor, levels: LevelDraws) -> _Correction:
    """Correct estimates (N, M, R, d) by the levels' noise (C, N, M, R, d) and means (C, N, M, d)."""
    heads, rows, replicates, _ = estimates.shape
    zero = torch.zeros(heads, len(levels.names), dtype=torch.float64, device=estimates.device)
    if levels.oracle is not None:
        index = levels.names.index(levels.oracle)
        one = zero.index_fill(1, torch.tensor([index], device=zero.device), 1.0)
        return _Correction(means[index], estimates - noise[index], one)
    if replicates == 1 and rows == 1:
        note = (
            "Not corrected: one row of one replicate leaves nothing to estimate coefficients from without "
            "bias. Draw replicates, or set independent=True if the draws are independent."
        )
        return _Correction(estimates.mean(2), estimates, zero, (note,))
    folds = None
    if levels.causal:
        apart = levels.independent or replicates == 1
        folds = Folds.of_earlier_rows(rows, replicates, rows_are_independent=apart, device=estimates.device)
    if levels.weights is None:
        fit = regress(estimates, noise, means.mean(0), folds=folds)
        coefficients = fit.coefficients.mean(1)
    else:  # the weights are such that no coefficient of the mixture above 1 makes sense
        weights = levels.weights.reshape(len(levels.names), heads, rows).to(means)
        share = weights / weights.sum(0).clamp_min(torch.finfo(weights.dtype).tiny)
        centre = (share[..., None] * means).sum(0)
        fit = regress(estimates, noise.sum(0, keepdim=True), centre, folds=folds, largest=1.0)
        of_rows = fit.coefficients[:, fit.folds.fold, 0].mean(-1)  # [N, M]
        coefficients = (weights.double() * of_rows).mean(-1).mT
    notes: tuple[str, ...] = ()
    if not bool(coefficients.any()):
        notes = (
            "Not corrected: no level explains noise beyond doubt, so all coefficients are 0. If the samples "
            "of a row are independent, as shots are, independent=True lets them show more.",
        )
    return _Correction(fit.output, fit.by_replicate, coefficients, notes)


def _from_pairs(x: Tensor, controls: Mapping[str, SamplesAndMean] | Sequence[SamplesAndMean]) -> LevelDraws:
    """Return controls that are pairs of samples and mean as LevelDraws with independent draws."""
    if not isinstance(controls, Mapping | list | tuple) or not controls:
        raise ArgumentError(
            f"controls={quoted(controls)} is not allowed: it must be what evaluate returned, or (samples, "
            "mean) pairs."
        )
    named = controls if isinstance(controls, Mapping) else {str(i): c for i, c in enumerate(controls)}
    noise, means = [], []
    for name, pair in named.items():
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise ArgumentError(f"controls[{name!r}] must be a pair of tensors, (samples, mean).")
        samples, mean = pair
        if samples.shape != x.shape or mean.shape != x.shape[1:]:
            raise ShapeError(
                f"controls[{name!r}] has samples {tuple(samples.shape)} and mean {tuple(mean.shape)}; they "
                f"must be {tuple(x.shape)} and {tuple(x.shape[1:])}, as quantum_samples."
            )
        noise.append((samples - mean).to(x.dtype))
        means.append(mean.to(x.dtype))
    return LevelDraws(tuple(named), torch.stack(noise), torch.stack(means), x, {}, 1, True, None)
