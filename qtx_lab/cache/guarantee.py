r"""Attention over a cache within a tolerance, promised for finite samples: P(|o_hat - o| > eps |o|) <= delta.

*What is known.* The sketches give of every key a guess s_j of its logit l_j with a bound |l_j - s_j| <=
b_j, and a guess u_j of its value with |v_j - u_j| <= e_j (`Int8Sketch`, `ValueSketch`). With a_j =
exp(s_j), every importance ratio exp(l_j) / a_j lies in [exp(-b_j), exp(b_j)]. The keys of a set H are read,
keys and values. Let S be the exp of a sink's logit, 0 where there is none, and

    D_0 = S + sum_{j in H} exp(l_j) + sum_{j not in H} a_j,
    c   = (sum_{j in H} exp(l_j) v_j + sum_{j not in H} a_j u_j) / D_0,

which is the output where the sketches are right. What they leave out of the keys that were not read is

    z_j = (exp(l_j) (v_j - c) - a_j (u_j - c), rho (exp(l_j) - a_j))          in R^(d+1), rho > 0,
    |z_j| <= M_j = a_j ((exp(b_j) - 1) sqrt(|u_j - c|^2 + rho^2) + exp(b_j) e_j),

and with Z = sum_{j not in H} z_j = (Z_v, Z_D) the exact output is o = c + Z_v / (D_0 + Z_D / rho).

*Draws.* Keys J_1, J_2, … are drawn independently, j with probability M_j / G, G = sum_{j not in H} M_j, and
read. X_i = z_J / M_J has |X_i| <= 1 and the mean Z / G. With lambda_i in [0, 1), a function of the draws
before i, and L = sum_i lambda_i, Z_hat = G sum_i lambda_i X_i / L, D_hat = D_0 + Z_hat_D / rho > 0, the
estimate is o_hat = c + Z_hat_v / D_hat. Without draws Z_hat = 0.

*Theorem.* With psi(x) = -log(1 - x) - x, with probability at least 1 - delta, at all numbers of draws at
once,

    |Z_hat - Z| <= R = G (log(2 / delta) + sum_i psi(lambda_i) |X_i|^2) / L,

and without draws |Z_hat - Z| <= R = G surely. Where this holds,

    |o_hat - o| <= R sqrt(1 + |o - c|^2 / rho^2) / D_hat.

*Proof.* (1) Let Y_t = sum_{i <= t} lambda_i (X_i - Z / G) and

    W_t = cosh(|Y_t|) exp(-sum_{i <= t} psi(lambda_i) |X_i|^2).

W_t is a supermartingale: let y = Y_{t-1} - lambda Z / G, a = |y|, X = X_t, r = |X| <= 1, m = <y / a, X>.
f(t) = cosh |y + t lambda X| has f'' <= (lambda r)^2 f (Pinelis 1994), so that

    f(1) <= cosh(a) cosh(lambda r) + sinh(a) sinh(lambda r) m / r.

By exp(lambda x - psi(lambda) x^2) <= 1 + lambda x for x >= -1 (Fan, Grama and Liu 2015, lemma 4.1) at x = r
and x = -r, the right side times exp(-psi(lambda) r^2) is at most cosh(a) + lambda m sinh(a) for m = r and m
= -r, and both are linear in m. The mean of that is cosh(a) + lambda <y / a, Z / G> sinh(a), the tangent of
the convex cosh(|.|) at y, and so at most cosh |y + lambda Z / G| = cosh |Y_{t-1}|. W_0 = 1, so by Ville's
inequality P(W_t >= 1 / delta for some t) <= delta, and cosh(x) >= exp(x) / 2.

(2) D_hat (o_hat - o) = Z_hat_v - Z_v - (o - c) (Z_hat_D - Z_D) / rho, of which the size is at most |Z_hat -
Z| sqrt(1 + |o - c|^2 / rho^2) by Cauchy and Schwarz. With |o - c| <= |o_hat - c| + |o_hat - o| this is a
quadratic inequality for |o_hat - o|, which `error_bound` solves.

As the bound holds at all numbers of draws at once, drawing may stop at the first at which |o_hat - o| <= E
with (1 + eps) E <= eps |o_hat|, which implies |o_hat - o| <= eps |o|. H and all choices before the draws
depend on the sketches and on the keys read alone. A row for which that would take as many reads as it has
keys is computed exactly.

The probability is over the draws of this call alone: keys, values and queries may be anything, and may have
been chosen in sight of earlier draws.

*Rounding.* All is computed in float64. Let u = 2^-53 and gamma_n = n u / (1 - n u). It is assumed that sums
and products are rounded to the nearest number, that a dot product of n terms adds them up in any order, with
fused multiply-adds or without (then its error is at most gamma_n sum |a_i b_i|: Higham 2002, eq. 3.5), that
exp and tanh err by at most 4 units in the last place, and that numbers below 2^-1022 are kept or become 0.
The words below name the numbers that are computed: weights, sums and so on. The exact output is that of the
queries, keys and values as they are given, and of the logits without any rounding.

(3) *Logits.* With x the scaled query, the centre taken off the keys, and K >= |k_j - centre| of all keys (and
the size of the centre added, where a cap or a sink sees it), x . (k_j - centre) errs by at most gamma_(E+3)
|x| K; adding the common part, a cap (which brings no two logits farther apart), adding b_j and taking the
largest off by at most 17 u (|x| K + |sink|); exp by 8 u. So the logarithm of a computed weight is within 2
omega of the exact one, omega = 4 u (E + 32) (1 + |x| K + |sink|) (`logit_rounding`); the score that a_j is
made of has its own rounding within b_j (`Int8Sketch`), to which 2^24 omega is added here. That is more than
enough for a_j and for exp(b_j) a_j, and makes (5) small. A row of 2^24 omega > 1 is computed exactly.

(4) *Sums.* gamma = 8 (n + d + 32) u (`sum_rounding`) bounds the relative error of sums of up to 4 n terms.
The centre c is any vector, here the computed one; then, beside Z, the numerator about c has what the weights
of H are off, at most 4 omega sum_(j in H) exp(l_j) |(v_j - c, rho)|, and D_0 times the error of c, at most
gamma D_0 (3 s + m), s and m the weighted means of |u_j| and e_j. The computed D_hat and o_hat are off by at
most gamma D_hat and gamma D_hat (|o_hat - c| + |c|), as products. With these vectors added to Z_hat - Z in
(2), the inequality holds for R + rho_0 in place of R, with

    rho_0 = 4 (omega + gamma) D_0 (s + m + a + 2 |c| + rho) + gamma D_hat (|o_hat - c| + |c| + rho),

a the weighted mean of |u_j - c|, and n 2^-1022 max_j (|u_j - c| + e_j) for weights that became 0. Squares of
distances are differences of squares; twice gamma_(d+4) (|u_j|^2 + |c|^2) is added to them. A row of D_0 below
2^-500 is computed exactly.

(5) *Draws.* `whole_shares` makes every M_j a whole number of 2^-48 of their sum, none smaller than before, so
that a key is drawn with the probability M_j / G exactly, by the first 48 bits of a random number. A computed
z_j is within 3 sqrt(2) omega exp(b_j) a_j |(u_j - c, rho)| + 3 omega exp(b_j) a_j e_j of z_j, at most 2^-20
M_j because of the 2^24 omega in b_j. So X_i is within 2^-20, the sums of fewer than 2^31 of them and R / G
within 2^-21 each: 2^-19 is added to every |X_i| in R, and G 2^-19 to R (`DRAWN_ROUNDING`).

(6) Last, the output is stored in the cache's precision, of unit u': by at most u' (|o_hat| + sqrt(d) times
its least normal number) more. `error_bound` and the comparison with eps |o_hat| have factors 1 + 2^-40 for
their own rounding. A row that is computed exactly, in float64, is within 8 (omega + gamma) (sum_j p_j |v_j| +
|o|) before it is stored, omega with K the largest key; where that is more than eps |o| allows, as the values
cancel, `info.fallbacks` says so.

Sources: Pinelis, Optimum bounds for the distributions of martingales in Banach spaces (1994), th. 3.2; Fan,
Grama and Liu, Exponential inequalities for martingales with applications (2015); Howard, Ramdas, McAuliffe
and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences (2021), th. 4; Waudby-Smith and
Ramdas, Estimating means of bounded random variables by betting (2020), for lambda_i by prediction; Higham,
Accuracy and stability of numerical algorithms (2002), chapter 3, for rounding;
Martinez-Taboada and Ramdas, Sharp empirical Bernstein bounds in smooth Banach spaces (2024), who bound the
vectors about a running mean. Here they are taken about 0, as the sketches' own sum has already been taken
off: a control variate whose sum is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATES = torch.linspace(0.1, 0.95, 18, dtype=torch.float64)
"""The lambda_i among which the best one is chosen."""

UNIT = 48
"""Probabilities of draws are whole numbers of 2^-UNIT."""

DRAWN_ROUNDING = 2.0**-19
"""What rounding may change of |X_i|, and of the mean of the X_i: (5) above."""

UNIT_ROUNDOFF = 2.0**-53
"""u, of float64."""


@dataclass(frozen=True)
class Promise:
    """What is promised of every row: P(|o_hat - o| > `tolerance` |o|) <= `risk`."""

    tolerance: float
    risk: float


def psi(rate: Tensor) -> Tensor:
    """-log(1 - x) - x."""
    return -torch.log1p(-rate) - rate


def error_bound(radius: Tensor, normaliser: Tensor, moved: Tensor, shift: Tensor) -> Tensor:
    """The largest E >= 0 with E <= A sqrt(1 + (moved + E)^2 / shift^2), A = radius / normaliser.

    Infinite where there is none. All of the same shape; `moved` is |o_hat - c| and `shift` rho. In float64 it
    is not below the exact solution: A is made larger by 2^-40 of itself, of which rounding takes a part.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> error_bound(0.1 * one, one, 0 * one, 1e6 * one)
    tensor(0.1000)
    """
    tiny = torch.finfo(radius.dtype).tiny
    a, shift = radius * (1 + 2**-40) / normaliser.clamp_min(tiny), shift.clamp_min(tiny)
    slope = (a / shift).square()  # (A / rho)^2
    rest = 1 - slope
    root = a * ((moved / shift).square() + rest).clamp_min(0).sqrt()  # no square of A, which could be 0
    bound = (slope * moved + root) / rest.clamp_min(tiny)
    return torch.where((normaliser > 0) & (rest > 0), bound * (1 + 2**-40), torch.inf)


def logit_rounding(x: Tensor, size: Tensor, sinks: Tensor | None) -> Tensor:
    """omega of (3), half of what rounding may change in the logarithm of a weight: float64, (h, r, 1).

    Parameters
    ----------
    x : Tensor, float64, (h, r, E)
        Scaled queries.
    size : Tensor, (h, 1, 1)
        K, no less than any key.
    sinks : Tensor, (h, r, 1), optional
    """
    reach = x.norm(dim=-1, keepdim=True) * size
    if sinks is not None:
        reach = reach + torch.where(sinks.isfinite(), sinks.abs(), 0)
    return 4 * UNIT_ROUNDOFF * (x.shape[-1] + 32) * (1 + reach)


def sum_rounding(terms: int) -> float:
    """gamma of (4), for sums of up to four times so many terms.

    Examples
    --------
    >>> sum_rounding(65536) < 1e-10
    True
    """
    return 8 * (terms + 32) * UNIT_ROUNDOFF


def whole_shares(bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers m_j with m_j unit >= M_j whose sum is 2^UNIT: see (5).

    Parameters
    ----------
    bounds : Tensor, float64, (..., n)
        M_j >= 0.

    Returns
    -------
    tuple of Tensor
        m_j, int64, (..., n), 0 where M_j is; and the unit, (...), 0 where all M_j are.

    Examples
    --------
    >>> shares, unit = whole_shares(torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    >>> bool((shares * unit >= torch.tensor([1, 0, 3])).all()), int(shares.sum()) == 2**UNIT
    (True, True)
    """
    unit = bounds.sum(-1) / (2.0**UNIT - 4 * bounds.shape[-1])
    shares = bounds / unit.clamp_min(torch.finfo(bounds.dtype).tiny)[..., None]
    shares = torch.where(bounds > 0, shares.floor() + 2, 0).long()
    rest = 2**UNIT - shares.sum(-1, keepdim=True)
    return shares.scatter_add(-1, bounds.argmax(-1, keepdim=True), rest), unit


def planned_draws(share: Tensor, risk: float, square: Tensor | float) -> tuple[Tensor, Tensor]:
    """How many draws bring R down to a share of G, and the lambda_i with which.

    Parameters
    ----------
    share : Tensor, (...)
        What R / G is to be.
    risk : float
        delta.
    square : Tensor (...) or float
        The mean |X_i|^2 that is expected.

    Returns
    -------
    tuple of Tensor
        Draws, infinite where no lambda_i does; and lambda_i, both (...).
    """
    rates = RATES.to(share.device, share.dtype)
    square = torch.as_tensor(square, dtype=share.dtype, device=share.device)
    gain = rates * share[..., None] - psi(rates) * square[..., None]
    best, place = gain.max(-1)
    draws = math.log(2 / risk) / best.clamp_min(torch.finfo(best.dtype).tiny)
    return torch.where(best > 0, draws, torch.inf), rates[place]
