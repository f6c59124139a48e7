"""Learning rate, draws and noise while a model is trained, as functions of the spec and the step."""

from __future__ import annotations

import math

from ..specs import TrainSpec

NOISE_TO_SIGNAL = 0.1
"""The sampling variance of a step's gradient, over its squared length, at which "signal-to-noise" aims."""


def learning_rate_share(spec: TrainSpec, step: int) -> float:
    """Share of the peak learning rate at a step: a linear warm-up, then half a cosine that ends at 0."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def scheduled_draws(spec: TrainSpec, step: int, first: int, current: int) -> int:
    """Draws of a row at a step.

    Parameters
    ----------
    spec : TrainSpec
    step : int
        From 0.
    first : int
        Draws at the first step.
    current : int
        Draws that were measured to be needed, which "signal-to-noise" keeps until it measures again.
    """
    last = spec.final_num_samples
    if spec.draws_schedule == "signal-to-noise":
        return current
    if spec.draws_schedule == "constant" or last is None:
        return first
    progress = step / max(1, spec.steps - 1)
    if spec.draws_schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return round(first + (last - first) * progress)


def needed_draws(spec: TrainSpec, noise_to_signal: float, first: int, current: int) -> int:
    """Draws that bring a measured noise-to-signal ratio to `NOISE_TO_SIGNAL`; it falls as 1 / draws.

    At most twice and at least half of the current draws, and between those of the first step and
    `final_num_samples` (16 times those of the first step where it is None).
    """
    last = 16 * first if spec.final_num_samples is None else spec.final_num_samples
    factor = min(2.0, max(0.5, noise_to_signal / NOISE_TO_SIGNAL))
    low, high = sorted((first, last))
    return min(high, max(low, round(current * factor)))


def scheduled_noise(spec: TrainSpec, step: int) -> float:
    """Part of each row that is uniform at a step."""
    if spec.noise_schedule == "constant":
        return spec.noise
    return spec.noise * (step / max(1, spec.steps - 1))
