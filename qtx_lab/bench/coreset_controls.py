"""Whether coresets of keys would be good controls, or estimates: the last table of `bench estimators`.

A coreset is a few keys, chosen by randomly pivoted Cholesky (Chen and others, 2207.06503) of the kernel
exp(q . k), as in WildCat (2602.10056), or by kernel thinning (Dwivedi and Mackey, 2110.01593), which halves
the keys until so few are left. Its surrogate weights of all keys are Nystroem's,

    p_hat proportional to exp(q . K_S) K_SS^-1 K_S,

whose full sums with the values are known from r sums that are made once. A surrogate is also an estimate of
its own, without any draw: sum_j p_hat_j v_j, or, as thinned keys stand for all alike, their own softmax.
Coresets are measured here and are no controls of the lab's, because of what the table shows.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..controls import TopKControl, make_control
from ..controls.base import dense_weights
from ..models.language_model import load_language_model
from ..models.text import reference_text
from .base import BenchRow

KEYS_TOUCHED = 128
"""Values that an estimate reads for a row: draws, and what its control reads beside them.

A coreset that is an estimate of its own has so many keys.
"""

CORESET_KEYS = (32, 64)
BESIDE_TOPK = (8, 32)
"""Keys of a coreset that is a second control, of the keys that `topk` leaves."""

KERNEL_SCALES = (0.1, 0.3, 1.0)
"""Keys are scaled by the root of this before their kernel is taken, and queries by its inverse."""

TARGET = 0.7
"""The part of the best control's variance that a coreset would have to reach on half of the heads."""

ROWS = 48
"""The last positions of the text, whose queries attend."""

RIDGE = 1e-9
TINY = 1e-30


def bench_coreset_controls(quick: bool) -> list[BenchRow]:
    """Coresets as controls beside those of the lab, on a model's heads, at equal keys touched.

    `error` is the variance that a control leaves of i.i.d. draws over that without a control, as the
    geometric mean over rows and heads, with the best coefficient for each row; a control that reads r values
    leaves `KEYS_TOUCHED` - r draws. Nothing is sampled: variances are computed from all keys. Coresets
    `beside topk` are a second control, of the keys that `topk` leaves, with the best pair of coefficients. A
    coreset passes if it leaves at most `TARGET` of what the best control of the lab leaves on half of the
    heads, that best one being chosen for each head; `heads within target` is their share. Of coresets alone,
    `error` is the squared error in place of a variance.
    """
    model = load_language_model("reference" if quick else "smollm2-135m")
    layers, n = ((1, 4), 192) if quick else ((0, 3, 8, 15, 22, 29), 1024)
    inputs = model.attention_inputs(model.encode(reference_text())[None, :n], layers)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, float] = {}
    heads: list[dict[str, Tensor]] = []
    for q, k, v in inputs:
        group = q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            rows_q, keys, values = q[0, head, -ROWS:], k[0, head // group], v[0, head // group]
            heads.append(_variances(rows_q.double(), keys.double(), values.double(), generator, seconds))
    case = f"coresets as controls, {model.name}, {len(heads)} heads, n={n}, {KEYS_TOUCHED} keys touched"
    print(f"\n{case}\n  {'control':<66}{'variance':>9}{'heads within target':>21}  check")
    rows = []
    for name in heads[0]:
        is_coreset = name.startswith("coreset")
        best = [min(x for other, x in head.items() if not other.startswith("coreset")) for head in heads]
        within = sum(float(head[name] / x) <= TARGET for head, x in zip(heads, best, strict=True)) / len(
            heads
        )
        error = math.exp(sum(float((head[name] / head["no control"]).log()) for head in heads) / len(heads))
        check = "pass" if not is_coreset or within >= 0.5 else f"within {TARGET} on {within:.0%} of the heads"
        details = {"heads within target": within} if is_coreset else {}
        rows.append(
            BenchRow(case, name, seconds.get(name, 0.0), "no control", None, error, check, details=details)
        )
        print(f"  {name:<66}{error:>9.3f}{format(within, '.0%') if is_coreset else '':>21}  {check}")
    return rows


def _variances(
    q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator, seconds: dict[str, float]
) -> dict[str, Tensor]:
    """What controls leave for the rows of one head, a geometric mean: q (M, E), k (n, E), v (n, d)."""
    n, scale = len(k), q.shape[-1] ** -0.5
    visible = torch.ones(len(q), n, dtype=torch.bool).tril(n - len(q))
    p = (q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1)
    result, topk = {"no control": _variance(p, [], v, 0)}, torch.zeros_like(p)
    positions = torch.arange(n - len(q), n)
    for name in ("topk-8", "topk", "linformer", "performer"):
        control = TopKControl(8) if name == "topk-8" else make_control(name)
        read = control.keys if isinstance(control, TopKControl) else 0
        start = time.perf_counter()
        prepared = control.prepare(
            k[None], v[None], scale=scale, causal=False, q=q[None], generator=generator
        )
        surrogate = dense_weights(prepared, q[None], positions, n)[0] * visible
        seconds[name] = time.perf_counter() - start
        result[name] = _variance(p, [surrogate], v, read)
        if name == "topk":
            topk, topk_read = surrogate, read
    x, keys = q * scale, k - k.mean(0)  # which changes no row's probabilities
    for kernel_scale in KERNEL_SCALES:
        balance = kernel_scale * float(x.norm(dim=-1).mean() / keys.norm(dim=-1).mean())
        for choice, choose in (("Cholesky", pivots), ("thinning", thinned)):
            for size in BESIDE_TOPK:
                start = time.perf_counter()
                coreset = choose(keys, size, balance, generator)
                rest = _nystroem(x, keys, coreset, balance) * visible * (topk == 0)
                name = f"coreset of {size} by {choice} beside topk, kernel scale {kernel_scale:g}"
                seconds[name] = time.perf_counter() - start
                result[name] = _variance(p, [topk, rest], v, topk_read + size)
            for size in (*CORESET_KEYS, KEYS_TOUCHED):
                start = time.perf_counter()
                coreset = choose(keys, size, balance, generator)
                surrogate = _nystroem(x, keys, coreset, balance) * visible
                alone = size == KEYS_TOUCHED
                name = f"coreset of {size} by {choice}{alone * ' alone'}, kernel scale {kernel_scale:g}"
                seconds[name] = time.perf_counter() - start
                result[name] = (
                    _squared_error(p, surrogate, v) if alone else _variance(p, [surrogate], v, size)
                )
        weights = torch.zeros_like(p)
        weights[:, coreset] = p[:, coreset]
        name = f"coreset of {KEYS_TOUCHED} by thinning alone, its softmax, kernel scale {kernel_scale:g}"
        seconds[name], result[name] = 0.0, _squared_error(p, weights, v)
    return result


def _squared_error(p: Tensor, surrogate: Tensor, v: Tensor) -> Tensor:
    """The squared error of a surrogate's own weighted mean of the values, over rows."""
    tiny = torch.finfo(p.dtype).tiny
    weights = surrogate / surrogate.sum(-1, keepdim=True).clamp_min(tiny)
    return ((weights - p) @ v).square().sum(-1).clamp_min(tiny).log().mean().exp()


def _variance(p: Tensor, surrogates: list[Tensor], v: Tensor, read: int) -> Tensor:
    """The variance of an estimate of p v by draws from p, with the best multiples of controls, over rows.

    It is the least over beta of the variance of v_j (1 - sum_i beta_i p_hat_ij / p_j) for one draw, over the
    draws that are left. Surrogate weights p_hat_i are (M, n).
    """
    tiny, size, output = torch.finfo(p.dtype).tiny, v.square().sum(-1), p @ v
    plain = left = p @ size - output.square().sum(-1)
    if surrogates:
        s = torch.stack(surrogates)  # [I, M, n]
        sums = s @ v
        both = s @ size - (sums * output).sum(-1)  # covariances with the draws, [I, M]
        own = torch.einsum("imn,kmn,mn->mik", s, s / p.clamp_min(tiny), size.expand_as(p))
        own = own - torch.einsum("imd,kmd->mik", sums, sums)
        beta = torch.linalg.lstsq(own, both.mT[..., None], driver="gelsd").solution[..., 0]
        left = plain - (beta * both.mT).sum(-1)
    return (torch.maximum(left, 1e-9 * plain.clamp_min(tiny)) / (KEYS_TOUCHED - read)).log().mean().exp()


def _nystroem(x: Tensor, k: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """Surrogate weights (M, n) of keys k (n, E) for scaled queries x (M, E), by the coreset `chosen`."""
    coreset = k[chosen]
    among = torch.exp(scale * coreset @ coreset.mT)
    ridge = RIDGE * among.diagonal().mean() * torch.eye(len(coreset), dtype=k.dtype)
    to_all = torch.linalg.solve(among + ridge, torch.exp(scale * coreset @ k.mT))
    weights = (x @ coreset.mT).softmax(-1) @ to_all
    return weights.clamp_min(0)


def pivots(k: Tensor, size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Keys of k (n, E) that randomly pivoted Cholesky of exp(scale k_i . k_j) chooses, at most `size`.

    Source: Chen, Epperly, Tropp and Webber (2207.06503), algorithm 1.
    """
    top = scale * k.square().sum(-1)
    diagonal = torch.exp(top - top.max())
    factor, chosen = k.new_zeros(len(k), size), []
    for i in range(size):
        if diagonal.sum() <= 0:
            break
        pivot = int(diagonal.multinomial(1, generator=generator))
        column = torch.exp(scale * (k @ k[pivot]) - top.max()) - factor[:, :i] @ factor[pivot, :i]
        chosen.append(pivot)
        factor[:, i] = column / column[pivot].clamp_min(torch.finfo(k.dtype).tiny).sqrt()
        diagonal = (diagonal - factor[:, i].square()).clamp_min(0)
        diagonal[chosen] = 0
    return torch.tensor(chosen)


def thinned(k: Tensor, size: int, scale: float, generator: torch.Generator) -> Tensor:
    """Keys of k (n, E) that kernel thinning with exp(scale k_i . k_j) leaves, at most `size`.

    The keys are halved until they are so few: they come in pairs, in random order, of which one stays, with a
    probability that balances the sum of the kernel over what stayed against that over what went. Then each
    is replaced by the free key that brings the mean of the kernel nearest to that of all keys. Source:
    Dwivedi and Mackey (2110.01593), algorithm 1 with the failure probability 1/2.
    """
    top = scale * k.square().sum(-1).max()
    kernel = torch.exp(scale * (k @ k.mT) - top)
    left = torch.randperm(len(k), generator=generator)
    while len(left) > size:
        pairs = left[: len(left) // 2 * 2].view(-1, 2)
        difference = kernel[pairs[:, 0]] - kernel[pairs[:, 1]]  # [pairs, n]
        between = difference.gather(1, pairs[:, :1])[:, 0] - difference.gather(1, pairs[:, 1:])[:, 0]
        uniform = torch.rand(len(pairs), dtype=k.dtype, generator=generator)
        balance, spread, swapped = k.new_zeros(len(k)), 0.0, []
        squares = between.clamp_min(TINY).tolist()
        steps = zip(pairs.tolist(), difference, squares, uniform.tolist(), strict=True)
        for (first, second), change, square, u in steps:
            most = max(math.sqrt(2 * math.log(4 * len(pairs)) * square * spread), square)
            spread += square * max(0.0, 1 + (square - 2 * most) * spread / most**2)
            swapped.append(u < 0.5 * (1 - float(balance[first] - balance[second]) / most))
            balance += change if swapped[-1] else -change
        left = torch.where(torch.tensor(swapped), pairs[:, 1], pairs[:, 0])
    mean, total = kernel.mean(0), kernel[left].sum(0)
    taken = torch.zeros(len(k), dtype=torch.bool).index_fill_(0, left, True)
    for i, old in enumerate(left.tolist()):
        total, taken[old] = total - kernel[old], False
        distance = kernel.diagonal() + 2 * total - 2 * len(left) * mean  # up to a constant
        left[i] = distance.masked_fill(taken, torch.inf).argmin()
        total, taken[left[i]] = total + kernel[left[i]], True
    return left
