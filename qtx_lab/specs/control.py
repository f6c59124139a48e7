"""`ControlSpec`: which control variates correct an estimate."""

from __future__ import annotations

from pydantic import field_validator

from ..controls import Control, make_control
from .base import Spec
from .fields import ControlName, each_once, field


class ControlSpec(Spec):
    """Which control variates correct an estimate.

    Examples
    --------
    >>> [control.name for control in ControlSpec(names=("performer", "topk")).build()]
    ['performer', 'topk']
    """

    names: tuple[ControlName, ...] = field(
        (),
        "Surrogates whose sums are known, each named once; without any, the estimate stays as it is.",
        "name",
        "control variates",
        label="corrected by",
    )

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return each_once("names", names)

    def build(self) -> list[Control] | None:
        """The `control_variate` of `sampled_attention`."""
        return [make_control(name) for name in self.names] or None
