"""`SamplerSpec`: which sampler draws, how many draws a row gets, and how often they are repeated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ..samplers import Sampler, make_sampler
from .base import Spec
from .fields import Count, Real, SamplerName, Whole, field, real_number


class SamplerSpec(Spec):
    """Which sampler draws, how many draws a row gets, and how often they are repeated.

    Examples
    --------
    >>> SamplerSpec(tolerance=0.05).num_samples is None
    True
    """

    name: SamplerName = field(
        "systematic", "The method that turns a row of logits into draws.", "name", "sampler", label="sampler"
    )
    num_samples: Count | None = field(
        64,
        "Draws of each row in each repetition; none where a tolerance is given instead.",
        "draws",
        "sampler",
        label="draws per row",
    )
    tolerance: (
        Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=10), BeforeValidator(real_number)]
        | None
    ) = field(
        None,
        "Instead of a count: each row gets as many draws as keep its output's relative error below this.",
        "relative error",
        "sampler",
        instead_of="num_samples",
        start="0.1",
    )
    confidence: Real = field(
        0.95, "Probability with which the tolerance is kept.", "probability", "sampler", ge=0.5, lt=1
    )
    replicates: Whole = field(
        1,
        "Independent repetitions; with 2 or more every sampler has error bars.",
        "repetitions",
        "sampler",
        ge=1,
        le=1024,
    )

    @model_validator(mode="before")
    @classmethod
    def _count_or_tolerance(cls, fields: Any) -> Any:
        """A tolerance takes the place of the number of draws; one of the two is needed."""
        if not isinstance(fields, Mapping):
            return fields
        tolerance, count = fields.get("tolerance"), fields.get("num_samples")
        if tolerance is not None and count is not None:
            raise ValueError(
                f"tolerance={tolerance!r} and num_samples={count!r} exclude each other: give one."
            )
        if tolerance is not None:
            return {**fields, "num_samples": None}
        if "num_samples" in fields and count is None:
            raise ValueError("num_samples=None is not allowed without a tolerance: give one of them.")
        return fields

    def build(self) -> Sampler:
        """The sampler of that name."""
        return make_sampler(self.name)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `sampled_attention` that this spec decides."""
        draws = (
            {"num_samples": self.num_samples}
            if self.tolerance is None
            else {"tolerance": self.tolerance, "confidence": self.confidence}
        )
        return {"sampler": self.build(), **draws, "replicates": self.replicates}
