"""Samplers turn rows of logits into draws: one file per method, the interface in `base.py`."""

from __future__ import annotations

from ..errors import DtypeError, unknown_name
from .base import Sampler
from .exact import ExactSampler
from .monte_carlo import MonteCarloSampler
from .stratified import StratifiedSampler
from .systematic import SystematicSampler

SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls for cls in (ExactSampler, MonteCarloSampler, StratifiedSampler, SystematicSampler)
}
"""Every sampler that a name alone can make."""


def make_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name, or the sampler itself.

    Raises
    ------
    ArgumentError, DtypeError
        If no sampler has that name; if the object cannot draw.
    """
    if not isinstance(sampler, str):
        if not callable(getattr(sampler, "draw", None)):
            raise DtypeError(
                f"sampler={sampler!r} is neither a sampler's name nor an object with a draw method."
            )
        return sampler
    if sampler not in SAMPLERS:
        raise unknown_name("sampler", sampler, SAMPLERS)
    return SAMPLERS[sampler]()


__all__ = [
    "SAMPLERS",
    "ExactSampler",
    "MonteCarloSampler",
    "Sampler",
    "StratifiedSampler",
    "SystematicSampler",
    "make_sampler",
]
