"""`qtx-lab bench decode`: one new token's attention by a `SampledKVCache`, beside the fastest exact form.

The exact forms are SDPA and two matrix products with K as it is and stored transposed; the baseline is the one that was
fastest in the same run. Several layers' caches take turns, as in a model, so that none is left in the processor's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sampled_attention
from ..cache import SampledKVCache
from ..models.reference import encode, load_reference_model, reference_text
from .base import Method, compare

EXACT_FORMS = ("sdpa", "matmul", "matmul, K transposed")
ALLOWED = 1.1
"""A sketch's error over that of draws by the exact logits (the `exact` sketch) above which it gets no ratio."""
QUERIES = 64
"""Queries a key head that errors are measured over."""
ROTATED = 1 << 29
"""Bytes of keys and values that take turns: more than processors' caches hold."""


@dataclass(frozen=True)
class Layer:
    """What a token attends to: q (H, QUERIES, E), k (Hkv, n, E) and v (Hkv, n, Ev), and queries that came before."""

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor


def bench_decode(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Exact attention of one token against sketches at equal draws; rows as in `run_bench`, and with

    - `error`: root mean squared error over the exact output's root mean square, over 64 queries of each head and layer;
      `error ratio`: over that of the `exact` sketch, whose keys are drawn by their exact logits; a sketch passes where
      it is at most `ALLOWED`;
    - `build seconds` of a layer; `append seconds`, a token, and `longest append`, where a layer grows by a quarter.

    `seconds` are of one layer. Synthetic keys have a spectrum of variances 1 / i, the heads' axes turned at random.
    """
    rows = []
    cases = [(2048, 64, 64)] if quick else [(8192, 128, 256), (65_536, 128, 256)]
    for n, features, draws in cases:
        count = 1 if quick else max(1, ROTATED // (2 * 8 * n * features * 4))
        layers = [synthetic(8, n, features, seed) for seed in range(count)]
        name = f"8 heads, n={n:,}, d={features}, S={draws}, {torch.get_num_threads()} threads"
        ranks = (features // 8,)
        rows += measure(name, layers, draws, ranks, copy, 5 if quick else 15)
    n, draws = (512, 64) if quick else (1024, 128)
    name = f"reference model's own keys, n={n:,}, d=32, S={draws}"
    rows += measure(name, reference(n), draws, (8, 16, 24), copy, 5 if quick else 15)
    return rows


def measure(
    name: str, layers: Sequence[Layer], draws: int, ranks: Sequence[int], copy: float, turns: int
) -> list[dict[str, Any]]:
    """The rows of a case."""
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {"exact logits": {"proposal": "exact"}}
    kinds |= {f"low-rank {rank}": {"proposal": "low-rank", "rank": rank} for rank in ranks}
    kinds["int4"] = {"proposal": "int4"}
    wanted = [exact(layer.q, layer.k, layer.v) for layer in layers]
    independent = [
        sampled_attention(
            x.q, x.k, x.v, sampler="monte-carlo", num_samples=draws, enable_gqa=True, generator=generator
        ).output
        for x in layers
    ]
    methods = exact_forms(layers)
    facts: dict[str, dict[str, float]] = {}
    base = math.nan
    for label, options in kinds.items():
        start = time.perf_counter()
        caches = [SampledKVCache.build(x.k, x.v, queries=x.seen, **options) for x in layers]
        built = (time.perf_counter() - start) / len(layers)
        found = [
            cache.attend(x.q, draws, generator=generator).output
            for cache, x in zip(caches, layers, strict=True)
        ]
        error = relative(found, wanted)
        base = error if label == "exact logits" else base
        facts[label] = {"error ratio": error / base, "build seconds": built, **appending(layers[0], options)}
        methods.append(sampled(label, caches, layers, draws, error, ALLOWED * base, generator))
    first = wanted[0][:, :1].double()
    rows = compare(name, methods, first, ("/".join(EXACT_FORMS),), turns, copy)
    for row in rows:
        row |= facts.get(row["method"], {})
        row["error of i.i.d. draws"] = relative(independent, wanted)
    print_facts(rows)
    return rows


def sampled(
    label: str,
    caches: Sequence[SampledKVCache],
    layers: Sequence[Layer],
    draws: int,
    error: float,
    allowed: float,
    generator: torch.Generator,
) -> Method:
    """A sketch as a competitor; the draws' keys and values count as read, once for each head."""
    turn = cycle(list(zip(caches, [x.q[:, :1] for x in layers], strict=True)))

    def call() -> Tensor:
        cache, q = next(turn)
        return cache.attend(q, draws, generator=generator).output

    x = layers[0]
    heads, features = x.q.shape[0], x.k.shape[-1] + x.v.shape[-1]
    sketch = caches[0].sketch_nbytes() * (heads // x.k.shape[0])  # each head reads its own components
    if caches[0].proposal != "low-rank":
        sketch = caches[0].sketch_nbytes()
    return Method(label, call, sketch + heads * draws * features * x.k.element_size(), allowed, error)


def exact_forms(layers: Sequence[Layer]) -> list[Method]:
    """SDPA, and two matrix products with the keys in both layouts, grouped heads side by side."""
    group = layers[0].q.shape[0] // layers[0].k.shape[0]
    turned = [x.k.mT.contiguous() for x in layers]
    num_bytes = layers[0].k.nbytes + layers[0].v.nbytes

    def products(x: Layer, k: Tensor) -> Tensor:
        q = x.q[:, :1].reshape(-1, group, x.q.shape[-1]) / math.sqrt(x.q.shape[-1])
        return torch.bmm(torch.bmm(q, k).softmax(-1), x.v).view(-1, 1, x.v.shape[-1])

    def taking_turns(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        turn = cycle(calls)
        return lambda: next(turn)()

    forms: dict[str, list[Callable[[], Tensor]]] = {
        "sdpa": [partial(exact, x.q[:, :1], x.k, x.v) for x in layers],
        "matmul": [partial(products, x, x.k.mT) for x in layers],
        "matmul, K transposed": [partial(products, x, k) for x, k in zip(layers, turned, strict=True)],
    }
    return [Method(name, taking_turns(forms[name]), num_bytes, 1e-4) for name in EXACT_FORMS]


def appending(layer: Layer, options: dict[str, Any]) -> dict[str, float]:
    """Seconds to append a token, on average and at the most, while the last fifth of a layer's tokens is added."""
    n = min(layer.k.shape[1], 8192)
    start = n * 4 // 5
    cache = SampledKVCache.build(layer.k[:, :start], layer.v[:, :start], **options)
    seconds = []
    for i in range(start, n):
        begin = time.perf_counter()
        cache.append(layer.k[:, i : i + 1], layer.v[:, i : i + 1])
        seconds.append(time.perf_counter() - begin)
    return {
        "append seconds": sum(seconds) / len(seconds),
        "median append": median(seconds),
        "longest append": max(seconds),
    }


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of q (H, L, E) over all of k and v."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=q.shape[0] != k.shape[0])[0]


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root mean squared error over the exact output's root mean square, over all layers."""
    squares = [
        ((x - o).double().square().mean() / o.double().square().mean())
        for x, o in zip(found, wanted, strict=True)
    ]
    return float(torch.stack(squares).mean().sqrt())


def synthetic(heads: int, n: int, features: int, seed: int) -> Layer:
    """Keys and queries of a spectrum of variances 1 / i along axes of each head's own; logits of variance 4."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(heads, features, features, generator=g)).Q
    size = torch.arange(1, features + 1).rsqrt()
    axes = size[:, None] * axes.mT * (4 * features / size.pow(4).sum()) ** 0.25
    q, seen, k = (torch.randn(heads, m, features, generator=g) @ axes for m in (QUERIES, 2 * features, n))
    return Layer(q, k, torch.randn(heads, n, features, generator=g), seen)


def reference(n: int) -> list[Layer]:
    """The reference model's layers over n bytes of held-out text; the last queries are asked."""
    tokens = encode(reference_text())[None, :n]
    return [
        Layer(q[0, :, -QUERIES:], k[0], v[0], q[0, :, :-QUERIES])
        for q, k, v in load_reference_model().attention_inputs(tokens)
    ]


def print_facts(rows: Sequence[dict[str, Any]]) -> None:
    """What the table of a case has no room for."""
    for row in rows:
        if "error ratio" in row:
            print(
                f"  {row['method']:<14} error {row['error ratio']:.2f} × that of draws by exact logits, "
                f"{row['error'] / row['error of i.i.d. draws']:.2f} × that of i.i.d. draws; built in "
                f"{row['build seconds']:.2f} s; append {1e3 * row['append seconds']:.2f} ms a token, "
                f"{1e3 * row['longest append']:.0f} ms at the most"
            )
