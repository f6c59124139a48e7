"""Samplers turn rows of logits into draws: one file per method, the interface in `base.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..errors import ArgumentError, DtypeError, unknown_name
from .base import InversionSampler, Sampler
from .baselines.santa import SantaSampler
from .baselines.top_k import TopKSampler
from .baselines.vattention import VAttentionSampler
from .exact import ExactSampler
from .head_tail import HeadTailSampler
from .learned import LearnedImportanceSampler
from .monte_carlo import MonteCarloSampler
from .quasi_monte_carlo import SEQUENCES, QuasiMonteCarloSampler
from .stratified import StratifiedSampler
from .systematic import SystematicSampler
from .value_order import value_order

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "exact": ExactSampler,
    "monte-carlo": MonteCarloSampler,
    "stratified": StratifiedSampler,
    "systematic": SystematicSampler,
    **{name: partial(QuasiMonteCarloSampler, name) for name in SEQUENCES},
    "head-tail": HeadTailSampler,
    "learned": LearnedImportanceSampler,
}
"""Every sampler that a name alone can make."""

BASELINES: dict[str, Callable[[], Sampler]] = {
    "santa-prop": SantaSampler,
    "santa-prop-stratified": partial(SantaSampler, points="stratified"),
    "santa-flash": partial(SantaSampler, "fixed"),
    "vattention": VAttentionSampler,
    "oracle-top-k": TopKSampler,
}
"""What others do, to compare with; some are biased. `make_sampler` knows these names too."""


def make_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of that name, or the sampler itself.

    Raises
    ------
    ArgumentError, DtypeError
        If no sampler has that name; if the object cannot draw.
    """
    if not isinstance(sampler, str):
        missing = [name for name in ("name", "independent", "draw") if not hasattr(sampler, name)]
        if missing or isinstance(sampler, type):
            what = "a class, not an object" if isinstance(sampler, type) else f"without {', '.join(missing)}"
            raise DtypeError(
                f"sampler={sampler!r} is {what}: it must be a name or an object with name, independent and draw."
            )
        return sampler
    known = SAMPLERS | BASELINES
    if sampler == "circuit":
        raise ArgumentError(
            "sampler='circuit' needs to know where circuits run: hand in CircuitSampler(backend)."
        )
    if sampler not in known:
        raise unknown_name("sampler", sampler, known)
    return known[sampler]()


__all__ = [
    "BASELINES",
    "SAMPLERS",
    "ExactSampler",
    "HeadTailSampler",
    "InversionSampler",
    "LearnedImportanceSampler",
    "MonteCarloSampler",
    "QuasiMonteCarloSampler",
    "Sampler",
    "SantaSampler",
    "StratifiedSampler",
    "SystematicSampler",
    "TopKSampler",
    "VAttentionSampler",
    "make_sampler",
    "value_order",
]
