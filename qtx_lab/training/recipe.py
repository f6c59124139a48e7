"""What a training run is told, checked before any work, and its schedules: functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ..checks import MAX_COUNT, check_count
from ..controls import make_control
from ..errors import ArgumentError, DtypeError, unknown_name
from ..samplers import Sampler, make_sampler

DRAWS_SCHEDULES = ("constant", "linear", "cosine", "signal-to-noise")
NOISE_SCHEDULES = ("constant", "linear")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "mixed")
PARALLEL = ("ddp", "fsdp")
NOISE_TO_SIGNAL = 0.1
"""What "signal-to-noise" aims at: the sampling variance of a step's gradient over its squared length."""
RECORDING = ("compile", "parallel", "validate_every", "checkpoint_every", "keep_checkpoints")
"""Settings that may differ when a run is resumed: they change no number but for rounding."""


@dataclass(frozen=True)
class Recipe:
    """The settings of `QuantumTrainer`.

    Parameters
    ----------
    num_tokens : int
        Length of a sequence.
    sampler : str or Sampler, optional
        Of the attention rows; "exact" trains without sampling. Where None: what the model's own
        `QuantumMultiheadAttention` modules say, "systematic" for other attention.
    num_samples : int, optional
        Draws of a row at the start; where None, those of the model's own modules, else 64.
    control_variate : str, optional
        As for `sampled_attention`.
    draws_schedule : str
        How the draws go from `num_samples` to `final_num_samples`: "constant", "linear", "cosine", or
        "signal-to-noise": whenever the sampling variance of the gradient is measured, the draws become as many as bring
        it to a tenth of the gradient's squared length, at most doubled or halved, from `num_samples` to
        `final_num_samples` (16 times as many where None).
    final_num_samples : int, optional
    noise : float
        Part of each row that is the uniform distribution over its visible keys, from 0 to 1, as on a noisy device.
    noise_schedule : str
        "constant", or "linear": from 0 up to `noise`.
    steps : int
        Steps of the optimizer.
    batch_size : int
        Sequences of a step, all ranks together.
    accumulation : int
        Parts in which a rank works off its share of a batch.
    learning_rate : float
        Of AdamW at its peak, after `warmup_steps`; then it falls as a cosine to 0.
    warmup_steps : int
    weight_decay : float
        Of AdamW, for parameters with two dimensions or more.
    clip_norm : float
        Longer gradients are shortened to this; 0: never.
    precision : str
        "fp32", "bf16" (autocast), "fp16" (autocast with a loss scaler), "mixed" (bf16, or fp16 on a GPU without it), or
        "auto": "mixed" on GPUs, "fp32" on CPUs.
    compile : bool
        `torch.compile` the model; attention that draws runs between the graphs.
    parallel : str
        "ddp", or "fsdp": `fully_shard` of each block.
    validate_every, checkpoint_every : int
        Steps between them; 0: only at the end.
    keep_checkpoints : int
        The latest that are kept.
    seed : int

    Raises
    ------
    ArgumentError, DtypeError
        If a setting is not allowed.
    """

    num_tokens: int = 256
    sampler: str | Sampler | None = None
    num_samples: int | None = None
    control_variate: str | None = None
    draws_schedule: str = "constant"
    final_num_samples: int | None = None
    noise: float = 0.0
    noise_schedule: str = "constant"
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "auto"
    compile: bool = False
    parallel: str = "ddp"
    validate_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "steps", "batch_size", "accumulation", "keep_checkpoints"):
            check_count(name, getattr(self, name))
        for name in ("num_samples", "final_num_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("warmup_steps", "validate_every", "checkpoint_every", "seed"):
            value, most = getattr(self, name), 2**63 - 1 if name == "seed" else MAX_COUNT
            if type(value) is not int or not 0 <= value <= most:
                raise ArgumentError(
                    f"{name}={value!r} is not allowed: it must be a whole number from 0 to {most}."
                )
        for name, greatest in (("learning_rate", 10), ("weight_decay", 10), ("clip_norm", 1e6), ("noise", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= greatest:
                raise ArgumentError(
                    f"{name}={value!r} is not allowed: it must be a number from 0 to {greatest:g}."
                )
        for name, allowed in (
            ("draws_schedule", DRAWS_SCHEDULES),
            ("noise_schedule", NOISE_SCHEDULES),
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
        ):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        if type(self.compile) is not bool:
            raise ArgumentError(f"compile={self.compile!r} is not allowed: it must be True or False.")
        if self.control_variate is not None:
            try:
                make_control(self.control_variate)
            except (ArgumentError, DtypeError) as error:
                raise type(error)(
                    f"control_variate={self.control_variate!r} is not allowed: {error}"
                ) from None
        if self.sampler is not None:
            made = make_sampler(self.sampler)
            if self.noise and made.name == "exact":
                raise ArgumentError("noise is what happens to draws: sampler='exact' draws none.")
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ArgumentError(
                "precision='fp16' is not allowed with parallel='fsdp', whose ranks would scale losses apart: "
                "use bf16, or parallel='ddp'."
            )

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then half a cosine to 0 at the end."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        part = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * part))

    def draws(self, step: int, first: int, now: int) -> int:
        """Draws of a row at a step, where the first step has `first`, and this one `now` if nothing is planned."""
        last = self.final_num_samples
        if self.draws_schedule == "signal-to-noise":
            return now
        if self.draws_schedule == "constant" or last is None:
            return first
        part = step / max(1, self.steps - 1)
        if self.draws_schedule == "cosine":
            part = 0.5 * (1 - math.cos(math.pi * part))
        return round(first + (last - first) * part)

    def draws_for(self, noise_to_signal: float, first: int, now: int) -> int:
        """Draws that bring a measured noise-to-signal ratio to `NOISE_TO_SIGNAL`, as variance falls as 1 / draws."""
        most = 16 * first if self.final_num_samples is None else self.final_num_samples
        factor = min(2.0, max(0.5, noise_to_signal / NOISE_TO_SIGNAL))
        low, high = sorted((first, most))
        return min(high, max(low, round(now * factor)))

    def noise_at(self, step: int) -> float:
        """Noise at a step."""
        rising = self.noise_schedule == "linear"
        return self.noise * (step / max(1, self.steps - 1) if rising else 1)

    def identity(self) -> dict[str, Any]:
        """The settings that decide numbers, as plain JSON types: a checkpoint is resumed only under the same."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in RECORDING}
        return {**settings, "sampler": getattr(self.sampler, "name", self.sampler)}
