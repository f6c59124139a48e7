"""A cost model of training over many GPUs: the bytes that a step exchanges, and a simulated efficiency.

`python -m qtx_lab.training.scaling` prints the table. Nothing in it was measured on such a machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUCKET_BYTES = 25 << 20
"""Size of the buckets of gradients that DDP exchanges together, torch's default."""
GRADIENT_BYTES = 4
"""A number of a gradient, or of a weight: float32."""
STATISTICS_BYTES = 8
"""What each rank exchanges in a step besides gradients: the loss, and whether to stop, as float32."""


@dataclass(frozen=True)
class Machine:
    """What the model assumes about a cluster; the defaults are of the order of nodes with H100 GPUs.

    Parameters
    ----------
    flops : float
        Sustained speed of a GPU, FLOP/s: two fifths of a peak of 989e12.
    gpus_per_node : int
    link : float
        Bandwidth from a GPU to the others of its node, bytes/s.
    network : float
        Bandwidth from a GPU to other nodes, bytes/s: nine tenths of 400 Gb/s.
    latency : float
        Time of one hop of an exchange, s.
    jitter : float
        Relative spread of a rank's computing time from step to step.
    """

    flops: float = 0.4 * 989e12
    gpus_per_node: int = 8
    link: float = 350e9
    network: float = 45e9
    latency: float = 10e-6
    jitter: float = 0.01


def bytes_per_step(parameters: int, ranks: int, *, parallel: str = "ddp", local_steps: int = 1) -> float:
    """Bytes that each rank sends in a step; with local updates on average, since only every so many-th sends.

    A ring reduces n bytes over N ranks by sending 2 n (N - 1) / N: a reduce-scatter and an all-gather
    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009). DDP does
    it once. FSDP gathers the parameters before the forward and again before the backward pass, and scatters
    the gradients: three halves of that. Draws add nothing, because every rank makes its own from the seed. A
    step that measures the sampling variance does everything twice. Local updates (DiLoCo, see
    `qtx_lab.training.local_updates`) reduce as many bytes of weights once in `local_steps` steps; checkpoints
    are not counted, for which the states of the replicas' optimizers go to rank 0.

    >>> [round(bytes_per_step(100_000_000, 8, local_steps=steps) / 1e6) for steps in (1, 50)]
    [700, 14]
    """
    rounds = 3 if parallel == "fsdp" else 2
    reduced = rounds * GRADIENT_BYTES * parameters * (ranks - 1) / ranks
    return reduced / local_steps + STATISTICS_BYTES * (ranks > 1)


def exchange_seconds(num_bytes: float, ranks: int, machine: Machine) -> float:
    """Time of an all-reduce in two levels: over the GPUs of a node, then between the nodes."""
    per_node = min(ranks, machine.gpus_per_node)
    nodes = -(-ranks // machine.gpus_per_node)
    within = 2 * num_bytes * (per_node - 1) / per_node / machine.link
    between = 2 * num_bytes / per_node * (nodes - 1) / nodes / machine.network
    hops = 2 * (per_node > 1) + 2 * math.log2(nodes)
    return within + between + hops * machine.latency


def simulate(
    parameters: int,
    tokens: int,
    ranks: int,
    machine: Machine | None = None,
    *,
    steps: int = 200,
    seed: int = 0,
    local_steps: int = 1,
) -> dict[str, Any]:
    """Simulate steps of DDP with the same number of tokens on each of any number of GPUs (weak scaling).

    A step takes 6 FLOP for each parameter and token (Kaplan et al. 2020, section 2.1), a third of them in the
    forward pass. In the backward pass buckets of gradients become ready one after another, and are exchanged
    while the others are computed. The slowest rank sets the pace, and the step waits for what is left to
    exchange after the last bucket.

    Parameters
    ----------
    parameters : int
        Parameters of the model.
    tokens : int
        Tokens of a step on each GPU.
    ranks : int
        Number of GPUs.
    machine : Machine, optional
    steps, seed : int
        How many steps are simulated, and the seed of their jitter.
    local_steps : int
        Above 1: ranks wait for each other, and exchange everything at once, only after so many steps.

    Returns
    -------
    dict
        `efficiency` (seconds of a step on one GPU over those on `ranks`), `seconds` (of a step), `exposed`
        (share of a step spent waiting for exchanges), `bytes` (sent by each rank), and the arguments.

    Examples
    --------
    >>> simulate(100_000_000, 32_768, 1)["efficiency"] > 0.99
    True
    """
    machine = machine or Machine()
    random = np.random.default_rng(seed)
    compute = 6 * parameters * tokens / machine.flops
    if local_steps > 1:
        rounds = -(-steps // local_steps)
        jitter = random.lognormal(0.0, machine.jitter, (rounds, local_steps, ranks))
        pace = compute * jitter.sum(1).max(-1)  # (rounds,), s
        exchange = exchange_seconds(GRADIENT_BYTES * parameters, ranks, machine) if ranks > 1 else 0.0
        seconds = float((pace.mean() + exchange) / local_steps)
        exposed = exchange / local_steps / seconds
    else:
        pace = compute * random.lognormal(0.0, machine.jitter, (steps, ranks)).max(-1)  # (steps,), s
        seconds, exposed = _step_with_buckets(parameters, ranks, machine, pace)
    return {
        "parameters": parameters,
        "tokens": tokens,
        "ranks": ranks,
        "local_steps": local_steps,
        "bytes": bytes_per_step(parameters, ranks, local_steps=local_steps),
        "seconds": seconds,
        "efficiency": compute / seconds,
        "exposed": exposed,
    }


def _step_with_buckets(
    parameters: int, ranks: int, machine: Machine, pace: np.ndarray
) -> tuple[float, float]:
    """Mean seconds of a step whose backward pass hides exchanges of buckets, and the share that waits."""
    buckets = max(1, math.ceil(GRADIENT_BYTES * parameters / BUCKET_BYTES))
    bucket_seconds = (
        exchange_seconds(GRADIENT_BYTES * parameters / buckets, ranks, machine) if ranks > 1 else 0.0
    )
    network_free = np.zeros(len(pace))  # when the network has sent what is ready so far
    for bucket in range(buckets):
        ready = pace * (1 / 3 + 2 / 3 * (bucket + 1) / buckets)
        network_free = np.maximum(network_free, ready) + bucket_seconds
    seconds = float(network_free.mean())
    return seconds, float((network_free - pace).mean()) / seconds


def table(
    ranks: Sequence[int] = (1, 8, 64, 512),
    cases: Sequence[tuple[int, int]] = ((10**8, 4096), (10**8, 32_768), (10**9, 16_384)),
    local_steps: Sequence[int] = (1, 50),
) -> list[dict[str, Any]]:
    """`simulate` for each case (parameters, tokens on a GPU), number of local steps, and number of GPUs."""
    return [
        simulate(parameters, tokens, count, local_steps=alone)
        for parameters, tokens in cases
        for alone in local_steps
        for count in ranks
    ]


if __name__ == "__main__":
    columns = {"parameters": 12, "tokens/GPU": 12, "alone": 7, "GPUs": 6, "GB sent/GPU": 13, "ms/step": 9}
    columns |= {"waiting": 9, "efficiency": 12}
    print("".join(f"{name:>{width}}" for name, width in columns.items()))
    for row in table():
        print(
            f"{row['parameters']:>12,}{row['tokens']:>12,}{row['local_steps']:>7}{row['ranks']:>6}"
            f"{row['bytes'] / 1e9:>13.2f}{1e3 * row['seconds']:>9.1f}{row['exposed']:>9.1%}"
            f"{row['efficiency']:>12.1%}"
        )
