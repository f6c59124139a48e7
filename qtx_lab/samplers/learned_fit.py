"""Fits the maps of a low-rank proposal to attention rows, by the variance of what is estimated from it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DtypeError
from ..problem import AttentionProblem
from .learned_proposal import Maps, best_low_rank, mix, project, renyi

Cancel = threading.Event | Callable[[], bool]


@dataclass(frozen=True)
class FitHistory:
    """What `LearnedImportanceSampler.fit` did.

    Parameters
    ----------
    steps : tuple of int
        Steps of the optimiser done at each evaluation.
    objective : tuple of float
        The mean over the evaluated rows of what is minimised, in nats.
    chi_square : tuple of float
        The mean over the same rows of log(1 + chi^2(p || q)), in nats, whatever is minimised.
    best_step : int
        The step whose parameters were kept: the one of the smallest objective.
    cancelled : bool
        Whether `cancel` ended it.
    """

    steps: tuple[int, ...]
    objective: tuple[float, ...]
    chi_square: tuple[float, ...]
    best_step: int
    cancelled: bool


def start(maps: Maps, problem: AttentionProblem, initialise: str, generator: torch.Generator | None) -> None:
    """Set the maps in place to where training starts: "low-rank", "random" (orthogonal), or "current"."""
    heads, e, r = maps[0].shape
    if initialise == "low-rank":
        q, k = (
            x.unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2) for x in (problem.queries, problem.keys)
        )
        a, b = best_low_rank(q, k, r)
    elif initialise == "random":
        device = "cpu" if generator is None else generator.device
        gauss = torch.randn(heads, e, r, generator=generator, device=device, dtype=torch.float64)
        a = b = torch.linalg.qr(gauss).Q * (e / r) ** 0.5  # E[<A q, B k>] = q . k
    else:
        return
    for parameter, value in zip(maps, (a, torch.zeros_like(maps[1]), b), strict=True):
        parameter.copy_(value)


@dataclass(frozen=True)
class _Objective:
    """What is minimised, of some rows; fields as the arguments of `fit_maps`."""

    maps: Maps
    problem: AttentionProblem
    defensive: float
    use_values: bool
    num_samples: int | None
    independent: bool

    def __call__(self, window: int, some: Tensor) -> tuple[Tensor, Tensor]:
        """(what is minimised, log(1 + chi^2)) of some rows of a window, (heads, rows) or (heads,)."""
        problem, heads = self.problem, self.maps[0].shape[0]
        which = slice(window * heads, (window + 1) * heads)
        q, k = problem.queries[which, some], problem.keys[which]
        hidden = None
        if problem.is_causal:
            hidden = torch.arange(problem.num_keys, device=q.device) > (some % problem.length)[:, None]

        def logits(q: Tensor, k: Tensor) -> Tensor:
            x = torch.bmm(q * problem.scale, k.mT)
            return x if hidden is None else x.masked_fill(hidden, -torch.inf)

        log_p = logits(q, k).log_softmax(-1)
        log_q = mix(logits(*project(q, k, self.maps)), self.defensive)
        chi = renyi(log_p, log_q)
        distance = log_distance(problem.values[which], log_p) if self.use_values else None
        ours, best = (renyi(log_p, x, distance, self.num_samples, self.independent) for x in (log_q, log_p))
        return (ours.logsumexp(-1) - best.logsumexp(-1) if self.use_values else ours - best), chi


def fit_maps(
    maps: Maps,
    problem: AttentionProblem,
    *,
    defensive: float,
    use_values: bool,
    num_samples: int | None,
    independent: bool,
    steps: int,
    lr: float,
    batch_rows: int,
    generator: torch.Generator | None,
    progress: bool,
    cancelled: Callable[[], bool],
) -> FitHistory:
    """Adam on the maps, in place, which end as the best that was found on rows that no step trains on."""
    device = "cpu" if generator is None else generator.device
    heads, length = maps[0].shape[0], problem.shape[1]
    windows = problem.shape[0] // heads
    order = torch.randperm(windows * length, generator=generator, device=device).to(problem.queries.device)
    held = order[: min(8 * batch_rows, max(1, len(order) // 5))]
    pool, test = (by_window(x, windows, length) for x in (order[len(held) :], held))
    pool = pool or test
    optimizer = torch.optim.Adam(
        [
            {"params": [p], "lr": lr * max(float(like.detach().square().mean().sqrt()), 1e-3)}
            for p, like in zip(maps, (maps[0], maps[0], maps[2]), strict=True)
        ],
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))

    objective = _Objective(maps, problem, defensive, use_values, num_samples, independent)
    best, best_step, done, stopped = math.inf, 0, 0, False
    history: list[tuple[int, float, float]] = []
    state: list[Tensor] = []

    def record() -> None:
        nonlocal best, best_step, state
        with torch.no_grad():
            parts = [objective(window, some) for window, some in test]
            loss, chi = (float(torch.cat([part[i].flatten() for part in parts]).mean()) for i in (0, 1))
        history.append((done, loss, chi))
        if not state or loss < best:
            best, best_step, state = loss, done, [p.detach().clone() for p in maps]

    record()
    with tqdm(total=steps, desc="fitting the proposal", unit="step", disable=not progress) as bar:
        try:
            while done < steps and not (stopped := cancelled()):
                window, here = pool[int(torch.randint(len(pool), (), generator=generator, device=device))]
                size = (min(batch_rows, len(here)),)
                some = torch.randint(len(here), size, generator=generator, device=device)
                loss, _ = objective(window, here[some.to(here.device)])
                optimizer.zero_grad()
                loss.mean().backward()
                optimizer.step()
                schedule.step()
                done += 1
                bar.update()
                if done % 10 == 0 or done == steps:
                    record()
                    bar.set_postfix(objective=f"{history[-1][1]:.4f}", refresh=False)
        finally:  # also where the user interrupts the kernel
            with torch.no_grad():
                for p, saved in zip(maps, state, strict=True):
                    p.copy_(saved)
                    p.grad = None
    at, losses, chis = zip(*history, strict=True)
    return FitHistory(at, losses, chis, best_step, stopped)


def by_window(rows: Tensor, windows: int, length: int) -> list[tuple[int, Tensor]]:
    """(window, its rows) of each window that has some: a step takes one, to project its keys once."""
    rows = rows.sort().values
    counts = torch.bincount(rows // length, minlength=windows).tolist()
    return [(w, x) for w, x in enumerate((rows % length).split(counts)) if len(x)]


def log_distance(v: Tensor, log_p: Tensor) -> Tensor:
    """log |v_j - o|^2, (heads, rows, keys), floored at 1e-9 of the values' mean square."""
    o = torch.bmm(log_p.exp(), v)
    distance = v.square().sum(-1)[:, None] - 2 * torch.bmm(o, v.mT) + o.square().sum(-1, keepdim=True)
    floor = 1e-9 * v.square().sum(-1).mean() + torch.finfo(v.dtype).tiny
    return distance.clamp_min(floor).log()


def asker(cancel: Cancel | None) -> Callable[[], bool]:
    """A function that asks `cancel`, whatever it is."""
    if cancel is None:
        return lambda: False
    if isinstance(cancel, threading.Event):
        return cancel.is_set
    if not callable(cancel):
        raise DtypeError(
            f"cancel is a {type(cancel).__name__}; it must be a threading.Event or a function without "
            "arguments."
        )
    return lambda: bool(cancel())
