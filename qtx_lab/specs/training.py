"""`TrainSpec`: how a language model is trained with sampled attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import model_validator

from .base import Spec
from .fields import MAX_SEED, ControlName, Count, Real, SamplerName, Switch, Whole, field

if TYPE_CHECKING:
    from ..training import QuantumTrainer


class TrainSpec(Spec):
    """How a language model is trained with sampled attention."""

    model: Literal["reference", "reference-untrained", "small", "100m"] = field(
        "reference",
        "The shipped model, or one of another shape with random weights.",
        "name",
        "model and text",
    )
    text: str = field(
        "reference", '"reference" for Python\'s manual, or the path of a UTF-8 file or of tokens in a .npy file.',
        "path", "model and text", min_length=1,
    )  # fmt: skip
    num_tokens: Whole = field(256, "Length of a sequence.", "tokens", "model and text", ge=16, le=1_048_576)
    sampler: SamplerName = field(
        "systematic", 'Sampler of the attention rows; "exact" trains without sampling.', "name", "attention"
    )
    num_samples: Whole = field(64, "Draws of each row at the start.", "draws", "attention", ge=1, le=65_536)
    control_variate: ControlName | None = field(
        None, "What corrects the estimate; none: nothing.", "name", "attention"
    )
    draws_schedule: Literal["constant", "linear", "cosine", "signal-to-noise"] = field(
        "constant",
        "How the draws go to their final number; signal-to-noise: as the gradient asks for it.",
        "name",
        "attention",
    )
    final_num_samples: Count | None = field(
        None, "Draws of each row at the end, the most of signal-to-noise; none: as at the start.", "draws",
        "attention",
    )  # fmt: skip
    noise: Real = field(
        0.0, "Part of each row that is replaced by the uniform distribution, as a noisy device does.",
        "probability", "attention", ge=0, le=1,
    )  # fmt: skip
    noise_schedule: Literal["constant", "linear"] = field(
        "constant", "Whether the noise stays, or rises from 0.", "name", "attention"
    )
    steps: Whole = field(200, "Steps of the optimizer.", "steps", "optimizer", ge=1, le=100_000_000)
    batch_size: Whole = field(
        8, "Sequences of a step, all ranks together.", "sequences", "optimizer", ge=1, le=1_048_576
    )
    accumulation: Whole = field(
        1, "Parts in which a rank's share of a batch is worked off.", "parts", "optimizer", ge=1, le=65_536
    )
    learning_rate: Real = field(1e-3, "Of AdamW, at its peak.", "a step", "optimizer", gt=0, le=10)
    warmup_steps: Whole = field(
        50, "Steps in which the learning rate rises; then it falls as a cosine.", "steps", "optimizer",
        ge=0, le=100_000_000,
    )  # fmt: skip
    weight_decay: Real = field(0.1, "Of AdamW, for matrices.", "a step and rate", "optimizer", ge=0, le=10)
    clip_norm: Real = field(
        1.0, "Longer gradients are shortened to this; 0: never.", "norm", "optimizer", ge=0, le=1e6
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "mixed"] = field(
        "auto", "mixed: bf16, fp16 on a GPU without it; auto: mixed on GPUs, fp32 on CPUs.", "name", "speed"
    )
    compile: Switch = field(False, "Compile the model.", "yes or no", "speed")
    parallel: Literal["ddp", "fsdp"] = field(
        "ddp", "ddp: every rank holds the model; fsdp: a part of it.", "name", "speed"
    )
    validate_every: Whole = field(
        100, "Steps between validations with exact attention; 0: only at the end.", "steps", "record",
        ge=0, le=100_000_000,
    )  # fmt: skip
    checkpoint_every: Whole = field(
        100, "Steps between checkpoints; 0: only at the end.", "steps", "record", ge=0, le=100_000_000
    )
    keep_checkpoints: Whole = field(
        2, "Checkpoints that are kept, the latest.", "checkpoints", "record", ge=1, le=1000
    )
    seed: Whole = field(0, "Seed of every random number.", "number", "record", ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from ..training.recipe import Recipe

        Recipe(**self._recipe())
        return self

    def _recipe(self) -> dict[str, Any]:
        return {name: value for name, value in self if name not in ("model", "text")}

    def build(self, **options: Any) -> QuantumTrainer:
        """The trainer; options are those arguments of `QuantumTrainer` that no spec has (cluster, folder, ...)."""
        from ..training import QuantumTrainer

        return QuantumTrainer(self.model, text=self.text, **self._recipe(), **options)
