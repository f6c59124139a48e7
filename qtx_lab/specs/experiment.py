"""`ExperimentSpec`: which text, head, samplers and numbers of draws the quickstart notebook compares."""

from __future__ import annotations

from pydantic import field_validator

from .base import Spec
from .fields import MAX_SEED, Count, DrawingName, Whole, each_once, field


class ExperimentSpec(Spec):
    """Which text, head, samplers and numbers of draws the quickstart notebook compares.

    Examples
    --------
    >>> spec = ExperimentSpec(layer=5, sample_counts=(8, 16))
    >>> ExperimentSpec.from_yaml(spec.to_yaml()) == spec
    True
    """

    text: str = field(
        "reference",
        '"reference" for the held-out text that is shipped with the model, or the path of a UTF-8 file.',
        "path",
        "model and text",
        min_length=1,
    )
    layer: Whole = field(3, "Layer whose attention is shown.", "index", "attention", ge=0, le=5)
    head: Whole = field(0, "Query head whose attention is shown.", "index", "attention", ge=0, le=7)
    sampler: DrawingName = field("systematic", "Sampler of the attention maps.", "name", "attention")
    samplers: tuple[DrawingName, ...] = field(
        ("monte-carlo", "stratified", "systematic", "head-tail"),
        "Samplers that are compared, each named once.",
        "name",
        "comparison",
        min_length=1,
    )
    sample_counts: tuple[Count, ...] = field(
        (8, 32, 128),
        "Draws of a row at which the samplers are compared, each named once; they are put in rising order.",
        "draws",
        "comparison",
        min_length=1,
    )
    seed: Whole = field(0, "Seed of every random number.", "number", "record", ge=0, le=MAX_SEED)
    num_tokens: Whole = field(512, "Length of a window of text.", "bytes", "model and text", ge=16, le=1024)
    num_windows: Whole = field(
        4,
        "Held-out windows over which the bits per byte are averaged.",
        "windows",
        "model and text",
        ge=1,
        le=1024,
    )

    @field_validator("samplers")
    @classmethod
    def _each_sampler_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once("samplers", names)

    @field_validator("sample_counts")
    @classmethod
    def _rising_counts(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(each_once("sample_counts", counts)))
