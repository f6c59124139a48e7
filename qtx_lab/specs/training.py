"""`TrainSpec`: how a language model is trained with sampled attention."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from .base import Spec
from .fields import MAX_SEED, ControlName, Count, Real, SamplerName, Switch, Whole, field
from .heads import DrawnHeads

ModelName = Literal["reference", "reference-untrained", "small", "100m"]
DrawsSchedule = Literal["constant", "linear", "cosine", "signal-to-noise"]
NoiseSchedule = Literal["constant", "linear"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "mixed"]
Parallel = Literal["ddp", "fsdp"]


class TrainSpec(Spec):
    """How a language model is trained with sampled attention; its fields are arguments of `QuantumTrainer`.

    The schedules are functions of the step, in `qtx_lab.training.schedules`.

    Examples
    --------
    >>> TrainSpec(steps=10).arguments()["steps"]
    10
    """

    model: ModelName = field(
        "reference",
        "The shipped model, or one of another shape with random weights.",
        "name",
        "model and text",
    )
    text: str = field(
        "reference",
        '"reference" for Python\'s manual, or the path of a UTF-8 file or of tokens in a .npy file.',
        "path",
        "model and text",
        min_length=1,
    )
    num_tokens: Whole = field(
        256, "Length of a sequence.", "tokens", "model and text", label="sequence", ge=1, le=1_048_576
    )
    sampler: SamplerName | None = field(
        None,
        'Sampler of the attention rows; none: the model\'s own, else systematic; "exact" draws nothing.',
        "name",
        "attention",
    )
    num_samples: Count | None = field(
        None,
        "Draws of each row at the start; none: the model's own number, else 64.",
        "draws",
        "attention",
        label="draws per row",
    )
    control_variate: ControlName | None = field(
        None, "Control variate that corrects the attention; none: no correction.", "name", "attention"
    )
    drawn_heads: DrawnHeads | None = field(
        None,
        "Layers and heads that draw, as 0-2, 3:0, 3:5; the rest is exact. None: all draw.",
        "layers and heads",
        "attention",
        label="drawn heads",
        min_length=1,
    )
    draws_schedule: DrawsSchedule = field(
        "constant",
        "How the draws go to their final number; signal-to-noise: as many as the gradient's noise needs.",
        "name",
        "attention",
    )
    final_num_samples: Count | None = field(
        None,
        "Draws of each row at the end, or the limit of signal-to-noise; none: as at the start, or 16 times.",
        "draws",
        "attention",
        label="draws at the end",
    )
    noise: Real = field(
        0.0,
        "Part of each row that is replaced by the uniform distribution, as on a noisy device.",
        "probability",
        "attention",
        ge=0,
        le=1,
    )
    noise_schedule: NoiseSchedule = field(
        "constant", "Whether the noise stays the same, or rises from 0.", "name", "attention"
    )
    steps: Whole = field(200, "Steps of the optimizer.", "steps", "optimizer", ge=1, le=100_000_000)
    batch_size: Whole = field(
        8, "Sequences of a step, over all ranks.", "sequences", "optimizer", ge=1, le=1_048_576
    )
    accumulation: Whole = field(
        1,
        "Parts into which each rank divides its share of a batch, to need less memory.",
        "parts",
        "optimizer",
        ge=1,
        le=65_536,
    )
    local_steps: Whole = field(
        1,
        "Steps that each part of a batch trains a replica alone between exchanges of weights (DiLoCo); 1: "
        "every step exchanges gradients.",
        "steps",
        "optimizer",
        ge=1,
        le=100_000,
    )
    learning_rate: Real = field(
        1e-3, "Learning rate of AdamW at its peak.", "a step", "optimizer", gt=0, le=10
    )
    warmup_steps: Whole = field(
        50,
        "Steps in which the learning rate rises to its peak; then it falls as a cosine.",
        "steps",
        "optimizer",
        ge=0,
        le=100_000_000,
    )
    weight_decay: Real = field(
        0.1, "Weight decay of AdamW, for matrices.", "a step and rate", "optimizer", ge=0, le=10
    )
    clip_norm: Real = field(
        1.0, "Longer gradients are shortened to this length; 0: never.", "norm", "optimizer", ge=0, le=1e6
    )
    precision: Precision = field(
        "auto",
        "mixed: bf16, or fp16 on a GPU without it; auto: mixed on GPUs, fp32 on CPUs.",
        "name",
        "speed",
    )
    compile: Switch = field(False, "Compile the model.", "yes or no", "speed")
    parallel: Parallel = field(
        "ddp", "ddp: each rank holds the whole model; fsdp: each holds a part of it.", "name", "speed"
    )
    validate_every: Whole = field(
        100,
        "Steps between validations on held-out text; 0: only at the end.",
        "steps",
        "record",
        ge=0,
        le=100_000_000,
    )
    checkpoint_every: Whole = field(
        100, "Steps between checkpoints; 0: only at the end.", "steps", "record", ge=0, le=100_000_000
    )
    keep_checkpoints: Whole = field(
        2, "How many of the latest checkpoints are kept.", "checkpoints", "record", ge=1, le=1000
    )
    seed: Whole = field(0, "Seed of every random number.", "number", "record", ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.noise and self.sampler == "exact":
            raise ValueError(
                f"noise={self.noise:g} is not allowed with sampler='exact': noise changes draws, and exact "
                "attention draws nothing."
            )
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "precision='fp16' is not allowed with parallel='fsdp', whose ranks would each scale the loss "
                "by another factor: use bf16, or parallel='ddp'."
            )
        if self.local_steps > 1:
            self._check_local_steps()
        return self

    def _check_local_steps(self) -> None:
        with_it = f"is not allowed with local_steps={self.local_steps}"
        if self.parallel == "fsdp":
            raise ValueError(f"parallel='fsdp' {with_it}: each rank holds a whole replica.")
        if self.precision == "fp16":
            raise ValueError(f"precision='fp16' {with_it}: replicas would each scale the loss: use bf16.")
        if self.draws_schedule == "signal-to-noise":
            raise ValueError(
                f"draws_schedule='signal-to-noise' {with_it}: no step has the gradient of the whole batch."
            )
        intervals = {"validate_every": self.validate_every, "checkpoint_every": self.checkpoint_every}
        for name, every in intervals.items():
            if every % self.local_steps:
                raise ValueError(
                    f"{name}={every} {with_it}: the weights are common only after an exchange, so it must be "
                    "0 or a multiple."
                )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `QuantumTrainer` that this spec decides."""
        return dict(self)
