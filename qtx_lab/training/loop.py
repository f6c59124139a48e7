"""The one loop in which every model of the lab is trained: rate, gradient, clipping, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..errors import RunFailed


class NotFinite(RunFailed):
    """A loss or a gradient is NaN or infinite; the parameters are those of the step before."""


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
    """Train: for each step set the rates, make the gradient, clip it, and step.

    Parameters
    ----------
    steps : iterable of int
    gradient : callable
        `gradient(step)` leaves the loss's gradient in the parameters, scaled where there is a scaler, and returns the
        loss, the same on every rank.
    parameters : sequence of nn.Parameter
        What is clipped together.
    optimizers : sequence
        Each group has its peak rate as `peak_lr`.
    rate : callable
        `rate(step)` is the share of the peak rate.
    clip_norm : float
        0: no clipping.
    after : callable
        `after(step, loss, norm)`, norm before clipping; True ends the training after this step.
    scaler : torch.amp.GradScaler, optional
        Steps with infinities are its business: it leaves them out.

    Raises
    ------
    NotFinite
        Before the parameters are touched.
    """
    for step in steps:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate(step)
        loss = gradient(step)
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        norm = _whole(torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)).item()
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


def _whole(x: Tensor) -> Tensor:
    """A tensor, of whatever ranks hold parts of it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def squared_sums(
    names: Sequence[str], first: Sequence[Tensor], second: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of two gradients, for each layer: (|first - second|^2 / 2, first . second), of the parts that this rank holds.

    Where both are of the same batch and of independent draws, the former estimates the sampling variance of one,
    the latter the squared length of their mean; both without bias.
    """
    found: dict[str, list[Tensor]] = {}
    for name, g, h in zip(names, first, second, strict=True):
        g, h = (x.to_local() if hasattr(x, "to_local") else x for x in (g, h))
        g, h = g.double(), h.double()
        found.setdefault(layer_of(name), []).append(torch.stack(((g - h).square().sum() / 2, (g * h).sum())))
    return {layer: tuple(torch.stack(parts).sum(0)) for layer, parts in found.items()}


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
