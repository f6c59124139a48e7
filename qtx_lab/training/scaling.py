"""A cost model of training over many GPUs: bytes that a step exchanges, and the efficiency that a simulation expects.

`python -m qtx_lab.training.scaling` prints the table. It is a model on paper: nothing in it was measured on such a
machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUCKET_BYTES = 25 << 20
"""Gradients that DDP exchanges together, torch's default."""
STATISTICS_BYTES = 8
"""Loss and wish to stop, float32: what each rank of ours exchanges a step besides gradients."""


@dataclass(frozen=True)
class Machine:
    """What the model assumes of a cluster. The defaults are of the order of H100 nodes.

    Parameters
    ----------
    flops : float
        Of a GPU, sustained, 1 / s: two fifths of a peak of 989e12.
    gpus_per_node : int
    link, network : float
        Bytes a second that a GPU sends to the others of its node, and to other nodes (400 Gb/s, nine tenths of it).
    latency : float
        Of one hop of an exchange, s.
    jitter : float
        Spread of a rank's computing time from step to step, relative.
    """

    flops: float = 0.4 * 989e12
    gpus_per_node: int = 8
    link: float = 350e9
    network: float = 45e9
    latency: float = 10e-6
    jitter: float = 0.01


def bytes_per_step(parameters: int, ranks: int, *, parallel: str = "ddp", gradient_bytes: int = 4) -> float:
    """Bytes that each rank sends in a step.

    A ring reduces n bytes over N ranks by sending 2 n (N - 1) / N: a reduce-scatter and an all-gather (Patarasuk and
    Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009). DDP does it once. FSDP gathers the
    parameters before the forward and again before the backward pass and scatters the gradients: three halves of that.
    Draws add nothing: every rank makes its own from the seed. A step that measures the sampling variance does all twice.

    >>> round(bytes_per_step(100_000_000, 8) / 1e6)
    700
    """
    rounds = 3 if parallel == "fsdp" else 2
    return rounds * parameters * gradient_bytes * (ranks - 1) / ranks + STATISTICS_BYTES * (ranks > 1)


def exchange_seconds(num_bytes: float, ranks: int, machine: Machine) -> float:
    """Of an all-reduce in two levels: over the GPUs of a node, then each with its like in the other nodes."""
    near = min(ranks, machine.gpus_per_node)
    nodes = -(-ranks // machine.gpus_per_node)
    seconds = 2 * num_bytes * (near - 1) / near / machine.link + 2 * (near > 1) * machine.latency
    return (
        seconds
        + 2 * num_bytes / near * (nodes - 1) / nodes / machine.network
        + 2 * math.log2(nodes) * machine.latency
    )


def simulate(
    parameters: int,
    tokens: int,
    ranks: int,
    machine: Machine | None = None,
    *,
    steps: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Steps of DDP with as many tokens on every GPU, whatever their number (weak scaling).

    6 FLOP a parameter and token (Kaplan et al. 2020, section 2.1), a third of them forward. In the backward pass buckets
    of gradients come ready one after another and are exchanged while the others are computed; the slowest rank sets the
    pace, and what is left to exchange after the last bucket is waited for.

    Returns
    -------
    dict
        `efficiency` (seconds of a step on one GPU over those on `ranks`), `seconds`, `exposed` (share of a step spent
        waiting for exchanges), `bytes` (sent by each rank).

    >>> simulate(100_000_000, 32_768, 1)["efficiency"] > 0.99
    True
    """
    machine = machine or Machine()
    random = np.random.default_rng(seed)
    compute = 6 * parameters * tokens / machine.flops
    pace = compute * random.lognormal(0.0, machine.jitter, (steps, ranks)).max(-1)  # [steps]
    buckets = max(1, math.ceil(4 * parameters / BUCKET_BYTES))
    each = exchange_seconds(4 * parameters / buckets, ranks, machine) if ranks > 1 else 0.0
    free = np.zeros(steps)  # when the network has sent what is ready so far
    for bucket in range(buckets):
        ready = pace * (1 / 3 + 2 / 3 * (bucket + 1) / buckets)
        free = np.maximum(free, ready) + each
    seconds = float(free.mean())
    return {
        "parameters": parameters,
        "tokens": tokens,
        "ranks": ranks,
        "bytes": bytes_per_step(parameters, ranks),
        "seconds": seconds,
        "efficiency": compute / seconds,
        "exposed": float((free - pace).mean()) / seconds,
    }


def table(
    ranks: Sequence[int] = (1, 8, 64, 512),
    cases: Sequence[tuple[int, int]] = ((10**8, 4096), (10**8, 32_768), (10**9, 16_384)),
) -> list[dict[str, Any]]:
    """`simulate` for cases (parameters, tokens on a GPU) and numbers of GPUs."""
    return [simulate(parameters, tokens, count) for parameters, tokens in cases for count in ranks]


if __name__ == "__main__":
    print(
        f"{'parameters':>12}{'tokens/GPU':>12}{'GPUs':>6}{'GB sent/GPU':>13}{'ms/step':>9}{'waiting':>9}{'efficiency':>12}"
    )
    for row in table():
        print(
            f"{row['parameters']:>12,}{row['tokens']:>12,}{row['ranks']:>6}{row['bytes'] / 1e9:>13.2f}"
            f"{1e3 * row['seconds']:>9.1f}{row['exposed']:>9.1%}{row['efficiency']:>12.1%}"
        )
