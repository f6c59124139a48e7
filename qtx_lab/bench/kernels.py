"""`qtx-lab bench kernels`: decoding by the kernels against the fastest exact decoding that is installed, on one GPU.

`qtx-lab bench kernels --json notebooks/results/gpu_kernels.json` writes the table that notebook 05 shows. Without a GPU
only `--quick` runs: a small case of the plain-torch references on the CPU, which says nothing about a GPU's speed.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module, metadata, util
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import BackendUnavailable
from ..kernels.choice import choose
from ..kernels.decode import reference as decode_reference
from ..kernels.inputs import Inputs
from ..kernels.sketch_decode import reference as sketch_decode_reference
from ..kernels.sketch_decode.reference import Sketch, int4_sketch, low_rank_sketch

KV_HEADS, GROUP, FEATURES, DRAWS = 8, 4, 128, 2048
SEEDS = 4
"""Repetitions over which errors are averaged."""
WORSE = 1.1
"""A kernel's error may be that many times its plain-torch reference's."""
TARGETS = {"exact K": 1.75, "int4": 5.0, "rank 16": 8.0}
"""Times the fastest exact decoding, at 128k keys and batch 8 on an H200."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A decode step: one query of each head, all keys seen."""

    batch: int
    keys: int
    draws: int = DRAWS
    kv_heads: int = KV_HEADS

    def __str__(self) -> str:
        return f"B={self.batch} n={self.keys:,} Hkv={self.kv_heads} H={self.kv_heads * GROUP} d={FEATURES} S={self.draws}"


@dataclass(frozen=True)
class Method:
    """One competitor: a call for each set of inputs."""

    name: str
    calls: list[Call]
    num_bytes: int
    """The least that a call has to read and write."""
    error: float
    allowed: float
    baseline: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds a call: median, lowest and highest of the turns."""

    seconds: float
    low: float
    high: float


def bench_kernels(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Decoding with exact keys, int4 and rank-16 sketches; rows as in `run_bench`, `baseline` the fastest exact method.

    Further fields: `bytes` is the byte bound of a call (keys or sketch once, drawn rows once for all heads of a group),
    `terabytes_per_second` what that comes to, `bandwidth` the same as a fraction of what this device copies, which is
    also the fraction of the byte bound's speed that is reached; `reference_error`, of plain torch at the same seeds;
    `error_over_exact_k`, what a sketch costs; `sets` of inputs that take turns and
    whether together they are `past_cache`; `device`.

    Raises
    ------
    BackendUnavailable
        Without a CUDA device, unless `quick`.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda")
        cases = [Case(8, 1 << 15)] if quick else [Case(b, n << 10) for b in (1, 8) for n in (8, 32, 128, 256)]
        return compare(cases, device, 5 if quick else 15, copy_bandwidth(device))
    if not quick:
        raise BackendUnavailable(
            "bench kernels needs a CUDA device, and torch sees none here. --quick compares the plain-torch references on "
            "the CPU, which says nothing about a GPU."
        )
    print("No CUDA device: the plain-torch references on the CPU. Their times say nothing about a GPU.")
    return compare([Case(1, 1 << 13, 256, 2)], torch.device("cpu"), 3, copy)


def compare(cases: list[Case], device: torch.device, turns: int, copy: float) -> list[dict[str, Any]]:
    """One row for each method of each case; those that cannot run are named with the reason."""
    rows: list[dict[str, Any]] = []
    about = describe(device, copy)
    print(about)
    for case in cases:
        try:
            rows += measure(case, device, turns, copy, about)
        except torch.OutOfMemoryError as error:
            print(f"\n{case}\n  left out, out of memory: {str(error).splitlines()[0]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure(case: Case, device: torch.device, turns: int, copy: float, about: str) -> list[dict[str, Any]]:
    """Check each method's error, time all that run in turns, print and return their rows."""
    cache = cache_bytes(device)
    sets = number_of_sets(case, device, cache)
    inputs = [make_inputs(case, device, seed) for seed in range(sets)]
    exact = exact_output(inputs[0])
    methods = [*baselines(case, inputs, exact), *ours(case, inputs, exact)]
    least = min(method.num_bytes for method in methods)
    times = time_in_turns(methods, device, turns)
    first = min(
        (m for m in methods if m.baseline and m.error <= m.allowed), key=lambda m: times[m.name].seconds
    )
    plain = next(m.error for m in methods if m.name == "exact K")
    rows = []
    for m in methods:
        t, passed = times[m.name], m.error <= m.allowed  # False for NaN
        rate = m.num_bytes / t.seconds
        rows.append(
            {
                "case": str(case),
                "method": m.name,
                "seconds": t.seconds,
                "low": t.low,
                "high": t.high,
                "baseline": first.name,
                "ratio": times[first.name].seconds / t.seconds if passed else None,
                "error": m.error,
                "reference_error": None if m.baseline else m.allowed / WORSE,
                "error_over_exact_k": None if m.baseline else m.error / plain,
                "check": "pass" if passed else f"error {m.error:.3g} is above {m.allowed:.3g}",
                "bytes": m.num_bytes,
                "terabytes_per_second": rate / 1e12,
                "bandwidth": rate / copy,
                "peak_bytes": None,
                "sets": sets,
                "past_cache": sets * least > 2 * cache,
                "device": about,
            }
        )
    print_rows(case, rows)
    return rows


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random queries, keys of a falling spectrum in a basis of their own, logits of standard deviation 3; bfloat16."""
    g = torch.Generator(device).manual_seed(seed)
    new = partial(torch.randn, generator=g, device=device)
    spectrum = (1 + torch.arange(FEATURES, device=device)) ** -1.0
    basis = torch.linalg.qr(new(case.kv_heads, FEATURES, FEATURES)).Q * spectrum[:, None]
    dtype = torch.bfloat16
    k = torch.empty(case.batch, case.kv_heads, case.keys, FEATURES, dtype=dtype, device=device)
    v = torch.empty_like(k)
    for b in range(case.batch):  # float32 of one sequence at a time
        k[b] = new(case.kv_heads, case.keys, FEATURES) @ basis
        v[b] = 1 + new(case.kv_heads, case.keys, FEATURES)  # a mean, so that relative errors mean something
    q = new(case.batch, case.kv_heads * GROUP, 1, FEATURES)
    logits = q.view(case.batch, case.kv_heads, GROUP, FEATURES) @ k[:, :, :4096].float().mT
    q = q * (3 * math.sqrt(FEATURES) / logits.std(-1).view(*q.shape[:2], 1, 1))
    return Inputs.of(q.to(dtype), k, v)


def exact_output(x: Inputs) -> Tensor:
    """In float32, a sequence at a time, (N, M, Ev)."""
    q = x.q.view(*x.k.shape[:2], -1, x.q.shape[-1])
    return torch.cat(
        [(q[b].float() @ x.k[b].float().mT * x.scale).softmax(-1) @ x.v[b].float() for b in range(len(x.k))]
    )


def relative(output: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact output."""
    return ((output.float().view_as(exact) - exact).norm() / exact.norm()).item()


def baselines(case: Case, inputs: list[Inputs], exact: Tensor) -> Iterator[Method]:
    """Exact decoding by everything that is installed; heads of a group are queries of one key head where that is faster."""
    x = inputs[0]
    moved = x.k.nbytes + x.v.nbytes + 2 * x.q.nbytes
    for name, make in exact_calls(x.k.device.type):
        try:
            calls = [make(x) for x in inputs]
            off = relative(calls[0](), exact)
        except Exception as error:  # whatever a library of others says
            reason = str(error).strip() or type(error).__name__
            print(f"  {name} cannot run: {reason.splitlines()[0]}")
            continue
        yield Method(name, calls, moved, off, 1e-2, baseline=True)


def exact_calls(device: str) -> Iterator[tuple[str, Callable[[Inputs], Call]]]:
    """Names, and what makes a call of inputs."""
    if device == "cpu":
        yield "SDPA", partial(by_sdpa, None, True)
        return
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in backends.items():
        yield f"SDPA {name}", partial(by_sdpa, backend, False)
        yield f"SDPA {name}, grouped", partial(by_sdpa, backend, True)
    yield "FlexAttention", by_flex
    if util.find_spec("flashinfer"):
        yield f"FlashInfer {metadata.version('flashinfer-python')}", by_flashinfer
    if util.find_spec("flash_attn"):
        yield f"FlashAttention {metadata.version('flash_attn')}", by_flash_attention


@contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    """Let SDPA use only this back end; any where it is None."""
    if backend is None:
        yield
        return
    with sdpa_kernel(backend):
        yield


def by_sdpa(backend: SDPBackend | None, grouped: bool, x: Inputs) -> Call:
    """SDPA; `grouped` has a group's heads as queries of one key head."""
    lead = x.k.shape[:2]
    q = x.q.view(*lead, GROUP, -1) if grouped else x.q.view(lead[0], lead[1] * GROUP, 1, -1)

    def call() -> Tensor:
        with only(backend):
            return F.scaled_dot_product_attention(q, x.k, x.v, scale=x.scale, enable_gqa=not grouped)

    return call


def by_flex(x: Inputs) -> Call:
    """FlexAttention, compiled."""
    q = x.q.view(x.k.shape[0], -1, 1, x.q.shape[-1])
    return lambda: compiled_flex()(q, x.k, x.v, scale=x.scale, enable_gqa=True)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """Compiled once, for all lengths."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def by_flashinfer(x: Inputs) -> Call:
    """FlashInfer's decoding of a paged cache, with pages of 64 tokens."""
    flashinfer = import_module("flashinfer")
    batch, heads, n, width = x.k.shape
    # Pages of 64 tokens, laid out (pages, heads, tokens, features) as "HND" wants; a copy, made before.
    pages = n // 64
    k, v = (
        y.view(batch, heads, pages, 64, width).transpose(1, 2).reshape(batch * pages, heads, 64, width)
        for y in (x.k, x.v)
    )
    device = x.k.device
    space = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(batch * pages, dtype=torch.int32, device=device),
        torch.full((batch,), 64, dtype=torch.int32, device=device),
        heads * GROUP,
        heads,
        width,
        64,
        q_data_type=x.q.dtype,
        kv_data_type=x.k.dtype,
        sm_scale=x.scale,
    )
    q = x.q.view(batch, heads * GROUP, width)
    return lambda: wrapper.run(q, (k, v))


def by_flash_attention(x: Inputs) -> Call:
    """FlashAttention's decoding with a KV cache."""
    attend = import_module("flash_attn").flash_attn_with_kvcache
    q = x.q.view(x.k.shape[0], 1, -1, x.q.shape[-1])
    k, v = (y.transpose(1, 2).contiguous() for y in (x.k, x.v))
    return lambda: attend(q, k, v, softmax_scale=x.scale)


def ours(case: Case, inputs: list[Inputs], exact: Tensor) -> Iterator[Method]:
    """The kernels (their references on the CPU), each allowed `WORSE` times its reference's error at the same seeds."""
    x = inputs[0]
    device = x.k.device
    triton = choose((x.q, x.k, x.v)).path == "triton"
    plain: Callable[..., Any] = decode_reference.decode
    by_sketch: Callable[..., Any] = sketch_decode_reference.sketch_decode
    if triton:
        from ..kernels.decode.launch import decode as plain
        from ..kernels.sketch_decode.launch import sketch_decode as by_sketch
    seeds = [torch.tensor(seed, device=device) for seed in range(SEEDS)]
    row = (x.k.shape[-1] + x.v.shape[-1]) * x.k.element_size()

    def of(found: Any) -> Tensor:
        return found.output() if callable(found.output) else found.output

    def method(
        name: str,
        run: Callable[..., Any],
        reference: Callable[..., Any],
        calls: list[Call],
        scan: int,
        each: int,
    ) -> Method:
        found = [run(seed=seed) for seed in seeds]
        error = math.sqrt(sum(relative(of(f), exact) ** 2 for f in found) / SEEDS)
        wanted = math.sqrt(sum(relative(of(reference(seed=seed)), exact) ** 2 for seed in seeds) / SEEDS)
        drawn = found[0].indices.flatten(1).sort(-1).values
        distinct = int((drawn[:, 1:] != drawn[:, :-1]).sum()) + len(drawn)
        return Method(name, calls, scan + distinct * each + 2 * x.q.nbytes, error, WORSE * wanted)

    def output(run: Callable[..., Any], *args: Any) -> Call:
        return lambda: of(run(*args, case.draws, 1, seeds[0]))

    options: dict[str, Any] = {"num_samples": case.draws, "replicates": 1}
    yield method(
        "exact K",
        partial(plain, x, **options),
        partial(decode_reference.decode, x, **options),
        [output(plain, y) for y in inputs],
        x.k.nbytes,
        x.v.shape[-1] * x.v.element_size(),
    )
    for name, make in SKETCHERS.items():
        try:
            first = make(x.k)
            sketches = [first, *(replace(first, table=first.lines(y.k.flatten(0, 1))) for y in inputs[1:])]
        except RuntimeError as error:
            print(f"  {name} left out: {str(error).splitlines()[0]}")
            continue
        yield method(
            name,
            partial(by_sketch, x, sketches[0], **options),
            partial(sketch_decode_reference.sketch_decode, x, sketches[0], **options),
            [output(by_sketch, y, s) for y, s in zip(inputs, sketches, strict=True)],
            sketches[0].nbytes(),
            row,
        )


SKETCHERS: dict[str, Callable[[Tensor], Sketch]] = {
    "int4": int4_sketch,
    "rank 16": partial(low_rank_sketch, rank=16),
    "int4, rank 64": partial(int4_sketch, rank=64),
}
"""What sketches are compared: all components by 4 bits, 16 of them by a byte, 64 by 4 bits."""


# --- Timing -----------------------------------------------------------------------------------


def time_in_turns(methods: list[Method], device: torch.device, turns: int) -> dict[str, Times]:
    """Seconds a call of each method, which take turns; a call goes round the sets of inputs."""
    rounds = {m.name: round_of(m, device) for m in methods}
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    for _ in range(turns):
        for m in methods:
            seconds[m.name].append(timed(rounds[m.name], device) / len(m.calls))
    return {name: Times(median(found), min(found), max(found)) for name, found in seconds.items()}


def round_of(method: Method, device: torch.device) -> Callable[[], object]:
    """One call for each set of inputs: a CUDA graph where one can be captured, so that launches cost little."""

    def all_calls() -> None:
        for call in method.calls:
            call()

    if device.type != "cuda":
        all_calls()
        return all_calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, tunes
            all_calls()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_calls()
    except RuntimeError as error:
        print(f"  {method.name} is timed without a CUDA graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return all_calls
    graph.replay()
    return graph.replay


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 4 GiB within the device reads and writes, median of nine."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = [timed(lambda: target.copy_(source), device) for _ in range(10)][1:]
    return 2 * source.nbytes / median(found)


def cache_bytes(device: torch.device) -> int:
    """Of the device's last cache; of a processor's what is common."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


def number_of_sets(case: Case, device: torch.device, cache: int) -> int:
    """So many sets of inputs that the smallest sketch is read from memory; as many as a third of the memory holds."""
    if device.type != "cuda":
        return 2
    size = 4 * case.batch * case.kv_heads * case.keys * FEATURES
    smallest = case.batch * case.kv_heads * (16 * case.keys + 4 * FEATURES * case.draws)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(-(-2 * cache // smallest) + 1, 32, free // (3 * size)))


def describe(device: torch.device, copy: float) -> str:
    """The machine in words."""
    if device.type != "cuda":
        return (
            f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, copies {copy / 1e9:.1f} GB/s"
        )
    p = torch.cuda.get_device_properties(device)
    return (
        f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, "
        f"triton {metadata.version('triton')}, CUDA {torch.version.cuda}, copies {copy / 1e12:.2f} TB/s"
    )


def print_rows(case: Case, rows: list[dict[str, Any]]) -> None:
    """The table of a case, and how its targets fare."""
    print(
        f"\n{case}, inputs in turn: {rows[0]['sets']}{'' if rows[0]['past_cache'] else ' (may stay in the cache)'}"
    )
    baseline = rows[0]["baseline"]
    print(
        f"  {'method':<24}{'µs':>10}{'(low–high)':>20}{'× ' + baseline:>24}{'TB/s':>7}{'of copy':>9}{'error':>9}  check"
    )
    for row in rows:
        spread = f"({1e6 * row['low']:.1f}–{1e6 * row['high']:.1f})"
        over = "–" if row["error_over_exact_k"] is None else f"{row['error_over_exact_k']:.2f}"
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(
            f"  {row['method']:<24}{1e6 * row['seconds']:>10.1f}{spread:>20}{ratio:>24}{row['terabytes_per_second']:>7.2f}"
            f"{row['bandwidth']:>9.1%}{row['error']:>9.3g}{over:>11}  {row['check']}"
        )
    print(
        "  TB/s: of the byte bound; of copy: that over what the device copies, which is also the share of the byte bound's speed;\n"
        f"  a check allows {WORSE} times the error of the plain-torch reference at the same seeds."
    )
    if (case.batch, case.keys) == (8, 1 << 17):
        for row in rows:
            target = TARGETS.get(row["method"])
            if target is not None and row["ratio"] is not None:
                met = "met" if row["ratio"] >= target else "missed"
                print(f"  target {row['method']} ≥ {target}×: {met}, {row['ratio']:.2f}×")
