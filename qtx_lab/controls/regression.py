"""The coefficients of control variates, per head, estimated so that the corrected estimate stays unbiased."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from ..errors import ShapeError

FOLDS = 8
"""Into how many parts replicates are cut at most: every part's coefficients come from the other parts."""

CONFIDENCE = 0.97725
"""A coefficient is set to 0 below this quantile of Student's t: |t| < 2, or more where units are few."""

SINGULAR = 1e-6
"""A control of which less than this share is new, given those before it, gets no coefficient."""


@dataclass(frozen=True)
class Regression:
    """A corrected estimate and how it was corrected.

    Parameters
    ----------
    output : Tensor, (N, M, d)
        The mean of `by_replicate` over its replicates.
    by_replicate : Tensor, (N, M, R, d)
        The corrected estimate of each replicate; each is unbiased, and as they share little more than their
        coefficients, their spread gives the standard error of the output.
    coefficients : Tensor, (N, F, C), float64
        Of each head, fold and control, after shrinking.
    std_errors : Tensor, (N, F, C), float64
        Of the orthogonal controls' coefficients before shrinking, the best control first; inf where the units
        cannot tell.
    fold : Tensor, int64, (M, R)
        Which fold's coefficients corrected a unit.
    """

    output: Tensor
    by_replicate: Tensor
    coefficients: Tensor
    std_errors: Tensor
    fold: Tensor


def regress(
    estimates: Tensor,
    noise: Tensor,
    centre: Tensor,
    *,
    row_folds: Tensor | None = None,
    most: float = math.inf,
) -> Regression:
    """Subtract from estimates what known-mean noise explains of theirs, by cross-fitted coefficients.

    With units u = (row m, replicate r) of a head, x_u its estimate and y_u (C controls) its noise,

        z_u = x_u - β_{-f(u)}·y_u,      β_{-f} = A_{-f}^-1 b_{-f},
        A_{-f} = sum_{u not in f} y_u·y_u',    b_{-f} = sum_{u not in f} y_u·(x_u - o_u),

    products being summed over coordinates (one coefficient a head and control). β_{-f} comes from units that
    are independent of u, so E[z_u] = E[x_u] - E[β_{-f}]·E[y_u] = E[x_u]: no bias, which the same β for all units
    would have (Lavenberg and Welch 1981, sec. 2; cross-fitting as in Chernozhukov et al. 2018). The folds are
    the replicates (up to `FOLDS` groups), or two halves of the rows where there is one replicate. In place
    of o_u stands `centre`, or the mean over the other folds' replicates where there are eight.

    A useless control must do no harm. Controls are made orthogonal under A_{-f}, the best first, and each
    coefficient γ is shrunk to γ (1 - κ SE^2 / γ^2)_+: the positive part of the James-Stein factor on one
    coefficient, which is Breiman's nonnegative garrote (1995). SE is the jackknife-like HC3 standard error
    (MacKinnon and White 1985) over units, so it sees rows that weigh more than others; κ is the squared
    quantile `CONFIDENCE` of Student's t with m - C degrees of freedom, m Kish's number of units by leverage. With
    many units κ = 4, and a useless control adds E[(z - 4/z)^2; |z| > 2] = 0.033 of its unshrunk harm, which is
    about 1/m of the variance. A useful one of t = 20 loses 1 % of its coefficient, 0.01 % of its gain.

    Parameters
    ----------
    estimates : Tensor, (N, M, R, d)
        x: for each of N heads, M rows and R independent replicates an unbiased estimate.
    noise : Tensor, (C, N, M, R, d)
        y: of mean 0, from the same draws.
    centre : Tensor, (N, M, d)
        A guess of the estimates' mean that does not depend on the draws; a bad one costs efficiency only.
    row_folds : Tensor, int64 of 0 and 1, (M,), optional
        The half that each row is in where R = 1: rows that share random numbers must be in the same one.
        Every other row where None.
    most : float
        No coefficient is larger, whatever its sign: 1 for a control that is scaled so that more makes no sense, which
        keeps a head whose noise lies in a few rows from being judged by the others.

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
    if estimates.ndim != 4 or noise.ndim != 5 or noise.shape[1:] != estimates.shape:
        raise ShapeError(
            f"estimates has shape {tuple(estimates.shape)} and noise {tuple(noise.shape)}; "
            "they must be (N, M, R, d) and (C, N, M, R, d)."
        )
    _, rows, replicates, _ = estimates.shape
    if centre.shape != (*estimates.shape[:2], estimates.shape[3]):
        raise ShapeError(f"centre has shape {tuple(centre.shape)}; it must be (N, M, d), as estimates.")
    if row_folds is not None and row_folds.shape != (rows,):
        raise ShapeError(f"row_folds has shape {tuple(row_folds.shape)}; it must be ({rows},), as estimates.")
    device = estimates.device
    if replicates > 1:
        count = min(replicates, FOLDS)
        fold = (torch.arange(replicates, device=device) % count).expand(rows, replicates)
    else:
        count = 2
        half = torch.arange(rows, device=device) % 2 if row_folds is None else row_folds
        fold = half[:, None]
    others = (fold != torch.arange(count, device=device)[:, None, None]).double()  # [F, M, R]

    x, y = (estimates - centre[:, :, None]).double(), noise.double()
    grams = torch.einsum("cnmrd,enmrd->nmrce", y, y)
    products = torch.einsum("cnmrd,nmrd->nmrc", y, x).expand(count, *estimates.shape[:3], len(noise))
    bessel: Tensor | float = 1.0
    if replicates >= FOLDS:
        share = others[:, 0] / others[:, 0].sum(-1, keepdim=True)  # [F, R]
        mean = torch.einsum("fr,nmrd->fnmd", share, x)
        products = products - torch.einsum("cnmrd,fnmd->fnmrc", y, mean)
        bessel = (1 - share.square().sum(-1)).reciprocal()[:, None, None]  # the mean holds u itself
    gamma, std_errors, mix, units = _orthogonal_fit(grams, products, others, bessel)
    freedom = units - len(noise)
    std_errors = torch.where(freedom >= 1, std_errors, torch.inf)
    kappa = torch.as_tensor(stats.t.ppf(CONFIDENCE, freedom.clamp_min(1).cpu().numpy())).to(gamma).square()
    t = gamma / std_errors  # 0 where std_errors is inf
    shrink = torch.where(gamma == 0, 0, (1 - kappa / t.square()).clamp_min(0))
    beta = torch.einsum("fnc,fnce->fne", (gamma * shrink).clamp(-most, most), mix)  # [F, N, C]

    of_unit = beta[fold].to(estimates.dtype)  # [M, R, N, C]
    corrected = estimates - torch.einsum("mrnc,cnmrd->nmrd", of_unit, noise)
    return Regression(corrected.mean(2), corrected, beta.transpose(0, 1), std_errors.transpose(0, 1), fold)


def _orthogonal_fit(
    grams: Tensor, products: Tensor, others: Tensor, bessel: Tensor | float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of the orthogonalised controls, standard errors, these controls, effective units.

    All (F, N, C), but the third result (F, N, C, C) has in row c the weights of the controls in orthogonal control c, Gram-Schmidt
    under A: ỹ = mix y.
    """
    a = torch.einsum("fmr,nmrce->fnce", others, grams)
    b = torch.einsum("fmr,fnmrc->fnc", others, products) * bessel
    # The best control first: what is taken out of the others is then worth taking out.
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    order = (b.square() / diagonal.clamp_min(1e-300)).argsort(
        dim=-1, descending=True, stable=True
    )  # [F, N, C]
    size = a.shape[-1]
    a = a.gather(-1, order[..., None, :].expand_as(a)).gather(-2, order[..., None].expand_as(a))
    b = b.gather(-1, order)
    mix = torch.zeros_like(a)
    power = torch.zeros_like(b)  # D_c = ỹ_c·ỹ_c
    for c in range(size):  # over controls, a handful
        mix[..., c, c] = 1
        if c:
            before = mix[..., :c, :].clone()
            overlap = (before @ a[..., c, None]).squeeze(-1) / power[..., :c].clamp_min(1e-300)
            overlap = torch.where(power[..., :c] > 0, overlap, 0)
            mix[..., c, :] -= torch.einsum("fne,fneg->fng", overlap, before)
        row = mix[..., c, :]
        d = torch.einsum("fne,fneg,fng->fn", row, a, row)
        power[..., c] = torch.where(d > SINGULAR * a[..., c, c], d, 0)
    usable = power > 0
    safe = torch.where(usable, power, 1)
    gamma = torch.where(usable, torch.einsum("fnce,fne->fnc", mix, b) / safe, 0)

    mix = torch.zeros_like(mix).scatter_(-1, order[..., None, :].expand_as(mix), mix)  # columns as given
    beta = torch.einsum("fnc,fnce->fne", gamma, mix)
    residual = products - torch.einsum("nmrce,fne->fnmrc", grams, beta)
    score = torch.einsum("fnmrc,fnec->fnmre", residual, mix)  # ỹ_u·(x_u - β·y_u)
    own = torch.einsum("fnce,nmreg,fncg->fnmrc", mix, grams, mix)
    room = 1 - own / safe[:, :, None, None]  # 1 - leverage
    counted = others[:, None, :, :, None]
    variance = (counted * (score / room.clamp_min(1e-6)).square()).sum((2, 3)) / safe.square()
    alone = (counted.bool() & (room < 1e-6)).any(3).any(2)  # one unit decides: no error can be told
    std_errors = torch.where(usable & ~alone, variance.sqrt(), torch.inf)
    leverage = counted * own / safe[:, :, None, None]
    return gamma, std_errors, mix, leverage.square().sum((2, 3)).clamp_min(1e-300).reciprocal() * usable
