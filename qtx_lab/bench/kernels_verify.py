"""Verification of drafted tokens by `kernels.exact_decode` beside SDPA: a step of `qtx_lab.bench.device`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from ..kernels.choice import choose
from ..kernels.exact_decode import reference
from ..kernels.exact_decode.reference import CachedInputs
from ..kernels.inputs import Inputs
from .base import BenchRow
from .kernels import (
    ALLOWED,
    GROUP,
    Call,
    Case,
    DecodeMethod,
    describe,
    only,
    print_rows,
    relative_error,
    rows_of,
    time_methods,
)

TOKENS = 8
"""Tokens that one pass verifies: seven drafts and the one before them."""

LEAST_ERROR = 1e-6
"""An error below this is that of float32, whatever the reference's is."""


def verified_inputs(inputs: Sequence[Inputs], tokens: int) -> list[CachedInputs]:
    """The same keys and values with queries of the last tokens, near those of `inputs`."""
    out = []
    for seed, x in enumerate(inputs):
        noise = torch.Generator(x.q.device).manual_seed(seed)
        q = x.q.repeat_interleave(tokens, 1).float()
        near = torch.randn(q.shape, generator=noise, device=q.device) * q.std()
        out.append(CachedInputs((q + 0.3 * near).to(x.q.dtype), x.k, x.v, tokens, x.scale))
    return out


def verify_methods(inputs: Sequence[Inputs]) -> Iterator[DecodeMethod]:
    """The kernel, or its reference on the CPU, with the last `TOKENS` queries and with one, beside SDPA."""
    several = verified_inputs(inputs, TOKENS)
    exact = exact_float32(several[0])
    backends: dict[str, SDPBackend | None] = {"on the CPU": None}
    if inputs[0].q.is_cuda:
        backends = {
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
        }
    num_bytes = inputs[0].k.nbytes + inputs[0].v.nbytes + 2 * several[0].q.nbytes
    for name, backend in backends.items():
        try:
            calls = [by_sdpa_with_bias(x, backend) for x in several]
            error = relative_error(calls[0](), exact)
        except Exception as problem:  # any error of a library that is only compared with
            print(f"  SDPA {name} cannot verify: {str(problem).strip().splitlines()[0]}")
            continue
        yield DecodeMethod(f"SDPA {name}, a bias", calls, num_bytes, error, 1e-2, baseline=True)
    run: Callable[[CachedInputs], reference.ExactResult] = reference.exact_decode
    if choose((inputs[0].q, inputs[0].k, inputs[0].v)).path == "triton":
        from ..kernels.exact_decode.launch import exact_decode as run
    for x in (several, verified_inputs(inputs, 1)):
        exact = exact_float32(x[0])
        reference_error = relative_error(reference.exact_decode(x[0]).output, exact)
        yield DecodeMethod(
            f"exact, {x[0].length} {'tokens' if x[0].length > 1 else 'token'}",
            [partial(_output, run, y) for y in x],
            num_bytes,
            relative_error(run(x[0]).output, exact),
            ALLOWED * max(LEAST_ERROR, reference_error),
        )


def _output(run: Callable[[CachedInputs], reference.ExactResult], x: CachedInputs) -> Tensor:
    return run(x).output


def measure_verifying(
    case: Case, inputs: Sequence[Inputs], device: torch.device, turns: int, copy_bandwidth: float
) -> list[BenchRow]:
    """Check the error of each method, time all in turns, and print and return their rows.

    `ratio` is over the fastest of SDPA with a bias. The row of one token has it too: what it takes less than
    that of several is what the other tokens cost.
    """
    methods = list(verify_methods(inputs))
    timings = time_methods(methods, device, turns)
    description = describe(device, copy_bandwidth)
    rows = [
        replace(row, case=f"{case}, the last {TOKENS} tokens")
        for row in rows_of(case, methods, timings, device, copy_bandwidth, description)
    ]
    print_rows(case, rows)
    return rows


def exact_float32(x: CachedInputs) -> Tensor:
    """Exact attention in float32, one sequence at a time: (N, M, Ev)."""
    heads = x.k.shape[1]
    parts = [
        reference.exact_decode(
            replace(x, q=x.q[b * heads : (b + 1) * heads].float(), k=x.k[b : b + 1], v=x.v[b : b + 1])
        ).output
        for b in range(len(x.k))
    ]
    return torch.cat(parts)


def by_sdpa_with_bias(x: CachedInputs, backend: SDPBackend | None) -> Call:
    """SDPA with the rows of a key head as its queries, and a bias that hides later tokens."""
    q = x.q.view(*x.k.shape[:2], GROUP * x.length, -1)
    bias = torch.zeros(x.q.shape[1], x.num_keys, dtype=x.q.dtype, device=x.q.device)
    bias.masked_fill_(~x.visible()[0], -torch.inf)

    def call() -> Tensor:
        with only(backend):
            return F.scaled_dot_product_attention(q, x.k, x.v, bias, scale=x.scale)

    return call
