"""Tokens a second of a whole model on one GPU: exact attention beside draws, in the shape of SmolLM2-135M.

Weights, keys and values are random, since only the time of a step is measured and what draws cost it. The
scale of each layer's logits is set so that their standard deviation is about 3. `qtx_lab.bench.device` runs
this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..cache import SampledKVCache
from ..cache.sketches import ComponentSketch, Int4Sketch, LowRankSketch
from ..kernels.choice import choose
from ..kernels.decode import reference as decode_reference
from ..kernels.inputs import Inputs
from ..kernels.sketch_decode import reference as sketch_decode_reference
from ..models.base import AttentionFn
from ..models.reference import ReferenceConfig, ReferenceModel
from ..streams import Stream
from .base import BenchRow, shown, span
from .kernels import ALLOWED, DecodeMethod, describe, only, time_methods

SMOLLM2 = ReferenceConfig(
    vocab_size=49_152,
    context=8192,
    layers=30,
    width=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp_width=1536,
    rope_base=100_000.0,
)
"""The architecture of SmolLM2-135M."""

LOGIT_DEVIATION = 3.0
"""Standard deviation of a row's logits."""


@dataclass(frozen=True)
class Setting:
    """What is decoded: a model with random weights, and the keys and values of each layer.

    Parameters
    ----------
    model : ReferenceModel
    tokens : Tensor, int64, (B, 1)
        The newest token of each sequence.
    layers : list of (Tensor, Tensor)
        Keys and values of each layer, (B, Hkv, n, E); the last place is the newest token's.
    scales : list of float
        The factor of q · k in each layer.
    draws : int
        Of a row.
    """

    model: ReferenceModel
    tokens: Tensor
    layers: list[tuple[Tensor, Tensor]]
    scales: list[float]
    draws: int

    @classmethod
    def random(
        cls, config: ReferenceConfig, batch: int, draws: int, device: torch.device, dtype: torch.dtype
    ) -> Setting:
        """Random weights, keys of a falling spectrum, and values of mean 1, so that outputs are not tiny."""
        g = torch.Generator(device).manual_seed(0)
        torch.manual_seed(0)
        with torch.device(device):
            model = ReferenceModel(config).to(dtype).eval()
        new = partial(torch.randn, generator=g, device=device)
        spectrum = (1 + torch.arange(config.head_dim, device=device)) ** -1.0
        shape = (batch, config.kv_heads, config.context, config.head_dim)
        layers = []
        for _ in range(config.layers):
            basis = torch.linalg.qr(new(config.kv_heads, config.head_dim, config.head_dim)).Q
            layers.append(((new(shape) @ (basis * spectrum[:, None])).to(dtype), (1 + new(shape)).to(dtype)))
        tokens = torch.randint(config.vocab_size, (batch, 1), generator=g, device=device)
        setting = cls(model, tokens, layers, [], draws)
        scales: list[float] = []

        def measure(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = layers[layer]
            group = q.shape[1] // k.shape[1]
            logits = q.float().unflatten(1, (-1, group)).flatten(2, 3) @ keys.float().mT
            scales.append(LOGIT_DEVIATION / float(logits.std(-1).mean()))
            return exact_output(q.to(dtype), keys, values, scales[-1])

        setting.step(measure)
        return replace(setting, scales=scales)

    def step(self, attention: AttentionFn) -> Tensor:
        """Logits (B, vocabulary) of the next token."""
        with torch.no_grad():
            return self.model(self.tokens, attention, self.model.config.context - 1)[:, -1]

    def with_cache(self, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        """A step that stores the newest token's keys and values, then calls `attend(layer, q, k, v)`.

        There k and v are all keys and values of the layer.
        """

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.layers[layer]
            keys[:, :, -1:], values[:, :, -1:] = k, v
            return attend(layer, q.to(keys.dtype), keys, values)

        return partial(self.step, attention)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's weights."""
        return sum(p.nbytes for p in self.model.parameters())


def bench_model_speed(
    device: torch.device,
    copy_bandwidth: float,
    config: ReferenceConfig = SMOLLM2,
    *,
    batch: int = 32,
    draws: int = 256,
    turns: int = 9,
) -> list[BenchRow]:
    """One step of decoding with `context` keys, as a CUDA graph, bfloat16.

    The baseline is the fastest exact form. `error` is that of the logits, relative to those of the first
    exact form, without the logits' mean over the vocabulary; draws may have `ALLOWED` times the error of
    their plain-torch reference at the same seeds. The details are `tokens_per_second` of all sequences
    together, `bytes` (weights, and keys and values or sketch and drawn rows, once), `bandwidth` (that over
    the time, as a fraction of what the device copies) and `device`.
    """
    setting = Setting.random(config, batch, draws, device, torch.bfloat16)
    methods = [*exact_methods(setting), *drawn_methods(setting)]
    timings = time_methods(methods, device, turns)
    fastest = min((m for m in methods if m.baseline), key=lambda m: timings[m.name].median).name
    case = f"SmolLM2-135M's shape, random weights, B={batch} n={config.context:,} S={draws} bf16"
    rows = []
    for m in methods:
        timing, passed = timings[m.name], m.error <= m.allowed_error
        details = {
            "tokens_per_second": batch / timing.median,
            "bytes": m.num_bytes,
            "bandwidth": m.num_bytes / timing.median / copy_bandwidth,
            "reference_error": None if m.baseline else m.allowed_error / ALLOWED,
            "device": describe(device, copy_bandwidth),
        }
        rows.append(
            BenchRow(
                case=case,
                method=m.name,
                seconds=timing.median,
                baseline=fastest,
                ratio=timings[fastest].median / timing.median if passed else None,
                error=m.error,
                check="pass" if passed else f"error {m.error:.3g} is above {m.allowed_error:.3g}",
                low=timing.low,
                high=timing.high,
                details=details,
            )
        )
    print_speeds(case, rows)
    return rows


# --- Exact attention ----------------------------------------------------------------------------


def exact_output(q: Tensor, k: Tensor, v: Tensor, scale: float, grouped: bool = False) -> Tensor:
    """SDPA of q (B, H, 1, E); with `grouped` the heads of a group are queries of one key head."""
    if not grouped:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[-1]), k, v, scale=scale).view(
        q.shape
    )


def exact_methods(setting: Setting) -> Iterator[DecodeMethod]:
    """SDPA by each back end that takes the call; those that do not are named with the reason."""
    keys, values = setting.layers[0]
    num_bytes = setting.weight_bytes + len(setting.layers) * (keys.nbytes + values.nbytes)
    backends: dict[str, SDPBackend | None] = {"SDPA": None}
    if keys.is_cuda:
        backends = {
            "SDPA flash": SDPBackend.FLASH_ATTENTION,
            "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
            "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
    first: Tensor | None = None
    for name, backend in backends.items():
        for grouped in (False, True):
            method = f"{name}, grouped" if grouped else name

            def attend(
                layer: int,
                q: Tensor,
                k: Tensor,
                v: Tensor,
                backend: SDPBackend | None = backend,
                grouped: bool = grouped,
            ) -> Tensor:
                with only(backend):
                    return exact_output(q, k, v, setting.scales[layer], grouped)

            step = setting.with_cache(attend)
            try:
                logits = step()
            except RuntimeError as problem:
                print(f"  {method} cannot run: {str(problem).strip().splitlines()[0]}")
                continue
            first = logits if first is None else first
            yield DecodeMethod(method, [step], num_bytes, logit_error(logits, first), 0.05, baseline=True)


def logit_error(logits: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact logits, both without their mean over the vocabulary."""
    exact, logits = (x.float() - x.float().mean(-1, keepdim=True) for x in (exact, logits))
    return ((logits - exact).norm() / exact.norm()).item()


# --- Attention by draws -------------------------------------------------------------------------


def drawn_methods(setting: Setting) -> Iterator[DecodeMethod]:
    """Draws by exact logits and from sketches, which also take in the newest token."""
    keys, values = setting.layers[0]
    exact = next(exact_methods(setting)).calls[0]()
    decode: Callable[..., Any] = decode_reference.decode
    sketch_decode: Callable[..., Any] = sketch_decode_reference.sketch_decode
    if choose((keys, keys, values)).path == "triton":
        from ..kernels.decode.launch import decode
        from ..kernels.sketch_decode.launch import sketch_decode
    heads, layers = keys.shape[0] * keys.shape[1], len(setting.layers)
    row_bytes = (keys.shape[-1] + values.shape[-1]) * keys.element_size()
    rows = heads * min(keys.shape[2], setting.draws)  # of a group that shares its draws

    def checked(
        name: str, kernel: AttentionFn, reference: AttentionFn, scanned_bytes: int, drawn_bytes: int
    ) -> DecodeMethod:
        step = setting.with_cache(kernel)
        error = logit_error(step(), exact)
        allowed = ALLOWED * logit_error(setting.with_cache(reference)(), exact)
        num_bytes = setting.weight_bytes + layers * (scanned_bytes + rows * drawn_bytes)
        return DecodeMethod(name, [step], num_bytes, error, allowed)

    yield checked(
        "exact K",
        by_draws(setting, decode),
        by_draws(setting, decode_reference.decode),
        keys.nbytes,
        row_bytes // 2,
    )
    kinds: dict[str, Callable[[], ComponentSketch]] = {
        "int4": partial(Int4Sketch, keys.shape[-1]),
        "rank 16": partial(LowRankSketch, min(16, keys.shape[-1])),
    }
    for name, make in kinds.items():
        sketches = [Sketched.of(make(), k[:, :, :-1]) for k, _ in setting.layers]
        reference = partial(from_sketches, setting, sketches, sketch_decode_reference.sketch_decode)
        kernel = partial(from_sketches, setting, sketches, sketch_decode)
        yield checked(name, kernel(), reference(), sketches[0].scanned_bytes, row_bytes)


def streams(setting: Setting) -> list[Stream]:
    """Random numbers of each layer."""
    (batch, groups, n, _), device = setting.layers[0][0].shape, setting.tokens.device
    return [
        Stream.of(torch.tensor(i, device=device), batch, groups, 1, n - 1, device)
        for i in range(len(setting.layers))
    ]


def by_draws(setting: Setting, decode: Callable[..., Any]) -> AttentionFn:
    """Attention by draws from the exact logits."""
    numbers = streams(setting)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = Inputs.of(q, k, v, scale=setting.scales[layer])
        output: Tensor = decode(x, setting.draws, 1, numbers[layer]).output
        return output.to(q.dtype).view(q.shape)

    return attend


@dataclass(frozen=True)
class Sketched:
    """The sketch of a layer's keys, with room for the newest token's, and the key at each place."""

    sketch: ComponentSketch
    order: Tensor

    @classmethod
    def of(cls, sketch: ComponentSketch, keys: Tensor) -> Sketched:
        """Fit a sketch to keys (B, Hkv, n - 1, E)."""
        flat = keys.flatten(0, 1).float()
        order = sketch.fit_in_order(flat)
        newest = torch.full_like(order[:, :1], order.shape[1])
        sketch.extend(flat[:, :1])  # makes room
        return cls(sketch, torch.cat((order, newest), 1))

    def take_in(self, key: Tensor) -> None:
        """Sketch the newest token's key (N, 1, E), at the last place."""
        self.sketch.length = self.order.shape[1] - 1
        self.sketch.extend(key)

    @property
    def scanned_bytes(self) -> int:
        """Bytes that a step reads in full."""
        return self.sketch.scanned_nbytes


def from_sketches(
    setting: Setting, sketches: Sequence[Sketched], sketch_decode: Callable[..., Any]
) -> AttentionFn:
    """Attention by draws from sketches."""
    numbers = streams(setting)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sketched = sketches[layer]
        sketched.take_in(k[:, :, -1:].flatten(0, 1).float())
        x = Inputs.of(q, k, v, scale=setting.scales[layer])
        table = sketched.sketch.scanned(sketched.order)
        output: Tensor = sketch_decode(x, table, setting.draws, 1, numbers[layer]).output
        return output.to(q.dtype).view(q.shape)

    return attend


# --- As generation runs today -------------------------------------------------------------------


def bench_generation(
    device: torch.device,
    copy_bandwidth: float,
    config: ReferenceConfig = SMOLLM2,
    *,
    batch: int = 32,
    draws: int = 256,
    turns: int = 9,
) -> list[BenchRow]:
    """Steps with a `SampledKVCache` a layer, launched one by one from Python, beside SDPA launched so too.

    The rows have no error of their own: `bench_model_speed` checks the kernels that run here. `ratio` is None
    where a kernel did not run, and `check` then says why.
    """
    setting = Setting.random(config, batch, draws, device, torch.bfloat16)
    caches = [SampledKVCache.build(k, v, "low-rank", min(16, k.shape[-1])) for k, v in setting.layers]
    generator = torch.Generator().manual_seed(0)
    kernels = []

    def by_caches(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, dtype = caches[layer], setting.layers[layer][0].dtype
        cache.append(k.to(dtype), v.to(dtype))
        estimate = cache.attend(q.to(dtype), draws, scale=setting.scales[layer], generator=generator)
        kernels.append(estimate.info.kernel)
        return estimate.output

    calls: dict[str, Callable[[], Tensor]] = {
        "SDPA": setting.with_cache(
            lambda layer, q, k, v: exact_output(q, k, v, setting.scales[layer], grouped=True)
        ),
        "SampledKVCache, rank 16": partial(setting.step, by_caches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:  # the first turns warm up
                seconds[name].append(time.perf_counter() - start)
    case = f"SmolLM2-135M's shape, random weights, B={batch} n={config.context:,} S={draws} bf16, from Python"
    kernel = kernels[-1]
    rows = []
    for name, measured in seconds.items():
        ran = name == "SDPA" or (kernel is not None and kernel.path == "triton")
        time_of_step = median(measured)
        rows.append(
            BenchRow(
                case=case,
                method=name,
                seconds=time_of_step,
                baseline="SDPA",
                ratio=median(seconds["SDPA"]) / time_of_step if ran else None,
                error=math.nan,
                check="pass" if ran else f"no kernel ran: {kernel}",
                low=min(measured),
                high=max(measured),
                details={
                    "tokens_per_second": batch / time_of_step,
                    "bandwidth": None,
                    "device": describe(device, copy_bandwidth),
                },
            )
        )
    print_speeds(case, rows)
    return rows


def print_speeds(case: str, rows: Sequence[BenchRow]) -> None:
    """Print the table of a case."""
    print(f"\n{case}")
    print(
        f"  {'method':<26}{'ms/step':>9}{'(low–high)':>18}{'tokens/s':>10}{'ratio':>7}{'of copy':>9}"
        f"{'error':>9}  check"
    )
    for row in rows:
        print(
            f"  {row.method:<26}{1e3 * row.seconds:>9.2f}{span(row, 1e3, '.2f'):>18}"
            f"{row.details['tokens_per_second']:>10,.0f}{shown(row.ratio):>7}"
            f"{shown(row.details['bandwidth'], '.0%'):>9}{row.error:>9.2g}  {row.check}"
        )
