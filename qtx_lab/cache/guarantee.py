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
been chosen in sight of earlier draws. It is up to rounding: logits, of the keys less their mean, and sums are
rounded in the cache's precision (float32 at the least), of which `rounding` in `attend_within` takes account
in the bound; rows that are computed exactly are so in float64.

Sources: Pinelis, Optimum bounds for the distributions of martingales in Banach spaces (1994), th. 3.2; Fan,
Grama and Liu, Exponential inequalities for martingales with applications (2015); Howard, Ramdas, McAuliffe
and Sekhon, Time-uniform, nonparametric, nonasymptotic confidence sequences (2021), th. 4; Waudby-Smith and
Ramdas, Estimating means of bounded random variables by betting (2020), for lambda_i by prediction;
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

    Infinite where there is none. All of the same shape; `moved` is |o_hat - c| and `shift` rho.

    Examples
    --------
    >>> one = torch.tensor(1.0)
    >>> error_bound(0.1 * one, one, 0 * one, 1e6 * one)
    tensor(0.1000)
    """
    tiny = torch.finfo(radius.dtype).tiny
    a, shift = radius / normaliser.clamp_min(tiny), shift.clamp_min(tiny)
    slope = (a / shift).square()  # (A / rho)^2
    rest = 1 - slope
    root = a * ((moved / shift).square() + rest).clamp_min(0).sqrt()  # no square of A, which could be 0
    bound = (slope * moved + root) / rest.clamp_min(tiny)
    return torch.where((normaliser > 0) & (rest > 0), bound, torch.inf)


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
