"""How attention is estimated: the settings of a call, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_count
from ..controls import Control
from ..errors import ArgumentError
from ..samplers import Budget, Sampler, make_sampler
from .corrections import ControlVariate, make_controls
from .tolerance import Tolerance

DEFAULT_SAMPLES = 64
"""Draws of a row and replicate where neither a number nor a tolerance is given."""


@dataclass(frozen=True)
class AttentionSettings:
    """How attention is estimated: what `sampled_attention` takes besides the problem, checked by `of`.

    Parameters
    ----------
    sampler : Sampler
    budget : Budget
    controls : tuple of Control
    tolerance : Tolerance, optional
        In place of the budget's `num_samples`.
    """

    sampler: Sampler
    budget: Budget
    controls: tuple[Control, ...] = ()
    tolerance: Tolerance | None = None

    @classmethod
    def of(
        cls,
        sampler: str | Sampler = "systematic",
        num_samples: int | None = None,
        replicates: int = 1,
        control_variate: ControlVariate | None = None,
        tolerance: float | None = None,
        confidence: float = 0.95,
    ) -> AttentionSettings:
        """Settings from the arguments of `sampled_attention`.

        Raises
        ------
        ArgumentError, DtypeError
            If one is not allowed, or two exclude each other.
        """
        sampler = make_sampler(sampler)
        if num_samples is not None:
            num_samples = check_count("num_samples", num_samples)
        replicates = check_count("replicates", replicates)
        controls = () if control_variate is None else tuple(make_controls(control_variate))
        if controls and replicates == 1 and sampler.joint:
            raise ArgumentError(
                f"control_variate with sampler={sampler.name!r}, whose rows share their randomness, needs "
                "replicates >= 2: coefficients must come from other draws than those that they correct."
            )
        promise = Tolerance.of(tolerance, confidence, num_samples, sampler)
        if promise is not None and controls and not sampler.exact:
            raise ArgumentError(
                "tolerance and control_variate exclude each other, for only the draws tell how much of the "
                "error a control removes: leave one of them out."
            )
        budget = Budget(DEFAULT_SAMPLES if num_samples is None else num_samples, replicates)
        return cls(sampler, budget, controls, promise)
