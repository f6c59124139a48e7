"""The coefficients of control variates, fitted to each head so that its estimate stays unbiased."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError

MAX_FOLDS = 8
"""The most groups of replicates; the coefficients of a group come from the other groups."""

CONFIDENCE = 0.97725
"""A coefficient is 0 below this quantile of Student's t: |t| < 2, or more where there are few units."""

SINGULAR = 1e-3
"""A control gets no coefficient if less than this share of its noise is new, given the controls before it: to
make use of less would take coefficients of more than 1 / sqrt(SINGULAR) = 32."""

RUN_GROWTH = 1.25
"""The end of each run of rows of `Folds.of_earlier_rows` over its start. Shorter runs know more of the rows
before them, but each takes a fit of its own."""


@dataclass(frozen=True)
class Folds:
    """Which units (row m, replicate r) share coefficients, and from which other units these are fitted.

    Parameters
    ----------
    fold : Tensor, int64, (M, R)
        The fold of each unit, from 0 to F - 1.
    others : Tensor, bool, (F, M, R)
        The units that the coefficients of each fold are fitted to. They must be independent of the units of
        the fold. Every row that has any of them must have equally many.
    """

    fold: Tensor
    others: Tensor

    @classmethod
    def of_replicates(cls, rows: int, replicates: int, *, device: torch.device | None = None) -> Folds:
        """Groups of replicates, each fitted to the other groups; for one replicate, every other row.

        With one replicate, draws of different rows must be independent of each other.

        Parameters
        ----------
        rows, replicates : int
            M and R.
        device : torch.device, optional

        Examples
        --------
        >>> Folds.of_replicates(rows=1, replicates=3).others.int().squeeze(1)
        tensor([[0, 1, 1],
                [1, 0, 1],
                [1, 1, 0]], dtype=torch.int32)
        """
        if replicates > 1:
            fold = _groups(replicates, device).expand(rows, replicates)
        else:
            fold = (torch.arange(rows, device=device) % 2)[:, None]
        count = min(replicates, MAX_FOLDS) if replicates > 1 else 2
        return cls(fold, fold != torch.arange(count, device=fold.device)[:, None, None])

    @classmethod
    def of_earlier_rows(
        cls,
        rows: int,
        replicates: int,
        *,
        rows_are_independent: bool = True,
        device: torch.device | None = None,
    ) -> Folds:
        """Runs of consecutive rows, each fitted to the rows before it: for causal rows.

        Run 0 is row 0 alone, and later runs are about a quarter as long as all rows before them. A run is
        fitted to all replicates of the rows before it if rows are independent of each other, and to the other
        groups of replicates otherwise. Row 0 is fitted to its own other replicates.

        Parameters
        ----------
        rows, replicates : int
            M and R.
        rows_are_independent : bool
            Whether the draws of different rows are independent of each other.
        device : torch.device, optional

        Examples
        --------
        >>> folds = Folds.of_earlier_rows(rows=11, replicates=1)
        >>> folds.fold.flatten()
        tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9])
        >>> folds.others.sum((1, 2))
        tensor([ 0,  1,  2,  3,  4,  5,  6,  7,  8, 10])
        """
        group, row = _groups(replicates, device), torch.arange(rows, device=device)[:, None]
        fold = torch.zeros(rows, replicates, dtype=torch.int64, device=device)
        others: list[Tensor] = []
        for start, end in _runs(rows):
            before = row < max(start, 1)  # [M, 1]
            if start > 0 and rows_are_independent:
                fold[start:end] = len(others)
                others.append(before.expand(rows, replicates))
            else:
                fold[start:end] = len(others) + group
                others.extend(before & (group != g) for g in range(min(replicates, MAX_FOLDS)))
        return cls(fold, torch.stack(others))


def _groups(replicates: int, device: torch.device | None) -> Tensor:
    """The group of each replicate, int64, (R,)."""
    return torch.arange(replicates, device=device) % min(replicates, MAX_FOLDS)


def _runs(rows: int) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive runs of rows, each end about `RUN_GROWTH` times its start; one at least."""
    start, end = 0, 1
    while start < max(rows, 1):
        yield start, min(end, rows)
        start, end = end, max(end + 1, int(end * RUN_GROWTH))


@dataclass(frozen=True)
class Regression:
    """A corrected estimate and how it was corrected.

    Parameters
    ----------
    output : Tensor, (N, M, d)
        The mean of `by_replicate` over its replicates.
    by_replicate : Tensor, (N, M, R, d)
        The corrected estimate of each replicate. Each is unbiased, and as they share little more than their
        coefficients, their spread gives the standard error of the output.
    coefficients : Tensor, (N, F, C), float64
        The coefficient of each head, fold and control, after shrinking.
    std_errors : Tensor, (N, F, C), float64
        Standard errors of the coefficients of the orthogonal controls before shrinking, the best control
        first; infinite where there are too few units to tell.
    folds : Folds
        `coefficients[:, folds.fold]` are the coefficients of each unit.
    """

    output: Tensor
    by_replicate: Tensor
    coefficients: Tensor
    std_errors: Tensor
    folds: Folds


def regress(
    estimates: Tensor,
    noise: Tensor,
    centre: Tensor,
    *,
    folds: Folds | None = None,
    largest: float = math.inf,
) -> Regression:
    """Subtract from estimates the part of their error that noise of known mean explains.

    A unit u is a row m and a replicate r of a head. With its estimate x_u and its noise y_u of C controls,

        z_u = x_u - β_f·y_u,      β_f = A_f^-1 b_f,      f = f(u) the fold of u,
        A_f = sum_{w in others(f)} y_w·y_w',    b_f = sum_{w in others(f)} y_w·(x_w - o_w),

    where products are summed over coordinates, so that a head has one coefficient for each fold and control.
    β_f comes from units that are independent of u, so E[z_u] = E[x_u] - E[β_f]·E[y_u] = E[x_u]: there is no
    bias, as there would be if the same β were fitted to all units (Lavenberg and Welch 1981, sec. 2;
    cross-fitting as in Chernozhukov et al. 2018). In the place of o_w stands `centre`, or from eight
    replicates on the mean of the row's replicates in others(f).

    Causal rows take `Folds.of_earlier_rows`.

    A useless control must do no harm. Controls are made orthogonal under A_f, the best first, and each
    coefficient γ is shrunk to γ (1 - κ SE^2 / γ^2)_+, the positive part of the James-Stein factor on one
    coefficient, which is Breiman's nonnegative garrote (1995). SE is the jackknife-like HC3 standard error
    (MacKinnon and White 1985) over units, so it accounts for rows that weigh more than others; κ is the
    squared quantile `CONFIDENCE` of Student's t with m - C degrees of freedom, and m is Kish's number of
    units by leverage. Where rows are fitted to other rows alone, whose noise may be of another size, the
    replicates of a row count as one unit. With many units κ = 4, and a useless control adds E[(z - 4/z)^2;
    |z| > 2] = 0.033 of the harm that it would do unshrunk, which is about 1/m of the variance. A useful
    control with t = 20 loses 1 % of its coefficient and 0.01 % of its gain. Where several controls share
    few units, or noise is rare and large, this loses what one of them gained: `row_weights` mixes controls
    better where their surrogates are known and not only samples, and one coefficient is then left to fit.

    Parameters
    ----------
    estimates : Tensor, (N, M, R, d)
        x: an unbiased estimate for each of N heads, M rows and R independent replicates.
    noise : Tensor, (C, N, M, R, d)
        y: of mean 0, from the same draws.
    centre : Tensor, (N, M, d)
        A guess of the mean of the estimates that does not depend on the draws. A bad guess costs efficiency
        only.
    folds : Folds, optional
        `Folds.of_replicates` where None.
    largest : float
        No coefficient is larger, whatever its sign; an orthogonal control that would make one larger is left
        out. 1 suits controls that are scaled so that more makes no sense; it protects a head whose noise lies
        in a few rows from what the other rows say.

    Returns
    -------
    Regression

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    Examples
    --------
    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.randn(1, 1, 400, 2, 3, generator=g)
    >>> x = 5 + 2 * y[0] + 0.1 * torch.randn(1, 400, 2, 3, generator=g)
    >>> regress(x, y, torch.full((1, 400, 3), 5.0)).coefficients.round(decimals=1).flatten()
    tensor([2., 2.], dtype=torch.float64)
    """
    from scipy import special

    if estimates.ndim != 4 or noise.ndim != 5 or noise.shape[1:] != estimates.shape:
        raise ShapeError(
            f"estimates has shape {tuple(estimates.shape)} and noise {tuple(noise.shape)}; "
            "they must be (N, M, R, d) and (C, N, M, R, d)."
        )
    _, rows, replicates, _ = estimates.shape
    if centre.shape != (*estimates.shape[:2], estimates.shape[3]):
        raise ShapeError(f"centre has shape {tuple(centre.shape)}; it must be (N, M, d), as estimates.")
    if folds is None:
        folds = Folds.of_replicates(rows, replicates, device=estimates.device)
    elif folds.fold.shape != (rows, replicates):
        raise ShapeError(
            f"folds is of (M, R) = {tuple(folds.fold.shape)} units; estimates has {(rows, replicates)}."
        )
    x, y = (estimates - centre[:, :, None]).double(), noise.double()
    grams = torch.einsum("cnmrd,enmrd->nmrce", y, y)
    products = torch.einsum("cnmrd,nmrd->nmrc", y, x)
    fits = []
    for f, others in enumerate(folds.others):  # some tens at most, and most of causal ones are short
        about_mean, bessel = products, 1.0
        if replicates >= MAX_FOLDS:
            count = int(others.sum(-1).max()) if rows else 0
            mean = (x * others[..., None]).sum(2) / max(count, 1)  # [N, M, d]
            about_mean = products - torch.einsum("cnmrd,nmd->nmrc", y, mean)
            bessel = count / max(count - 1, 1)  # as the mean holds the unit itself
        rows_fitted_to = others.any(1)  # [M]
        if bool((rows_fitted_to & (folds.fold == f).any(1)).any()):
            of_units = grams[:, others], about_mean[:, others]
        else:  # other rows alone, each of them one unit
            counted = others[rows_fitted_to].double()  # [rows, R]
            of_units = (
                torch.einsum("mr,nmrce->nmce", counted, grams[:, rows_fitted_to]),
                torch.einsum("mr,nmrc->nmc", counted, about_mean[:, rows_fitted_to]),
            )
        fits.append(_orthogonal_fit(*of_units, bessel))
    gamma, std_errors, mix, units = (torch.stack(x, 1) for x in zip(*fits, strict=True))
    freedom = units - len(noise)
    std_errors = torch.where(freedom >= 1, std_errors, torch.inf)
    kappa = (
        torch.as_tensor(special.stdtrit(freedom.clamp_min(1).double().cpu().numpy(), CONFIDENCE))
        .to(gamma)
        .square()
    )
    t = gamma / std_errors  # 0 where std_errors is inf
    shrink = torch.where(gamma == 0, 0, (1 - kappa / t.square()).clamp_min(0))
    beta = _within(gamma * shrink, mix, largest)  # [N, F, C]
    corrected = estimates - torch.einsum("nmrc,cnmrd->nmrd", beta[:, folds.fold].to(estimates), noise)
    return Regression(corrected.mean(2), corrected, beta, std_errors, folds)


def _within(gamma: Tensor, mix: Tensor, largest: float) -> Tensor:
    """The coefficients (N, F, C) of the controls themselves, none of them above `largest`.

    Orthogonal controls are added up, the best first, until the next one would make a coefficient too large:
    it is left out, with all that follow.
    """
    sums = (gamma[..., None] * mix).cumsum(-2)  # [N, F, C, C], of the first 1, 2, … orthogonal controls
    allowed = (sums.abs() <= largest).all(-1)
    allowed[..., :1] = True  # the best control alone, whose coefficient can be cut
    last = allowed.int().cumprod(-1).sum(-1, keepdim=True) - 1
    chosen = sums.gather(-2, last[..., None].expand(*last.shape, sums.shape[-1])).squeeze(-2)
    return chosen.clamp(-largest, largest)


def _orthogonal_fit(grams: Tensor, products: Tensor, bessel: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit the coefficients of orthogonal controls to U units of each head.

    Parameters
    ----------
    grams : Tensor, float64, (N, U, C, C)
        y_u·y_u' of each unit.
    products : Tensor, float64, (N, U, C)
        y_u·(x_u - o_u).
    bessel : float
        What the sum of the products is multiplied by.

    Returns
    -------
    gamma, std_errors : Tensor, (N, C)
        Coefficients of the orthogonal controls, the best control first, and their standard errors.
    mix : Tensor, (N, C, C)
        Row c has the weights of the controls in orthogonal control c.
    units : Tensor, (N, C)
        The effective number of units.
    """
    a, b = grams.sum(1), products.sum(1) * bessel
    gamma, mix, power = _orthogonalise(a, b)
    beta = torch.einsum("nc,nce->ne", gamma, mix)
    residual = products - torch.einsum("nuce,ne->nuc", grams, beta)
    score = torch.einsum("nuc,nec->nue", residual, mix)  # ỹ_u·(x_u - β·y_u)
    own = torch.einsum("nce,nueg,ncg->nuc", mix, grams, mix)
    usable = power > 0
    safe = torch.where(usable, power, 1)
    leverage = own / safe[:, None]
    variance = (score / (1 - leverage).clamp_min(1e-6)).square().sum(1) / safe.square()
    alone = (1 - leverage < 1e-6).any(1)  # one unit decides, so the error cannot be known
    std_errors = torch.where(usable & ~alone, variance.sqrt(), torch.inf)
    return gamma, std_errors, mix, leverage.square().sum(1).clamp_min(1e-300).reciprocal() * usable


def _orthogonalise(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gram-Schmidt under a (N, C, C), the control that explains most of b (N, C) first: ỹ = mix y.

    Returns
    -------
    gamma : Tensor, (N, C)
        The coefficient of each orthogonal control, 0 for one that has nothing new.
    mix : Tensor, (N, C, C)
    power : Tensor, (N, C)
        ỹ_c·ỹ_c; 0 for a control that has nothing new.
    """
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    # The best control first: what is taken out of the others is then worth taking out.
    order = (b.square() / diagonal.clamp_min(1e-300)).argsort(dim=-1, descending=True, stable=True)  # [N, C]
    a = a.gather(-1, order[..., None, :].expand_as(a)).gather(-2, order[..., None].expand_as(a))
    b = b.gather(-1, order)
    mix, power = torch.zeros_like(a), torch.zeros_like(b)
    for c in range(a.shape[-1]):  # over controls, a handful
        mix[..., c, c] = 1
        if c:
            before = mix[..., :c, :].clone()
            overlap = (before @ a[..., c, None]).squeeze(-1) / power[..., :c].clamp_min(1e-300)
            overlap = torch.where(power[..., :c] > 0, overlap, 0)
            mix[..., c, :] -= torch.einsum("ne,neg->ng", overlap, before)
        row = mix[..., c, :]
        d = torch.einsum("ne,neg,ng->n", row, a, row)
        power[..., c] = torch.where(d > SINGULAR * a[..., c, c], d, 0)
    gamma = torch.einsum("nce,ne->nc", mix, b) / torch.where(power > 0, power, 1)
    gamma = torch.where(power > 0, gamma, 0)
    mix = torch.zeros_like(mix).scatter_(-1, order[..., None, :].expand_as(mix), mix)  # columns as given
    return gamma, mix, power
