"""`qtx-lab bench decode`: one new token's attention by a `SampledKVCache`, beside the fastest exact form.

The exact forms are SDPA and two matrix products, with K as it is and with K stored transposed. The baseline
is the form that was the fastest in the same run. The caches of several layers take turns, as in a model, so
that none of them stays in the processor's own cache; and the methods take turns, so that each begins after
another one has filled that cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import sampled_attention
from ..cache import SampledKVCache
from ..models.reference import load_reference_model
from ..models.text import encode, reference_text
from .base import BenchRow, Method, compare, time_in_turns

EXACT_FORMS = ("sdpa", "matmul", "matmul, K transposed")
ALLOWED = 1.1
"""A sketch may have this many times the error of draws by the exact logits (the sketch `exact`)."""
MIXED_RANK = 36
"""Components of the mixed sketch, 12 bytes a key, where keys have as many features or more.

With the default of 24 its error at 65,536 keys is 1.10 times that of draws by the exact logits.
"""
QUERIES = 64
"""Queries of each head over which errors are averaged."""
CASES = ((8192, 64, 128, 9, 3), (8192, 128, 256, 8, 8), (65_536, 128, 256, 8, 8))
"""Keys, features, draws, query heads and key heads; the first has SmolLM2-135M's heads."""
LAYERS_BYTES = 1 << 29
"""Bytes of the keys and values that take turns: more than processors' caches hold."""


@dataclass(frozen=True)
class Layer:
    """A layer: q (H, QUERIES, E), k (Hkv, n, E), v (Hkv, n, Ev), and earlier queries (H, M, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    earlier_queries: Tensor


def bench_decode(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Exact attention of one token against sketches at equal draws; rows as of `compare`.

    Synthetic keys have a spectrum of variances 1 / i, along random axes for each head. `seconds` is the time
    of one layer; `error` is the root mean squared error over the exact output's root mean square, over 64
    queries of each head and layer. `repeated seconds` is the median time of calls of the same method in
    sequence, between which nothing else fills the processor's cache. Further details of the sketches' rows:

    - `error ratio`: the error over that of the sketch `exact`, whose keys are drawn by their exact logits. A
      sketch passes if this is at most `ALLOWED`;
    - `error of i.i.d. draws`: what `monte-carlo` has at equal draws;
    - `build seconds`: the time to build one layer's cache;
    - `append seconds`, `median append`, `longest append`: the mean, the median and the longest time to append
      a token, in seconds, while a layer grows by a quarter.
    """
    rows = []
    cases = [(2048, 64, 64, 8, 8)] if quick else CASES
    turns = 5 if quick else 15
    for n, features, draws, heads, kv_heads in cases:
        num_layers = 1 if quick else max(1, LAYERS_BYTES // (2 * kv_heads * n * features * 4))
        layers = [synthetic(kv_heads, n, features, seed, heads // kv_heads) for seed in range(num_layers)]
        grouped = f"{heads} heads" if heads == kv_heads else f"{heads} heads on {kv_heads} key heads"
        case = f"{grouped}, n={n:,}, d={features}, S={draws}, {torch.get_num_threads()} threads"
        rows += measure(case, layers, draws, (features // 4,), copy_bandwidth, turns, with_prange=not quick)
    n, draws = (512, 64) if quick else (1024, 128)
    case = f"reference model's own keys, n={n:,}, d=32, S={draws}"
    rows += measure(case, reference(n), draws, (16, 24, 32), copy_bandwidth, turns)
    return rows


def measure(
    case: str,
    layers: Sequence[Layer],
    draws: int,
    ranks: Sequence[int],
    copy_bandwidth: float,
    turns: int,
    with_prange: bool = False,
) -> list[BenchRow]:
    """The rows of a case, with a row for the same pass started by `numba.prange` if that is wanted."""
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, dict[str, Any]] = {"exact logits": {"proposal": "exact"}}
    settings |= {f"low-rank {rank}": {"proposal": "low-rank", "rank": rank} for rank in ranks}
    settings["int4"] = {"proposal": "int4"}
    if layers[0].k.shape[-1] >= MIXED_RANK:
        settings[f"mixed {MIXED_RANK}"] = {"proposal": "mixed", "rank": MIXED_RANK}
    exact_outputs = [exact(layer.q, layer.k, layer.v) for layer in layers]
    independent = [
        sampled_attention(
            x.q, x.k, x.v, sampler="monte-carlo", num_samples=draws, enable_gqa=True, generator=generator
        ).output
        for x in layers
    ]
    methods = exact_forms(layers)
    details: dict[str, dict[str, float]] = {}
    exact_sketch_error = math.nan
    for name, options in settings.items():
        start = time.perf_counter()
        caches = [SampledKVCache.build(x.k, x.v, queries=x.earlier_queries, **options) for x in layers]
        build_seconds = (time.perf_counter() - start) / len(layers)
        outputs = [
            cache.attend(x.q, draws, generator=generator).output
            for cache, x in zip(caches, layers, strict=True)
        ]
        error = relative_error(outputs, exact_outputs)
        if name == "exact logits":
            exact_sketch_error = error
        details[name] = {
            "error ratio": error / exact_sketch_error,
            "build seconds": build_seconds,
            **append_seconds(layers[0], options),
        }
        allowed = ALLOWED * exact_sketch_error
        methods.append(sketch_method(name, caches, layers, draws, error, allowed, generator))
        if with_prange and name == f"low-rank {ranks[0]}":
            methods.append(started_by_prange(methods[-1]))
    first = exact_outputs[0][:, :1].double()
    rows = compare(case, methods, first, ("/".join(EXACT_FORMS),), turns, copy_bandwidth)
    repeated = {x.name: time_in_turns({x.name: x.call}, 4 * turns)[x.name].median for x in methods}
    independent_error = relative_error(independent, exact_outputs)
    rows = [
        replace(
            row,
            details={
                **row.details,
                **details.get(row.method, {}),
                "repeated seconds": repeated[row.method],
                "error of i.i.d. draws": independent_error,
            },
        )
        for row in rows
    ]
    print_details(rows)
    return rows


def sketch_method(
    name: str,
    caches: Sequence[SampledKVCache],
    layers: Sequence[Layer],
    draws: int,
    error: float,
    allowed: float,
    generator: torch.Generator,
) -> Method:
    """A sketch as a competitor; the keys and values of the draws count as read once for each head."""
    turns = cycle(list(zip(caches, [x.q[:, :1] for x in layers], strict=True)))

    def call() -> Tensor:
        cache, q = next(turns)
        return cache.attend(q, draws, generator=generator).output

    x = layers[0]
    heads, features = x.q.shape[0], x.k.shape[-1] + x.v.shape[-1]
    sketch_bytes = caches[0].sketch_nbytes()
    num_bytes = sketch_bytes + heads * draws * features * x.k.element_size()
    return Method(name, call, num_bytes, allowed, error)


def started_by_prange(method: Method) -> Method:
    """The same calls, with the threads of the compiled pass started by `numba.prange`."""
    from ..kernels.cpu_decode import launch
    from .prange import run_by_prange

    def call() -> Tensor:
        with mock.patch.object(launch, "run_on_threads", run_by_prange):
            return method.call()

    return replace(method, name=f"{method.name}, prange", call=call)


def exact_forms(layers: Sequence[Layer]) -> list[Method]:
    """SDPA, and two matrix products with the keys in both layouts."""
    group = layers[0].q.shape[0] // layers[0].k.shape[0]
    transposed = [x.k.mT.contiguous() for x in layers]
    num_bytes = layers[0].k.nbytes + layers[0].v.nbytes

    def products(x: Layer, k_transposed: Tensor) -> Tensor:
        q = x.q[:, :1].reshape(-1, group, x.q.shape[-1]) / math.sqrt(x.q.shape[-1])
        return torch.bmm(torch.bmm(q, k_transposed).softmax(-1), x.v).view(-1, 1, x.v.shape[-1])

    def in_turns(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
        turns = cycle(calls)
        return lambda: next(turns)()

    forms: dict[str, list[Callable[[], Tensor]]] = {
        "sdpa": [partial(exact, x.q[:, :1], x.k, x.v) for x in layers],
        "matmul": [partial(products, x, x.k.mT) for x in layers],
        "matmul, K transposed": [partial(products, x, k) for x, k in zip(layers, transposed, strict=True)],
    }
    return [Method(name, in_turns(forms[name]), num_bytes, 1e-4) for name in EXACT_FORMS]


def append_seconds(layer: Layer, options: dict[str, Any]) -> dict[str, float]:
    """Mean, median and longest time to append a token, while the last fifth of a layer's tokens is added."""
    n = min(layer.k.shape[1], 8192)
    first = n * 4 // 5
    cache = SampledKVCache.build(layer.k[:, :first], layer.v[:, :first], **options)
    seconds = []
    for i in range(first, n):
        start = time.perf_counter()
        cache.append(layer.k[:, i : i + 1], layer.v[:, i : i + 1])
        seconds.append(time.perf_counter() - start)
    return {
        "append seconds": sum(seconds) / len(seconds),
        "median append": median(seconds),
        "longest append": max(seconds),
    }


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of q (H, L, E) over all of k and v, grouped heads included; (H, L, Ev)."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=q.shape[0] != k.shape[0])[0]


def relative_error(outputs: Sequence[Tensor], exact_outputs: Sequence[Tensor]) -> float:
    """Root mean squared error over the exact output's root mean square, over all layers."""
    squares = [
        ((x - o).double().square().mean() / o.double().square().mean())
        for x, o in zip(outputs, exact_outputs, strict=True)
    ]
    return float(torch.stack(squares).mean().sqrt())


def synthetic(heads: int, n: int, features: int, seed: int, group: int = 1) -> Layer:
    """Keys and queries with variances 1 / i along axes of each head's own, and logits of variance 4.

    There are `heads` key heads, with `group` query heads on each.
    """
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(heads, features, features, generator=g)).Q
    scales = torch.arange(1, features + 1).rsqrt()
    axes = scales[:, None] * axes.mT * (4 * features / scales.pow(4).sum()) ** 0.25
    q, earlier, k = (
        (torch.randn(heads, each, count, features, generator=g) @ axes[:, None]).flatten(0, 1)
        for each, count in ((group, QUERIES), (group, 2 * features), (1, n))
    )
    return Layer(q, k, torch.randn(heads, n, features, generator=g), earlier)


def reference(n: int) -> list[Layer]:
    """The reference model's layers over n bytes of held-out text; the last queries attend."""
    tokens = encode(reference_text())[None, :n]
    return [
        Layer(q[0, :, -QUERIES:], k[0], v[0], q[0, :, :-QUERIES])
        for q, k, v in load_reference_model().attention_inputs(tokens)
    ]


def print_details(rows: Sequence[BenchRow]) -> None:
    """Print what the table of a case has no room for."""
    repeated = (f"{row.method} {1e3 * row.details['repeated seconds']:.2f}" for row in rows)
    print(f"  ms in calls of one method in sequence: {'; '.join(repeated)}")
    for row in rows:
        details = row.details
        if "error ratio" in details:
            print(
                f"  {row.method:<14} error {details['error ratio']:.2f} × that of draws by exact logits, "
                f"{row.error / details['error of i.i.d. draws']:.2f} × that of i.i.d. draws; built in "
                f"{details['build seconds']:.2f} s; append {1e3 * details['append seconds']:.2f} ms a token, "
                f"{1e3 * details['longest append']:.0f} ms at the most"
            )
