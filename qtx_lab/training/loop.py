"""The loop in which every model of the lab is trained: learning rate, gradient, clipping, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import RunFailed


class NotFinite(RunFailed):
    """A loss or a gradient is NaN or infinite; the parameters are as they were before the step."""


def run_steps(
    steps: Iterable[int],
    gradient: Callable[[int], float],
    parameters: Sequence[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    rate: Callable[[int], float],
    clip_norm: float,
    after: Callable[[int, float, float], bool],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Train: in each step set the learning rates, compute the gradient, clip it, and let the optimizers step.

    Parameters
    ----------
    steps : iterable of int
    gradient : callable
        `gradient(step)` leaves the loss's gradient in the parameters, scaled where there is a scaler, and
        returns the loss, the same on every rank.
    parameters : sequence of nn.Parameter
        The parameters whose gradients are clipped together.
    optimizers : sequence
        Each of their groups has its peak learning rate as `peak_lr`.
    rate : callable
        `rate(step)` is the share of the peak learning rate.
    clip_norm : float
        Length to which longer gradients are shortened; 0: never.
    after : callable
        `after(step, loss, norm)` is called after each step, with the gradient's length before clipping; True
        ends the training.
    scaler : torch.amp.GradScaler, optional
        Scales the loss, and leaves out steps whose gradients are not finite.

    Raises
    ------
    NotFinite
        If the loss or, without a scaler, the gradient is not finite; before the parameters are changed.
    """
    for step in steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate(step)
        loss = gradient(step)
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        norm = _full_tensor(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)).item()
        if not math.isfinite(loss) or (scaler is None and not math.isfinite(norm)):
            raise NotFinite(f"step {step}: the loss is {loss}, the gradient's length {norm}.")
        for optimizer in optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
        if after(step, loss, norm):
            return


def _full_tensor(x: Tensor) -> Tensor:
    """The tensor on every rank, also where each rank holds a part of it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _local_part(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def squared_sums(
    names: Sequence[str], first: Sequence[Tensor], second: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(|first - second|^2 / 2, first . second) of two gradients by layer, of the parts that this rank holds.

    Where both are of the same batch with independent draws, the former estimates the sampling variance of one
    of them, the latter the squared length of their mean; both without bias.

    Parameters
    ----------
    names : sequence of str
        Name of each parameter; `layer_of` says which layer it belongs to.
    first, second : sequence of Tensor
        The gradients of each parameter.
    """
    sums: dict[str, list[Tensor]] = {}
    for name, g, h in zip(names, first, second, strict=True):
        g, h = _local_part(g).double(), _local_part(h).double()
        sums.setdefault(layer_of(name), []).append(torch.stack(((g - h).square().sum() / 2, (g * h).sum())))
    return {layer: tuple(torch.stack(parts).sum(0)) for layer, parts in sums.items()}


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, else its first part.

    >>> layer_of("blocks.3.query.weight"), layer_of("embedding.weight")
    ('blocks.3', 'embedding')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]
