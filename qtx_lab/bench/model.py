"""`qtx-lab bench model`: what sampled attention costs the reference model as a model, on text that it never saw."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..attention import sampled_attention
from ..cache.kv_cache import BLOCK, PROPOSALS, RECENT, SINKS
from ..models.reference import Decoding, ReferenceModel, encode, load_reference_model, reference_text

SAMPLERS = ("monte-carlo", "systematic", "head-tail")
ALLOWED = {("head-tail", 8): 0.01, ("head-tail", 4): 0.002, ("cache, low-rank", 8): 0.02}
"""The share of bits per byte that a method may lose at n / this many draws."""


@dataclass(frozen=True)
class Measured:
    """What one pass over the windows lost against the exact model: means over all bytes."""

    bits: float
    """Bits per byte."""
    divergence: float
    """KL(exact || sampled) of the next byte, bits."""
    agreement: float
    """Share of bytes where both find the same one likeliest."""
    seconds: float


def bench_model(quick: bool, copy: float) -> list[dict[str, Any]]:
    """The model over whole windows, and decoding with the cache; rows as in `run_bench`, and with

    - `bits per byte` and `exact bits per byte` over the same bytes; `error`: their relative difference;
    - `KL`: of the exact model's next byte from the sampled one's, bits; `top-1 agreement`;
    - `... ±`: standard error of the mean over seeds of the draws, on the same text;
    - `seconds` of a pass and its `ratio` to the exact pass's.

    Decoding attends to the first half of a window exactly and takes the second half's true bytes one by one; caches that
    are too short for a sketch are the same under every proposal, and measured under `exact` alone. Methods that
    `ALLOWED` names pass where their mean is within it, the others where it is finite.
    """
    del copy
    model, text = load_reference_model(), encode(reference_text())
    sizes, count, seeds = ((128,), 2, 2) if quick else ((256, 1024), 16, 4)
    rows = []
    for n in sizes:
        windows = text[: count * n + 1].unfold(0, n + 1, n)  # [W, n + 1]
        shares: tuple[int, ...] = (8,) if quick else (16, 8, 4)
        methods: dict[tuple[str, int], Callable[[torch.Generator], Tensor]] = {
            (name, share): whole(model, windows, name, n // share) for share in shares for name in SAMPLERS
        }
        rows += table(
            f"whole windows of {n:,} bytes, {count} of them",
            windows[:, 1:],
            whole(model, windows),
            methods,
            seeds,
        )
        shares = (8,) if quick else (8, 4)
        decoded = windows if quick else windows[: count // 2]
        sketched = n - n // 2 >= SINKS + RECENT + BLOCK
        methods = {
            (f"cache, {name}", share): decoding(model, decoded, name, n // share)
            for share in shares
            for name in (PROPOSALS if sketched else PROPOSALS[:1])
        }
        case = f"decoding {n // 2:,} bytes after {n - n // 2:,}, {len(decoded)} texts"
        rows += table(case, decoded[:, n - n // 2 :], decoding(model, decoded), methods, 2)
    return rows


def whole(
    model: ReferenceModel, windows: Tensor, sampler: str = "exact", draws: int = 1
) -> Callable[[torch.Generator], Tensor]:
    """Log-probabilities (W, n, 256) of the next bytes, of windows (W, n + 1)."""

    def run(generator: torch.Generator) -> Tensor:
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

    return run


def decoding(
    model: ReferenceModel, windows: Tensor, proposal: str | None = None, draws: int = 1
) -> Callable[[torch.Generator], Tensor]:
    """Log-probabilities (W, n // 2 + 1, 256) of the next bytes of windows (W, n + 1), from the middle on."""

    def run(generator: torch.Generator) -> Tensor:
        n = windows.shape[1] - 1
        start = n - n // 2
        options = {} if proposal is None else {"num_samples": draws}
        state = Decoding(model, windows[:, :start], proposal=proposal, generator=generator, **options)
        logits = [state.logits, *(state.step(windows[:, i]) for i in range(start, n))]
        return torch.stack(logits, 1).log_softmax(-1)

    return run


def table(
    case: str,
    targets: Tensor,
    exact: Callable[[torch.Generator], Tensor],
    methods: dict[tuple[str, int], Callable[[torch.Generator], Tensor]],
    seeds: int,
) -> list[dict[str, Any]]:
    """Measure, print and return the rows of a case; targets (W, m) are the bytes that are predicted."""
    start = time.perf_counter()
    wanted = exact(torch.Generator())
    baseline = time.perf_counter() - start
    bits = bits_of(wanted, targets)
    rows = []
    for (name, share), run in tqdm(methods.items(), desc=case, leave=False):
        found = [against(run, seed, wanted, targets) for seed in range(seeds)]
        mean, error = summary(found)
        loss = mean["bits"] / bits - 1
        limit = ALLOWED.get((name, share), math.inf)
        passed = math.isfinite(loss) and loss <= limit
        rows.append(
            {
                "case": case,
                "method": f"{name}, S = n / {share}",
                "seconds": mean["seconds"],
                "baseline": "exact",
                "ratio": baseline / mean["seconds"] if passed else None,
                "error": loss,
                "error ±": error["bits"] / bits,
                "check": "pass" if passed else f"loses {loss:.2%}, above {limit:.1%}",
                "bits per byte": mean["bits"],
                "exact bits per byte": bits,
                "KL": mean["divergence"],
                "KL ±": error["divergence"],
                "top-1 agreement": mean["agreement"],
                "top-1 agreement ±": error["agreement"],
            }
        )
    print_table(case, bits, baseline, rows)
    return rows


def against(run: Callable[[torch.Generator], Tensor], seed: int, wanted: Tensor, targets: Tensor) -> Measured:
    """One pass against the exact log-probabilities."""
    start = time.perf_counter()
    found = run(torch.Generator().manual_seed(seed))
    seconds = time.perf_counter() - start
    divergence = (wanted.exp() * (wanted - found)).sum(-1).double().mean() / math.log(2)
    agreement = (wanted.argmax(-1) == found.argmax(-1)).double().mean()
    return Measured(bits_of(found, targets), float(divergence), float(agreement), seconds)


def bits_of(log_p: Tensor, targets: Tensor) -> float:
    """Bits per byte of log-probabilities (W, m, 256)."""
    return float(-log_p.gather(-1, targets[..., None]).double().mean() / math.log(2))


def summary(found: list[Measured]) -> tuple[dict[str, float], dict[str, float]]:
    """Means over seeds, and their standard errors (NaN from one seed)."""
    names = ("bits", "divergence", "agreement", "seconds")
    values = torch.tensor([[getattr(x, name) for name in names] for x in found], dtype=torch.float64)
    error = values.std(0) / math.sqrt(len(found)) if len(found) > 1 else values[0] * math.nan
    return (dict(zip(names, x.tolist(), strict=True)) for x in (values.mean(0), error))  # type: ignore[return-value]


def print_table(case: str, bits: float, baseline: float, rows: list[dict[str, Any]]) -> None:
    """The table of a case."""
    print(f"\n{case}; the exact model: {bits:.4f} bits per byte, {baseline:.1f} s")
    print(f"  {'method':<26}{'bits lost':>18}{'KL, mbit':>18}{'top-1 agreement':>20}{'s':>8}  check")
    for row in rows:
        loss, kl, top = (
            f"{row[name] * unit:.{digits}f} ± {row[name + ' ±'] * unit:.{digits}f}{sign}"
            for name, unit, digits, sign in (
                ("error", 100, 3, " %"),
                ("KL", 1000, 2, ""),
                ("top-1 agreement", 100, 2, " %"),
            )
        )
        print(f"  {row['method']:<26}{loss:>18}{kl:>18}{top:>20}{row['seconds']:>8.1f}  {row['check']}")
    print(
        "  bits lost: of the exact model's bits per byte; ±: standard error over seeds of the draws; s: of a pass."
    )
