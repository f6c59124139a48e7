"""`qtx-lab bench training`: the trainer beside a bare DDP loop, two ranks beside one, and local updates.

On a GPU it measures instead what drawing attention costs a model of 104 M parameters.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean, median
from typing import Any

import torch

from ..models.reference import ReferenceConfig, ReferenceModel
from ..specs import TrainSpec
from ..training import QuantumTrainer, open_cluster
from ..training.cluster import Cluster, find_gpus
from ..training.data import SequenceOrder, open_tokens, stream_seed
from ..training.models import make_model
from ..training.rank import ORDER
from ..training.scaling import bytes_per_step
from ..training.schedules import learning_rate_share
from ..training.trainer import TrainingResult
from ..training.worker import leave_group, open_store
from .base import BenchRow, Timing, shown, span

MODEL = "reference-untrained"
SETTINGS: dict[str, Any] = {
    "num_tokens": 256,
    "batch_size": 8,
    "sampler": "exact",
    "validate_every": 0,
    "checkpoint_every": 0,
    "precision": "fp32",
    "warmup_steps": 5,
}
CHECKPOINT_EVERY = 10
"""Steps between the checkpoints of the case "checkpoints"."""
ALLOWED_STALL = 0.01
"""How long a training may wait for a checkpoint, as a fraction of the time of one step."""
WARM_UP = 5
"""Steps at the start whose time is not counted."""
ALLOWED_OVERHEAD = 0.05
"""The trainer's time may be this much more than the bare loop's, as a fraction of it."""
REQUIRED_SPEEDUP = 1.5
"""The speed-up of two ranks over one that passes."""
ALLOWED_LOSS_ERROR = 1e-4
"""Relative difference from the baseline's last loss."""
LARGE = ReferenceConfig(context=1024, layers=12, width=768, heads=12, kv_heads=4, head_dim=64, mlp_width=3072)
"""A model of 104 M parameters, for a GPU."""
LARGE_SAMPLERS: dict[str, dict[str, Any]] = {
    "exact": {"sampler": "exact"},
    "systematic, S=64": {"sampler": "systematic", "num_samples": 64},
}
"""How its attention is trained, by the names of the rows."""
ALLOWED_GAP = 0.1
"""Relative difference between the last losses of exact and of sampled training on the same batches."""
LOCAL_SETTINGS: dict[str, Any] = {
    "model": "small",
    "num_tokens": 128,
    "batch_size": 8,
    "accumulation": 4,
    "sampler": "systematic",
    "num_samples": 16,
    "learning_rate": 3e-3,
    "warmup_steps": 20,
    "validate_every": 0,
    "checkpoint_every": 0,
    "precision": "fp32",
}
"""The training of the case "local updates"."""
LOCAL_STEPS = (1, 5, 20)
"""Steps between two exchanges, in that case."""


@dataclass(frozen=True)
class LoopResult:
    """What a bare training loop measured."""

    seconds: list[float]
    """Seconds of each step after the first `WARM_UP`."""
    loss: float
    """At the last step."""


def bench_training(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Median seconds a step; the methods take turns.

    `error` is the relative difference of the last loss from the baseline's, and the detail
    `tokens_per_second` is of all ranks together. The cases are

    - "overhead": the trainer on two ranks, beside a bare DDP loop in the same two workers on the same
      batches. The trainer passes if it takes at most 5 % more time;
    - "ranks": the trainer on two ranks beside one, each of one thread, with the same global batch. Two ranks
      pass if they are at least 1.5 times as fast.

    - "checkpoints": the trainer in this process with a checkpoint after every 10 steps, which a thread
      writes, beside the same without. The seconds are means over all steps and contain the wait for
      checkpoints; the detail `stall` is that wait as a fraction of one step, the median of all checkpoints,
      and `first_stall` that of the first ones of each training. They pass if both are at most 1 %;
    - "local updates": four replicas of a small model whose attention draws 16 keys a row, in this process,
      that exchange their weights after 1 (gradients, as DDP does), 5 and 20 steps, see
      `qtx_lab.training.local_updates`. All begin with the weights that half as many steps with gradients
      gave, because averages of replicas from scratch are slow to learn anything. The detail `bytes_sent` is
      what each of four ranks would send in the training, by `bytes_per_step`. The error is of held-out text,
      bits per byte, over that of the baseline, above 0 where local updates are worse. They pass if it is at
      most a tenth.

    Elsewhere a method also fails if its last loss differs from the baseline's by more than 1e-4 of it. The
    ranks need two cores for themselves: other processes on the machine change the result.

    Where NVML finds a GPU, `bench_large` runs instead.
    """
    del copy_bandwidth
    if find_gpus()[0]:
        return bench_large(quick)
    spec = TrainSpec(model=MODEL, steps=15 if quick else 40, **SETTINGS)
    results: dict[str, list[LoopResult]] = {
        "bare DDP loop": [],
        "trainer, 2 ranks": [],
        "trainer, 1 rank": [],
    }
    with open_cluster("local", num_workers=2) as two, open_cluster("local", num_workers=1) as one:
        for _ in range(2 if quick else 5):
            results["bare DDP loop"].append(bare_loop(two, spec))
            results["trainer, 2 ranks"].append(trainer_loop(two, spec))
            results["trainer, 1 rank"].append(trainer_loop(one, spec))
    timings: dict[str, Timing] = {
        name: Timing.of([median(x.seconds) for x in results[name]]) for name in results
    }
    losses = {name: results[name][-1].loss for name in results}
    rows: list[BenchRow] = []
    for case, method, baseline, least in (
        ("overhead", "trainer, 2 ranks", "bare DDP loop", 1 / (1 + ALLOWED_OVERHEAD)),
        ("ranks", "trainer, 2 ranks", "trainer, 1 rank", REQUIRED_SPEEDUP),
    ):
        for name in (baseline, method):
            timing = timings[name]
            ratio = timings[baseline].median / timing.median
            error = abs(losses[name] / losses[baseline] - 1)
            same_loss = error <= ALLOWED_LOSS_ERROR
            check = "pass" if same_loss else f"losses are {error:.2g} apart"
            if same_loss and name == method and ratio < least:
                check = f"ratio {ratio:.2f} is below {least:.2f}"
            rows.append(
                BenchRow(
                    case=case,
                    method=name,
                    seconds=timing.median,
                    baseline=baseline,
                    ratio=ratio if same_loss else None,
                    error=error,
                    check=check,
                    low=timing.low,
                    high=timing.high,
                    details={"tokens_per_second": spec.batch_size * spec.num_tokens / timing.median},
                )
            )
    print(
        f"{'case':<14}{'method':<18}{'ms/step':>9}{'(low–high)':>18}{'tokens/s':>10}{'ratio':>8}"
        f"{'loss off by':>13}  check"
    )
    _print_rows(rows)
    rows += _print_rows(bench_checkpoints(spec, 2 if quick else 5))
    rows += _print_rows(bench_local_updates(160 if quick else 640))
    return rows


def _print_rows(rows: list[BenchRow]) -> list[BenchRow]:
    """Print the rows of a case as soon as it is done, and return them."""
    for row in rows:
        print(
            f"{row.case:<14}{row.method:<18}{1e3 * row.seconds:>9.1f}{span(row, 1e3):>18}"
            f"{row.details['tokens_per_second']:>10,.0f}{shown(row.ratio):>8}{row.error:>13.1g}  {row.check}"
        )
        if "stall" in row.details:
            stall, first = row.details["stall"], row.details["first_stall"]
            print(
                f"  training waits for a checkpoint for {stall:.2%} of a step, for the first one {first:.2%}"
            )
    return rows


def bench_checkpoints(spec: TrainSpec, turns: int) -> list[BenchRow]:
    """The rows of the case "checkpoints", see `bench_training`."""
    specs = {
        "no checkpoints": spec,
        "every 10 steps": TrainSpec(**{**dict(spec), "checkpoint_every": CHECKPOINT_EVERY}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    losses: dict[str, float] = {}
    stalls: list[list[float]] = []
    for _ in range(turns):
        for name, its in specs.items():
            result = QuantumTrainer(**its.arguments(), progress=False).train()
            rows = result.metrics[WARM_UP:]
            steps = [spec.batch_size * spec.num_tokens / row["tokens_per_second"] for row in rows]
            waits = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
            seconds[name].append((sum(steps) + sum(waits)) / len(steps))
            losses[name] = result.loss
            if waits:
                stalls.append([wait / median(steps) for wait in waits])
    timings = {name: Timing.of(values) for name, values in seconds.items()}
    baseline = "no checkpoints"
    details = {
        "stall": median(stall for of_training in stalls for stall in of_training),
        "first_stall": median(of_training[0] for of_training in stalls),
    }
    error = abs(losses["every 10 steps"] / losses[baseline] - 1)
    check = "pass"
    if error > ALLOWED_LOSS_ERROR:
        check = f"losses are {error:.2g} apart"
    elif (stall := max(details.values())) > ALLOWED_STALL:
        check = f"a checkpoint stalls training for {stall:.2g} of a step"
    return [
        BenchRow(
            case="checkpoints",
            method=name,
            seconds=timing.median,
            baseline=baseline,
            ratio=timings[baseline].median / timing.median,
            error=0.0 if name == baseline else error,
            check="pass" if name == baseline else check,
            low=timing.low,
            high=timing.high,
            details={
                "tokens_per_second": spec.batch_size * spec.num_tokens / timing.median,
                **({} if name == baseline else details),
            },
        )
        for name, timing in timings.items()
    ]


def bench_local_updates(steps: int) -> list[BenchRow]:
    """The rows of the case "local updates", see `bench_training`."""
    rows: list[BenchRow] = []
    spec = TrainSpec(**{**LOCAL_SETTINGS, "steps": steps // 2, "seed": 1})
    start = QuantumTrainer(**spec.arguments(), progress=False)
    start.train()
    for local_steps in LOCAL_STEPS:
        spec = TrainSpec(**{**LOCAL_SETTINGS, "steps": steps, "local_steps": local_steps})
        trainer = QuantumTrainer(**(spec.arguments() | {"model": deepcopy(start.model)}), progress=False)
        result = trainer.train()
        tokens = spec.batch_size * spec.num_tokens
        timing = Timing.of([tokens / row["tokens_per_second"] for row in result.metrics[WARM_UP:]])
        held_out = result.metrics[-1]["held_out_bits_per_byte_exact"]
        baseline = rows[0].details["held_out_bits_per_byte"] if rows else held_out
        error = held_out / baseline - 1
        parameters = sum(p.numel() for p in trainer.model.parameters())
        sent = spec.steps * bytes_per_step(parameters, spec.accumulation, local_steps=local_steps)
        rows.append(
            BenchRow(
                case="local updates",
                method="every step" if local_steps == 1 else f"every {local_steps} steps",
                seconds=timing.median,
                baseline="every step",
                ratio=(rows[0].seconds if rows else timing.median) / timing.median,
                error=error,
                check="pass" if error <= ALLOWED_GAP else f"held-out text is {error:.0%} worse",
                low=timing.low,
                high=timing.high,
                details={
                    "tokens_per_second": tokens / timing.median,
                    "bytes_sent": sent,
                    "held_out_bits_per_byte": held_out,
                },
            )
        )
    return rows


def trainer_loop(cluster: Cluster, spec: TrainSpec) -> LoopResult:
    """Train by `QuantumTrainer` on a cluster."""
    trainer = QuantumTrainer(**spec.arguments(), distributed=True, cluster=cluster, progress=False)
    result = trainer.train()
    tokens = spec.batch_size * spec.num_tokens
    seconds = [tokens / row["tokens_per_second"] for row in result.metrics[WARM_UP:]]
    return LoopResult(seconds, result.loss)


def bench_large(
    quick: bool, kind: str | None = "cuda", config: ReferenceConfig = LARGE, **settings: Any
) -> list[BenchRow]:
    """Tokens a second of a large model on one GPU, bf16: exact attention beside `systematic` draws.

    It is trained through dask-cuda, or in this process where the kind of cluster is None.

    `error` is the relative difference between the mean losses of the last five steps. The rows' details are
    `loss`, `tokens_per_second`, `parameters`, `memory_bytes` (the most that tensors took),
    `held_out_bits_per_byte` and `device`.
    """
    options = {
        "num_tokens": config.context,
        "batch_size": 16,
        "steps": 20 if quick else 40,
        "precision": "bf16",
        "learning_rate": 3e-4,
        "warmup_steps": 10,
        "validate_every": 0,
        "checkpoint_every": 0,
        **settings,
    }
    with ExitStack() as stack:
        cluster = None if kind is None else stack.enter_context(open_cluster(kind, num_workers=1))
        device = describe_device() if cluster is None else cluster.client.submit(describe_device).result()
        results = {
            method: train_large(config, cluster, {**options, **sampler})
            for method, sampler in LARGE_SAMPLERS.items()
        }
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in ReferenceModel(config).parameters())
    tokens = options["batch_size"] * options["num_tokens"]
    rows = large_rows(results, tokens, {"parameters": num_parameters, "device": device})
    print(
        f"{device}; {num_parameters / 1e6:.0f} M parameters, "
        f"{options['batch_size']} × {options['num_tokens']} tokens a step"
    )
    print_large(rows)
    return rows


def train_large(config: ReferenceConfig, cluster: Cluster | None, options: dict[str, Any]) -> TrainingResult:
    """Train a model of this shape from the same random weights, over a cluster or in this process."""
    torch.manual_seed(0)
    model = ReferenceModel(config)
    distributed = cluster is not None
    return QuantumTrainer(model, distributed=distributed, cluster=cluster, progress=False, **options).train()


def large_rows(results: dict[str, TrainingResult], tokens: int, facts: dict[str, Any]) -> list[BenchRow]:
    """The rows of `bench_large`, of trainings by method; `tokens` are those of a step."""
    timings = {
        method: Timing.of([tokens / row["tokens_per_second"] for row in result.metrics[WARM_UP:]])
        for method, result in results.items()
    }
    losses = {method: fmean(row["loss"] for row in x.metrics[-5:]) for method, x in results.items()}
    rows = []
    for method, result in results.items():
        timing, error = timings[method], abs(losses[method] / losses["exact"] - 1)
        passed = error <= ALLOWED_GAP
        details = {
            "loss": losses[method],
            "tokens_per_second": tokens / timing.median,
            "memory_bytes": max(row["memory_bytes"] for row in result.metrics),
            "held_out_bits_per_byte": result.metrics[-1].get("held_out_bits_per_byte_exact"),
            **facts,
        }
        rows.append(
            BenchRow(
                case="large on a GPU",
                method=method,
                seconds=timing.median,
                baseline="exact",
                ratio=timings["exact"].median / timing.median if passed else None,
                error=error,
                check="pass" if passed else f"the loss is {error:.0%} from that of exact training",
                low=timing.low,
                high=timing.high,
                details=details,
            )
        )
    return rows


def print_large(rows: Sequence[BenchRow]) -> None:
    """Print the rows of `bench_large`."""
    print(f"{'method':<18}{'ms/step':>9}{'tokens/s':>10}{'ratio':>7}{'GB':>6}{'loss':>7}  check")
    for row in rows:
        print(
            f"{row.method:<18}{1e3 * row.seconds:>9.1f}{row.details['tokens_per_second']:>10,.0f}"
            f"{shown(row.ratio):>7}{row.details['memory_bytes'] / 1e9:>6.1f}{row.details['loss']:>7.3f}"
            f"  {row.check}"
        )


def describe_device() -> str:
    """The device of the worker that runs this, and its versions."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    p = torch.cuda.get_device_properties(0)
    memory = f"{p.total_memory / 2**30:.0f} GiB"
    return f"{p.name}, {memory}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def bare_loop(cluster: Cluster, spec: TrainSpec) -> LoopResult:
    """Train by DDP as torch's tutorial writes it, one rank a worker, on the batches that the trainer has."""
    from distributed import as_completed

    workers, name = cluster.workers, f"bare-{time.monotonic_ns()}"
    port = cluster.client.run(open_store, name, "127.0.0.1", 60.0, workers=[workers[0]])[workers[0]]
    futures = [
        cluster.client.submit(
            bare_rank,
            MODEL,
            rank,
            len(workers),
            port,
            spec,
            workers=[worker],
            allow_other_workers=False,
            pure=False,
        )
        for rank, worker in enumerate(workers)
    ]
    for future in as_completed(futures):  # raises the first error while the other rank still waits
        future.result()
    ranks = cluster.client.gather(futures)
    return LoopResult(ranks[0].seconds, fmean(rank.loss for rank in ranks))


def bare_rank(model_name: str, rank: int, world_size: int, port: int, spec: TrainSpec) -> LoopResult:
    """One rank of the bare loop."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        tokens = open_tokens("reference", spec.num_tokens)
        order = SequenceOrder(tokens.training, spec.num_tokens, stream_seed(spec.seed, ORDER))
        module = make_model(model_name, spec.seed)
        model = torch.nn.parallel.DistributedDataParallel(module)
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        others = [p for p in module.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": spec.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.95), fused=True)
        per_rank, seconds, last_loss = spec.batch_size // world_size, [], 0.0
        for step in range(spec.steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = spec.learning_rate * learning_rate_share(spec, step)
            first = step * spec.batch_size + rank * per_rank
            batch = order.sequences(range(first, first + per_rank))
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), spec.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            last_loss = loss.item()
            seconds.append(time.perf_counter() - start)
        return LoopResult(seconds[WARM_UP:], last_loss)
    finally:
        leave_group()
