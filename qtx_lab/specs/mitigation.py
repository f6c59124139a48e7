"""`MitigationSpec`: what is done about a device's noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..errors import ArgumentError
from .base import Spec
from .fields import Real, Switch, Whole, each_once, field, python_number, real_number

if TYPE_CHECKING:
    from ..mitigation import CircuitMitigation, MitigationPlanner, ProbabilisticErrorCancellation

LEVEL_METHODS = ("zne", "shared-decay", "corrected-decay")
"""The methods that measure at several levels of noise."""


class MitigationSpec(Spec):
    """What is done about a device's noise.

    Outcomes on masked keys and on padding are always thrown away: that costs nothing, so no field is needed.
    A field that the method does not use is refused, unless all fields are given, as by a form or by YAML.

    Examples
    --------
    >>> MitigationSpec(method="zne", noise_levels=(1, 3)).noise_levels
    (1.0, 3.0)
    """

    method: Literal["none", "planner", "zne", "shared-decay", "corrected-decay", "distillation", "pec"] = (
        field(
            "none",
            "planner: rehearse every method on the device's calibration and take the best for the shots.",
            "name",
            "method",
        )
    )
    readout: Switch = field(
        False,
        "Undo readout errors, by a calibration of their own. The planner decides that by itself; every other "
        "method but none begins with yes.",
        "yes or no",
        "method",
    )
    noise_levels: tuple[Real, ...] = field(
        (1.0, 3.0, 5.0),
        "Noise levels of zne and the decays, in rising order; 1 is the device's own noise. The decays use "
        "the lowest and the highest.",
        "times the device's noise",
        "noise levels",
        min_length=1,
        max_length=16,
    )
    extrapolation: Literal["richardson", "linear", "polynomial", "exponential"] = field(
        "linear", "The curve that zne fits through the levels.", "name", "noise levels"
    )
    degree: Whole = field(2, "Degree of zne's polynomial.", "degree", "noise levels", ge=1, le=8)
    scaling: Literal["local", "two-qubit", "global", "model"] = field(
        "local",
        "How the levels are made: by folded gates, or by a simulator's scaled noise model.",
        "name",
        "noise levels",
    )
    instances: Annotated[int, Field(strict=True, ge=2, le=65_536), BeforeValidator(python_number)] | None = (
        field(
            None,
            "Circuits with random Paulis that pec runs for a row; none: a number that grows with the shots.",
            "circuits",
            "cancellation",
            label="random circuits",
        )
    )
    precision: (
        Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, lt=1), BeforeValidator(real_number)]
        | None
    ) = field(
        None,
        "Instead of a number of circuits: pec runs as many as keep every standard error below this.",
        "probability",
        "cancellation",
        instead_of="instances",
        start="0.01",
    )

    @model_validator(mode="before")
    @classmethod
    def _readout_belongs_to_a_method(cls, fields: Any) -> Any:
        if isinstance(fields, Mapping) and "readout" not in fields:
            return {**fields, "readout": fields.get("method", "none") not in ("none", "planner")}
        return fields

    @field_validator("noise_levels")
    @classmethod
    def _rising_levels(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        outside = [level for level in levels if not 0 <= level <= 1000]
        if outside:
            raise ValueError(
                f"noise_levels={list(levels)} is not allowed: {outside[0]:g} is not from 0 to 1000."
            )
        return tuple(sorted(each_once("noise_levels", levels)))

    @model_validator(mode="after")
    def _check_the_levels(self) -> Self:
        if self.instances is not None and self.precision is not None:
            raise ValueError(
                f"instances={self.instances} and precision={self.precision} exclude each other: give one."
            )
        if self.method in LEVEL_METHODS:
            try:
                self.build(num_keys=2)
            except ArgumentError as error:  # it names noise_levels
                raise ValueError(str(error)) from None
        return self

    def unused_fields(self) -> dict[str, str]:
        """The fields of other methods; see `Spec.unused_fields`."""
        chosen, unused = f"with method={self.method!r}", {}
        if self.method == "planner":
            unused["readout"] = f"{chosen}, which decides about readout by itself"
        if self.method not in LEVEL_METHODS:
            for name in ("noise_levels", "scaling"):
                unused[name] = f"{chosen}: it is for {', '.join(LEVEL_METHODS)}"
        if self.method != "zne":
            unused["extrapolation"] = f"{chosen}: it is for zne"
        if self.method != "zne" or self.extrapolation != "polynomial":
            chosen_curve = f" and extrapolation={self.extrapolation!r}" if self.method == "zne" else ""
            unused["degree"] = f"{chosen}{chosen_curve}: it is for zne with extrapolation='polynomial'"
        if self.method != "pec":
            unused |= dict.fromkeys(("instances", "precision"), f"{chosen}: it is for pec")
        return unused

    def build(
        self, num_keys: int | None = None
    ) -> CircuitMitigation | MitigationPlanner | ProbabilisticErrorCancellation | None:
        """The `mitigation` of `CircuitSampler`; None where nothing is done.

        Parameters
        ----------
        num_keys : int, optional
            Length of the rows; only the exponential fit needs it, whose curve ends at 1 / num_keys.

        Raises
        ------
        ArgumentError
            If the exponential fit is asked for without `num_keys`.
        """
        from ..mitigation import (
            CircuitMitigation,
            MitigationPlanner,
            ProbabilisticErrorCancellation,
            SharedDecay,
            TwoCopyLoader,
            ZeroNoiseExtrapolation,
        )

        if self.method == "none":
            return CircuitMitigation() if self.readout else None
        if self.method == "planner":
            return MitigationPlanner()
        if self.method == "pec":
            return ProbabilisticErrorCancellation(
                self.instances, precision=self.precision, readout=self.readout
            )
        if self.method == "distillation":
            return CircuitMitigation(readout=self.readout, loader=TwoCopyLoader())
        inference: ZeroNoiseExtrapolation | SharedDecay
        if self.method == "zne":
            asymptote = 0.0
            if self.extrapolation == "exponential":
                if num_keys is None:
                    raise ArgumentError(
                        "num_keys=None is not allowed: the exponential fit ends at 1 / num_keys."
                    )
                asymptote = 1 / num_keys
            inference = ZeroNoiseExtrapolation(
                self.noise_levels, self.extrapolation, degree=self.degree, asymptote=asymptote
            )
        else:
            ends = sorted({self.noise_levels[0], self.noise_levels[-1]})
            inference = SharedDecay(ends, corrected=self.method == "corrected-decay")
        return CircuitMitigation(inference, self.readout, scaling=self.scaling)
