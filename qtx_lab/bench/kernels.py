"""`qtx-lab bench kernels`: decoding by the kernels beside the fastest exact decoding that is installed, on
one GPU.

`qtx-lab bench kernels --json notebooks/results/gpu_kernels.json` writes the table that notebook 05 shows.
Without a GPU only `--quick` runs: it measures a small case of the plain-torch references on the CPU, whose
times say nothing about those on a GPU.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata, util
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache.sketches import Int4Sketch, LowRankSketch
from ..errors import BackendUnavailable
from ..kernels.choice import choose
from ..kernels.decode import reference as decode_reference
from ..kernels.inputs import Inputs
from ..kernels.sketch_decode import reference as sketch_decode_reference
from ..kernels.sketch_decode.reference import SketchTable
from ..streams import Stream
from .base import BenchRow, Timing, shown, span

KV_HEADS, GROUP, FEATURES, DRAWS = 8, 4, 128, 2048
SEEDS = 4
"""Repetitions over which errors are averaged."""
ALLOWED = 1.1
"""A kernel may have this many times the error of its plain-torch reference."""
TARGETS = {"exact K": 1.7, "int4": 4.3, "rank 16": 6.0}
"""Speed-ups over the fastest exact decoding that are aimed at, at 128k keys and batch 8 on an H200."""

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A decode step: one query of each head, which sees all keys."""

    batch: int
    keys: int
    draws: int = DRAWS
    kv_heads: int = KV_HEADS

    def __str__(self) -> str:
        heads = f"Hkv={self.kv_heads} H={self.kv_heads * GROUP}"
        return f"B={self.batch} n={self.keys:,} {heads} d={FEATURES} S={self.draws}"


@dataclass(frozen=True)
class DecodeMethod:
    """One competitor, with a call for each set of inputs."""

    name: str
    calls: list[Call]
    num_bytes: int
    """The least number of bytes that a call has to read and write."""
    error: float
    """Relative error of the output."""
    allowed_error: float
    baseline: bool = False
    """Whether it is exact, and may be the baseline."""


def bench_kernels(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Decoding with exact keys, with int4 sketches and with rank-16 sketches.

    The baseline is the fastest exact method. Further details of the rows:

    - `bytes`: the byte bound of a call, for which keys or sketch are read once, and drawn rows once for all
      heads of a group; `terabytes_per_second`: that bound over the time; `bandwidth`: the same as a fraction
      of what this device copies, which is also the fraction of the byte bound's speed that is reached;
      `peak_bytes`: not measured;
    - `reference_error`: of plain torch at the same seeds; `error_over_exact_k`: what a sketch costs;
    - `sets`: of inputs that take turns, and `past_cache`: whether together they exceed the device's last
      cache;
    - `device`.

    Raises
    ------
    BackendUnavailable
        Without a CUDA device, unless `quick`.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda")
        cases = [Case(8, 1 << 15)] if quick else [Case(b, n << 10) for b in (1, 8) for n in (8, 32, 128, 256)]
        return compare_decoding(cases, device, 5 if quick else 15, device_copy_bandwidth(device))
    if not quick:
        raise BackendUnavailable(
            "bench kernels needs a CUDA device, and torch sees none here. --quick compares the plain-torch "
            "references on the CPU, whose times say nothing about those on a GPU."
        )
    print("No CUDA device: the plain-torch references on the CPU. Their times say nothing about a GPU.")
    return compare_decoding([Case(1, 1 << 13, 256, 2)], torch.device("cpu"), 3, copy_bandwidth)


def compare_decoding(
    cases: Sequence[Case], device: torch.device, turns: int, copy_bandwidth: float
) -> list[BenchRow]:
    """One row for each method of each case; a method or case that cannot run is named with the reason."""
    rows: list[BenchRow] = []
    description = describe(device, copy_bandwidth)
    print(description)
    for case in cases:
        try:
            rows += measure(case, device, turns, copy_bandwidth, description)
        except torch.OutOfMemoryError as error:
            print(f"\n{case}\n  left out, out of memory: {str(error).splitlines()[0]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure(
    case: Case, device: torch.device, turns: int, copy_bandwidth: float, description: str
) -> list[BenchRow]:
    """Check the error of each method, time all that can run in turns, and print and return their rows."""
    inputs = sets_of_inputs(case, device)
    methods = competitors(case, inputs)
    timings = time_methods(methods, device, turns)
    rows = rows_of(case, methods, timings, device, copy_bandwidth, description)
    print_rows(case, rows)
    return rows


def sets_of_inputs(case: Case, device: torch.device) -> list[Inputs]:
    """Inputs that take turns, so that what is read comes from memory."""
    sets = number_of_sets(case, device, cache_bytes(device))
    return [make_inputs(case, device, seed) for seed in range(sets)]


def competitors(case: Case, inputs: list[Inputs], leave_out: Collection[str] = ()) -> list[DecodeMethod]:
    """All methods that can run, with their errors, but for the exact ones whose names are left out."""
    exact = exact_output(inputs[0])
    return [*baselines(case, inputs, exact, leave_out), *kernel_methods(case, inputs, exact)]


def rows_of(
    case: Case,
    methods: Sequence[DecodeMethod],
    timings: Mapping[str, Timing],
    device: torch.device,
    copy_bandwidth: float,
    description: str,
) -> list[BenchRow]:
    """The rows of methods that were timed; those of exact decoding have no reference and no exact K."""
    fastest = min(
        (m for m in methods if m.baseline and m.error <= m.allowed_error),
        key=lambda m: timings[m.name].median,
    )
    cache, sets = cache_bytes(device), len(methods[0].calls)
    least_bytes = min(method.num_bytes for method in methods)
    exact_k_error = next((m.error for m in methods if m.name == "exact K"), None)
    rows = []
    for m in methods:
        timing = timings[m.name]
        passed = m.error <= m.allowed_error  # False for NaN
        bytes_per_second = m.num_bytes / timing.median
        details = {
            "reference_error": None if m.baseline else m.allowed_error / ALLOWED,
            "error_over_exact_k": None if m.baseline or exact_k_error is None else m.error / exact_k_error,
            "bytes": m.num_bytes,
            "terabytes_per_second": bytes_per_second / 1e12,
            "bandwidth": bytes_per_second / copy_bandwidth,
            "peak_bytes": None,
            "sets": sets,
            "past_cache": sets * least_bytes > 2 * cache,
            "device": description,
        }
        rows.append(
            BenchRow(
                case=str(case),
                method=m.name,
                seconds=timing.median,
                baseline=fastest.name,
                ratio=timings[fastest.name].median / timing.median if passed else None,
                error=m.error,
                check="pass" if passed else f"error {m.error:.3g} is above {m.allowed_error:.3g}",
                low=timing.low,
                high=timing.high,
                details=details,
            )
        )
    return rows


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random queries, keys of a falling spectrum, and logits of standard deviation 3; bfloat16."""
    g = torch.Generator(device).manual_seed(seed)
    new = partial(torch.randn, generator=g, device=device)
    spectrum = (1 + torch.arange(FEATURES, device=device)) ** -1.0
    basis = torch.linalg.qr(new(case.kv_heads, FEATURES, FEATURES)).Q * spectrum[:, None]
    dtype = torch.bfloat16
    k = torch.empty(case.batch, case.kv_heads, case.keys, FEATURES, dtype=dtype, device=device)
    v = torch.empty_like(k)
    for b in range(case.batch):  # float32 of one sequence at a time
        k[b] = new(case.kv_heads, case.keys, FEATURES) @ basis
        # The mean of 1 makes the exact output large enough for relative errors to mean something.
        v[b] = 1 + new(case.kv_heads, case.keys, FEATURES)
    q = new(case.batch, case.kv_heads * GROUP, 1, FEATURES)
    logits = q.view(case.batch, case.kv_heads, GROUP, FEATURES) @ k[:, :, :4096].float().mT
    q = q * (3 * math.sqrt(FEATURES) / logits.std(-1).view(*q.shape[:2], 1, 1))
    return Inputs.of(q.to(dtype), k, v)


def exact_output(x: Inputs) -> Tensor:
    """Exact attention in float32, one sequence at a time; (N, M, Ev)."""
    q = x.q.view(*x.k.shape[:2], -1, x.q.shape[-1])
    return torch.cat(
        [(q[b].float() @ x.k[b].float().mT * x.scale).softmax(-1) @ x.v[b].float() for b in range(len(x.k))]
    )


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the exact output."""
    return ((output.float().view_as(exact) - exact).norm() / exact.norm()).item()


def baselines(
    case: Case, inputs: list[Inputs], exact: Tensor, leave_out: Collection[str] = ()
) -> Iterator[DecodeMethod]:
    """Exact decoding by everything that is installed, but for the names that are left out.

    Where that is faster, the heads of a group are queries of one key head.
    """
    x = inputs[0]
    num_bytes = x.k.nbytes + x.v.nbytes + 2 * x.q.nbytes
    for name, make_call in exact_calls(x.k.device.type):
        if name in leave_out:
            continue
        try:
            calls = [make_call(x) for x in inputs]
            error = relative_error(calls[0](), exact)
        except Exception as problem:  # any error of a library that is only compared with
            reason = str(problem).strip() or type(problem).__name__
            print(f"  {name} cannot run: {reason.splitlines()[0]}")
            continue
        yield DecodeMethod(name, calls, num_bytes, error, 1e-2, baseline=True)


def exact_calls(device: str) -> Iterator[tuple[str, Callable[[Inputs], Call]]]:
    """Names of exact methods, each with a function that makes a call for given inputs."""
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
    """SDPA; with `grouped` the heads of a group are queries of one key head."""
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
    # Copied in advance into pages of 64 tokens, laid out (pages, heads, tokens, features) as "HND" asks.
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


def kernel_methods(case: Case, inputs: list[Inputs], exact: Tensor) -> Iterator[DecodeMethod]:
    """The kernels, or their references on the CPU.

    Each may have `ALLOWED` times the error of its reference at the same seeds.
    """
    x = inputs[0]
    decode: Callable[..., Any] = decode_reference.decode
    sketch_decode: Callable[..., Any] = sketch_decode_reference.sketch_decode
    if choose((x.q, x.k, x.v)).path == "triton":
        from ..kernels.decode.launch import decode
        from ..kernels.sketch_decode.launch import sketch_decode
    check = partial(checked_method, case, exact)
    value_bytes = x.v.shape[-1] * x.v.element_size()
    row_bytes = (x.k.shape[-1] + x.v.shape[-1]) * x.k.element_size()
    yield check("exact K", decode, decode_reference.decode, [(y,) for y in inputs], x.k.nbytes, value_bytes)
    for name, make_sketch in SKETCHERS.items():
        try:
            sketches = [make_sketch(y.k) for y in inputs]
        except RuntimeError as error:
            print(f"  {name} left out: {str(error).splitlines()[0]}")
            continue
        arguments = list(zip(inputs, sketches, strict=True))
        reference = sketch_decode_reference.sketch_decode
        scanned_bytes = sketches[0].nbytes + len(x.q) * sketches[0].num_exact * x.k[0, 0, 0].nbytes
        yield check(name, sketch_decode, reference, arguments, scanned_bytes, row_bytes, group=GROUP)


def checked_method(
    case: Case,
    exact: Tensor,
    name: str,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    scanned_bytes: int,
    bytes_per_draw: int,
    group: int = 1,
) -> DecodeMethod:
    """A kernel as a competitor, with its error and its reference's over `SEEDS` seeds.

    `arguments` are the tensors of each set of inputs; `scanned_bytes` are read whatever is drawn, and
    `bytes_per_draw` for each distinct key that is drawn. The query heads of a `group` share their draws, as
    many as they would take alone.
    """
    q, (batch, groups, *_) = arguments[0][0].q, arguments[0][0].k.shape
    streams = [Stream.of(torch.tensor(seed, device=q.device), batch, groups, 1) for seed in range(SEEDS)]

    def run(function: Callable[..., Any], inputs: tuple[Any, ...], stream: Stream) -> Any:
        return function(*inputs, num_samples=group * case.draws, replicates=1, stream=stream)

    def mean_error(results: Sequence[Any]) -> float:
        squares = [relative_error(x.output, exact) ** 2 for x in results]
        return math.sqrt(sum(squares) / len(squares))

    results = [run(kernel, arguments[0], stream) for stream in streams]
    reference_error = mean_error([run(reference, arguments[0], stream) for stream in streams])
    drawn = results[0].indices.flatten(1).sort(-1).values
    num_distinct = int((drawn[:, 1:] != drawn[:, :-1]).sum()) + len(drawn)
    num_bytes = scanned_bytes + num_distinct * bytes_per_draw + 2 * q.nbytes
    calls: list[Call] = [partial(_output, run, kernel, inputs, streams[0]) for inputs in arguments]
    return DecodeMethod(name, calls, num_bytes, mean_error(results), ALLOWED * reference_error)


def _output(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments).output


SKETCHERS: dict[str, Callable[[Tensor], SketchTable]] = {
    "int4": Int4Sketch.table_of,
    "rank 16": partial(LowRankSketch.table_of, rank=16),
    "int4, rank 64": partial(Int4Sketch.table_of, rank=64),
}
"""The sketches: all components by 4 bits each, 16 of them by a byte each, 64 of them by 4 bits each."""


# --- Timing -----------------------------------------------------------------------------------


def time_methods(methods: Sequence[DecodeMethod], device: torch.device, turns: int) -> dict[str, Timing]:
    """Seconds a call of each method; the methods take turns, and each turn uses all sets of inputs once."""
    rounds = {m.name: round_of(m, device) for m in methods}
    seconds: dict[str, list[float]] = {m.name: [] for m in methods}
    for _ in range(turns):
        for m in methods:
            seconds[m.name].append(timed(rounds[m.name], device) / len(m.calls))
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def round_of(method: DecodeMethod, device: torch.device) -> Callable[[], object]:
    """One call for each set of inputs, as a CUDA graph if possible, so that launches cost little."""

    def all_calls() -> None:
        for call in method.calls:
            call()

    if device.type != "cuda":
        all_calls()
        return all_calls
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tunes the kernels
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
    """Seconds that a function takes on the device."""
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


def device_copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of 4 GiB within the device reads and writes, median of nine."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device) for _ in range(10)][1:]
    return 2 * source.nbytes / median(seconds)


def cache_bytes(device: torch.device) -> int:
    """Size of a GPU's last cache; for a processor, a common size."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


def number_of_sets(case: Case, device: torch.device, cache: int) -> int:
    """Sets of inputs with which the smallest sketch comes from memory, as far as memory has room."""
    if device.type != "cuda":
        return 2
    set_bytes = 4 * case.batch * case.kv_heads * case.keys * FEATURES
    smallest_bytes = case.batch * case.kv_heads * (16 * case.keys + 4 * FEATURES * case.draws)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(1, min(-(-2 * cache // smallest_bytes) + 1, 32, free_bytes // (3 * set_bytes)))


def describe(device: torch.device, copy_bandwidth: float) -> str:
    """The machine and its versions, in words."""
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"CPU, {threads} threads, torch {torch.__version__}, copies {copy_bandwidth / 1e9:.1f} GB/s"
    p = torch.cuda.get_device_properties(device)
    return (
        f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.0f} GiB, "
        f"torch {torch.__version__}, triton {metadata.version('triton')}, CUDA {torch.version.cuda}, "
        f"copies {copy_bandwidth / 1e12:.2f} TB/s"
    )


def print_rows(case: Case, rows: Sequence[BenchRow]) -> None:
    """Print the table of a case, and whether its targets were met."""
    sets, past_cache = rows[0].details["sets"], rows[0].details["past_cache"]
    print(f"\n{case}, sets of inputs in turn: {sets}{'' if past_cache else ' (may stay in the cache)'}")
    print(
        f"  {'method':<24}{'µs':>10}{'(low–high)':>20}{'× ' + rows[0].baseline:>24}{'TB/s':>7}{'of copy':>9}"
        f"{'error':>9}{'× exact K':>11}  check"
    )
    for row in rows:
        details = row.details
        print(
            f"  {row.method:<24}{1e6 * row.seconds:>10.1f}{span(row, 1e6):>20}{shown(row.ratio):>24}"
            f"{details['terabytes_per_second']:>7.2f}{details['bandwidth']:>9.1%}{row.error:>9.3g}"
            f"{shown(details['error_over_exact_k']):>11}  {row.check}"
        )
    print(
        "  TB/s: the byte bound over the time; of copy: that as a fraction of what the device copies, which\n"
        "  is also the fraction of the byte bound's speed that is reached; × exact K: the error over that\n"
        f"  of exact K; a check allows {ALLOWED} times the error of plain torch at the same seeds."
    )
    if (case.batch, case.keys) == (8, 1 << 17):
        for row in rows:
            target = TARGETS.get(row.method)
            if target is not None and row.ratio is not None:
                met = "met" if row.ratio >= target else "missed"
                print(f"  target {row.method} ≥ {target}×: {met}, {row.ratio:.2f}×")
