"""`qtx-lab bench model`: what sampled attention costs the reference language model, on unseen text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..cache.sketches import PROPOSALS
from ..models.generation import Decoding, decoding_policy
from ..models.reference import ReferenceModel, load_reference_model
from ..models.text import encode, reference_text
from ..theme import with_error
from .base import BenchRow

SAMPLERS = ("monte-carlo", "systematic", "head-tail")
ALLOWED = {("head-tail", 8): 0.01, ("head-tail", 4): 0.002, ("cache, low-rank", 8): 0.02}
"""The share of bits per byte that a method may lose at n / this many draws."""

Forward = Callable[[torch.Generator], Tensor]
"""Computes log-probabilities (W, m, 256) of the next bytes of W texts."""


@dataclass(frozen=True)
class ModelLoss:
    """What a pass loses against the exact model: means over all bytes, or their standard errors."""

    bits: float
    """Bits per byte of the sampled model."""
    divergence: float
    """KL(exact || sampled) of the next byte, bits."""
    agreement: float
    """Share of bytes for which both models find the same byte the likeliest."""
    seconds: float


def bench_model(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """The model over whole windows, and decoding with the cache.

    `error` is the relative difference of bits per byte from the exact model over the same bytes; `seconds` is
    of a pass, and `ratio` compares it with the exact pass. Further details of the rows:

    - `bits per byte` and `exact bits per byte`;
    - `KL`: of the exact model's next byte from the sampled one's, bits; `top-1 agreement`;
    - names that end in ` ±`: standard error of the mean over seeds of the draws, on the same text.

    Decoding attends to the first half of a window exactly and takes the second half's true bytes one by one.
    Methods that `ALLOWED` names pass if their mean loss is within it, the others if it is finite.
    """
    del copy_bandwidth
    model, text = load_reference_model(), encode(reference_text())
    sizes, count, seeds = ((128,), 2, 2) if quick else ((256, 1024), 16, 4)
    rows = []
    for n in sizes:
        windows = text[: count * n + 1].unfold(0, n + 1, n)  # [W, n + 1]
        shares: tuple[int, ...] = (8,) if quick else (16, 8, 4)
        methods = {
            (name, share): whole(model, windows, name, n // share) for share in shares for name in SAMPLERS
        }
        case = f"whole windows of {n:,} bytes, {count} of them"
        rows += table(case, windows[:, 1:], whole(model, windows), methods, seeds)
        shares = (8,) if quick else (8, 4)
        decoded = windows if quick else windows[: count // 2]
        methods = {
            (f"cache, {name}", share): decoding(model, decoded, name, n // share)
            for share in shares
            for name in PROPOSALS
        }
        case = f"decoding {n // 2:,} bytes after {n - n // 2:,}, {len(decoded)} texts"
        rows += table(case, decoded[:, n - n // 2 :], decoding(model, decoded), methods, 2)
    return rows


def whole(model: ReferenceModel, windows: Tensor, sampler: str = "exact", draws: int = 1) -> Forward:
    """Log-probabilities (W, n, 256) of the next bytes, of windows (W, n + 1)."""

    def forward(generator: torch.Generator) -> Tensor:
        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            estimate = sampled_attention(
                q,
                k,
                v,
                sampler=sampler,
                num_samples=draws,
                is_causal=True,
                enable_gqa=True,
                generator=generator,
            )
            return estimate.output

        with torch.no_grad():
            return torch.cat([model(x[None, :-1], attention=attention) for x in windows]).log_softmax(-1)

    return forward


def decoding(model: ReferenceModel, windows: Tensor, proposal: str | None = None, draws: int = 1) -> Forward:
    """Log-probabilities (W, n // 2 + 1, 256) of the next bytes of windows (W, n + 1), from the middle on."""

    def forward(generator: torch.Generator) -> Tensor:
        n = windows.shape[1] - 1
        start = n - n // 2
        seed = int(torch.randint(1 << 62, (), generator=generator))
        state = Decoding(model, windows[:, :start], decoding_policy(proposal, None, draws, seed))
        logits = [state.logits, *(state.step(windows[:, i]) for i in range(start, n))]
        return torch.stack(logits, 1).log_softmax(-1)

    return forward


def table(
    case: str, targets: Tensor, exact: Forward, methods: dict[tuple[str, int], Forward], seeds: int
) -> list[BenchRow]:
    """Measure, print and return the rows of a case; targets (W, m) are the bytes that are predicted."""
    start = time.perf_counter()
    exact_log_p = exact(torch.Generator())
    exact_seconds = time.perf_counter() - start
    exact_bits = bits_of(exact_log_p, targets)
    rows = []
    for (name, share), forward in tqdm(methods.items(), desc=case, leave=False):
        losses = [against(forward, seed, exact_log_p, targets) for seed in range(seeds)]
        mean, std_error = mean_of(losses), std_error_of(losses)
        loss = mean.bits / exact_bits - 1
        limit = ALLOWED.get((name, share), math.inf)
        passed = math.isfinite(loss) and loss <= limit
        rows.append(
            BenchRow(
                case=case,
                method=f"{name}, S = n / {share}",
                seconds=mean.seconds,
                baseline="exact",
                ratio=exact_seconds / mean.seconds if passed else None,
                error=loss,
                check="pass" if passed else f"loses {loss:.2%}, above {limit:.1%}",
                details={
                    "error ±": std_error.bits / exact_bits,
                    "bits per byte": mean.bits,
                    "exact bits per byte": exact_bits,
                    "KL": mean.divergence,
                    "KL ±": std_error.divergence,
                    "top-1 agreement": mean.agreement,
                    "top-1 agreement ±": std_error.agreement,
                },
            )
        )
    print_table(f"{case}; the exact model: {exact_bits:.4f} bits per byte, {exact_seconds:.1f} s", rows)
    return rows


def against(forward: Forward, seed: int, exact_log_p: Tensor, targets: Tensor) -> ModelLoss:
    """One pass against the exact log-probabilities."""
    start = time.perf_counter()
    log_p = forward(torch.Generator().manual_seed(seed))
    seconds = time.perf_counter() - start
    divergence = (exact_log_p.exp() * (exact_log_p - log_p)).sum(-1).double().mean() / math.log(2)
    agreement = (exact_log_p.argmax(-1) == log_p.argmax(-1)).double().mean()
    return ModelLoss(bits_of(log_p, targets), float(divergence), float(agreement), seconds)


def bits_of(log_p: Tensor, targets: Tensor) -> float:
    """Bits per byte of log-probabilities (W, m, 256) for bytes (W, m)."""
    return float(-log_p.gather(-1, targets[..., None]).double().mean() / math.log(2))


def mean_of(losses: Sequence[ModelLoss]) -> ModelLoss:
    """Means over seeds."""
    values = torch.tensor([astuple(x) for x in losses], dtype=torch.float64)
    return ModelLoss(*values.mean(0).tolist())


def std_error_of(losses: Sequence[ModelLoss]) -> ModelLoss:
    """Standard errors of the means over seeds; NaN from one seed."""
    values = torch.tensor([astuple(x) for x in losses], dtype=torch.float64)
    if len(losses) == 1:
        return ModelLoss(*(values[0] * math.nan).tolist())
    return ModelLoss(*(values.std(0) / math.sqrt(len(losses))).tolist())


def print_table(title: str, rows: Sequence[BenchRow]) -> None:
    """Print the table of a case."""
    print(f"\n{title}")
    print(f"  {'method':<26}{'bits lost':>18}{'KL, mbit':>18}{'top-1 agreement':>20}{'s':>8}  check")
    for row in rows:
        d = row.details
        loss = f"{with_error(100 * row.error, 100 * d['error ±'])} %"
        divergence = with_error(1000 * d["KL"], 1000 * d["KL ±"])
        agreement = f"{with_error(100 * d['top-1 agreement'], 100 * d['top-1 agreement ±'])} %"
        print(f"  {row.method:<26}{loss:>18}{divergence:>18}{agreement:>20}{row.seconds:>8.1f}  {row.check}")
    print(
        "  bits lost: relative to the exact model's bits per byte; ±: standard error over seeds of the\n"
        "  draws; s: seconds of a pass."
    )
