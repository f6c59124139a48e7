"""`qtx-lab bench training`: what the trainer costs over a bare DDP loop, and what a second rank is worth; on a GPU, what
drawing attention costs a model of 100 M parameters.
"""

from __future__ import annotations

import time
from datetime import timedelta
from statistics import median
from typing import Any

import torch

from ..models.reference import ReferenceConfig, ReferenceModel
from ..training import QuantumTrainer, open_cluster
from ..training.cluster import Cluster, find_gpus
from ..training.data import SequenceOrder, open_tokens, stream_seed
from ..training.rank import ORDER, leave_group, open_store
from ..training.recipe import Recipe
from ..training.trainer import make_model

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
ALLOWED_OVERHEAD, WANTED_SPEEDUP, ALLOWED_LOSS = 0.05, 1.5, 1e-4
LARGE = ReferenceConfig(context=1024, layers=12, width=768, heads=12, kv_heads=4, head_dim=64, mlp_width=3072)
"""104 M parameters, for a GPU."""
ALLOWED_GAP = 0.1
"""Between the last losses of exact and of sampled training on the same batches, relative to the exact one's."""


def bench_training(quick: bool, copy: float) -> list[dict[str, Any]]:
    """Median seconds a step, of methods that take turns; rows as in `run_bench`, `error` the last losses' relative distance.

    - "overhead": the trainer on two ranks against a bare DDP loop in the same two workers, on the same batches.
    - "ranks": the trainer on two ranks against one, both of one thread, with the same global batch.

    A method passes if its last loss is the baseline's to 1e-4 of it, and its time is at most 5 % more, or 1.5 times less.
    The ranks must have two cores for themselves: what else runs on the machine is in the numbers.

    Where NVML finds a GPU it is "large on a GPU" instead: see `bench_large`.
    """
    del copy
    if find_gpus()[0]:
        return bench_large(quick)
    recipe = Recipe(steps=15 if quick else 40, **SETTINGS)
    seconds: dict[str, list[float]] = {"bare DDP loop": [], "trainer, 2 ranks": [], "trainer, 1 rank": []}
    losses = {}
    with open_cluster("local", num_workers=2) as two, open_cluster("local", num_workers=1) as one:
        for _ in range(2 if quick else 5):
            for name in seconds:
                if name == "bare DDP loop":
                    steps, losses[name] = bare_loop(two, recipe)
                else:
                    cluster = one if name.endswith("1 rank") else two
                    result = QuantumTrainer(
                        MODEL, distributed=True, cluster=cluster, progress=False, **vars(recipe)
                    ).train()
                    tokens = recipe.batch_size * recipe.num_tokens
                    steps = [tokens / row["tokens_per_second"] for row in result.metrics[5:]]
                    losses[name] = result.loss
                seconds[name].append(median(steps))
    rows: list[dict[str, Any]] = []
    for case, method, baseline in (
        ("overhead", "trainer, 2 ranks", "bare DDP loop"),
        ("ranks", "trainer, 2 ranks", "trainer, 1 rank"),
    ):
        for name in (baseline, method):
            ratio = median(seconds[baseline]) / median(seconds[name])
            error = abs(losses[name] / losses[baseline] - 1)
            check = "pass" if error <= ALLOWED_LOSS else f"losses are {error:.2g} apart"
            least = 1 / (1 + ALLOWED_OVERHEAD) if case == "overhead" else WANTED_SPEEDUP
            if name == method and check == "pass" and ratio < least:
                check = f"ratio {ratio:.2f} is below {least:.2f}"
            rows.append({
                "case": case, "method": name, "seconds": median(seconds[name]), "low": min(seconds[name]),
                "high": max(seconds[name]), "baseline": baseline, "ratio": ratio if error <= ALLOWED_LOSS else None,
                "error": error, "check": check,
                "tokens_per_second": recipe.batch_size * recipe.num_tokens / median(seconds[name]),
            })  # fmt: skip
    print(
        f"{'case':<10}{'method':<18}{'ms/step':>9}{'(low–high)':>18}{'tokens/s':>10}{'ratio':>8}{'loss off by':>13}  check"
    )
    for row in rows:
        span = f"({1e3 * row['low']:.1f}–{1e3 * row['high']:.1f})"
        shown = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(f"{row['case']:<10}{row['method']:<18}{1e3 * row['seconds']:>9.1f}{span:>18}{row['tokens_per_second']:>10,.0f}"
              f"{shown:>8}{row['error']:>13.1g}  {row['check']}")  # fmt: skip
    return rows


def bench_large(
    quick: bool, kind: str = "cuda", config: ReferenceConfig = LARGE, **settings: Any
) -> list[dict[str, Any]]:
    """Tokens a second of a large model on one GPU through dask-cuda, bf16: exact attention against `systematic` draws.

    Rows as of `bench_training`; `error` is the relative distance of the losses' means over the last five steps, `baseline`
    "exact", and there are `parameters`, `memory_bytes` (the most that tensors took) and `device` besides.
    """
    asked = {
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
    rows: list[dict[str, Any]] = []
    with open_cluster(kind, num_workers=1) as cluster:
        device = cluster.client.submit(device_in_words).result()
        for method, draws in (("exact", None), ("systematic, S=64", 64)):
            torch.manual_seed(0)
            model = ReferenceModel(config)
            sampler = {"sampler": "systematic", "num_samples": draws} if draws else {"sampler": "exact"}
            result = QuantumTrainer(
                model, distributed=True, cluster=cluster, progress=False, **asked, **sampler
            ).train()
            timed = result.metrics[5:]
            seconds = [asked["batch_size"] * asked["num_tokens"] / row["tokens_per_second"] for row in timed]
            loss = sum(row["loss"] for row in result.metrics[-5:]) / 5
            rows.append({
                "case": "large on a GPU", "method": method, "seconds": median(seconds), "low": min(seconds),
                "high": max(seconds), "baseline": "exact", "loss": loss,
                "tokens_per_second": asked["batch_size"] * asked["num_tokens"] / median(seconds),
                "parameters": sum(p.numel() for p in model.parameters()),
                "memory_bytes": max(row["memory_bytes"] for row in result.metrics),
                "held_out_bits_per_byte": result.metrics[-1].get("held_out_bits_per_byte_exact"), "device": device,
            })  # fmt: skip
    for row in rows:
        row["error"] = abs(row["loss"] / rows[0]["loss"] - 1)
        row["check"] = (
            "pass" if row["error"] <= ALLOWED_GAP else f"the loss is {row['error']:.0%} from exact training's"
        )
        row["ratio"] = rows[0]["seconds"] / row["seconds"] if row["check"] == "pass" else None
    print(
        f"{device}; {rows[0]['parameters'] / 1e6:.0f} M parameters, {asked['batch_size']} × {asked['num_tokens']} tokens a step"
    )
    print(f"{'method':<18}{'ms/step':>9}{'tokens/s':>10}{'ratio':>7}{'GB':>6}{'loss':>7}  check")
    for row in rows:
        shown = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        print(f"{row['method']:<18}{1e3 * row['seconds']:>9.1f}{row['tokens_per_second']:>10,.0f}{shown:>7}"
              f"{row['memory_bytes'] / 1e9:>6.1f}{row['loss']:>7.3f}  {row['check']}")  # fmt: skip
    return rows


def device_in_words() -> str:
    """Of the worker that runs this."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    p = torch.cuda.get_device_properties(0)
    return f"{p.name}, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}"


def bare_loop(cluster: Cluster, recipe: Recipe) -> tuple[list[float], float]:
    """Seconds of each step but the first five, and the last loss, of DDP as torch's tutorial writes it, on the same batches."""
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
            recipe,
            workers=[w],
            allow_other_workers=False,
            pure=False,
        )
        for rank, w in enumerate(workers)
    ]
    for future in as_completed(futures):  # the first error, while the other rank still waits
        future.result()
    ends = cluster.client.gather(futures)
    return ends[0][0], sum(loss for _, loss in ends) / len(ends)


def bare_rank(model_name: str, rank: int, world: int, port: int, recipe: Recipe) -> tuple[list[float], float]:
    """One rank of the bare loop."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        tokens = open_tokens("reference", recipe.num_tokens)
        order = SequenceOrder(tokens.training, recipe.num_tokens, stream_seed(recipe.seed, ORDER))
        module = make_model(model_name, recipe.seed)
        model = torch.nn.parallel.DistributedDataParallel(module)
        matrices = [p for p in module.parameters() if p.ndim >= 2]
        rest = [p for p in module.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip
        each, seconds, last = recipe.batch_size // world, [], 0.0
        for step in range(recipe.steps):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * recipe.rate(step)
            first = step * recipe.batch_size + rank * each
            batch = order.sequences(range(first, first + each))
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            last = loss.item()
            seconds.append(time.perf_counter() - started)
        return seconds[5:], last
    finally:
        leave_group()
