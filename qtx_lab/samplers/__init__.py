"""Samplers turn rows of logits into draws: one file per method, the interface in `base.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, quoted, unknown_name
from ..estimates import Draws
from .base import Budget, Design, SampledRows, Sampler, StreamSampler
from .baselines.santa import SantaSampler
from .baselines.top_k import TopKSampler
from .baselines.vattention import VAttentionSampler
from .exact import ExactSampler
from .head_tail import HeadTailSampler
from .inversion_sampler import InversionSampler
from .learned import LearnedImportanceSampler
from .monte_carlo import MonteCarloSampler
from .quasi_monte_carlo import SEQUENCES, QuasiMonteCarloSampler
from .stratified import StratifiedSampler
from .systematic import SystematicSampler

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

_REGISTERED: set[str] = set()
"""The names that `register_sampler` made known."""

BASELINES: dict[str, Callable[[], Sampler]] = {
    "santa-prop": SantaSampler,
    "santa-prop-stratified": partial(SantaSampler, points="stratified"),
    "santa-flash": partial(SantaSampler, "fixed"),
    "vattention": VAttentionSampler,
    "oracle-top-k": TopKSampler,
}
"""What others do, to compare with; some are biased. `make_sampler` knows these names too."""


def register_sampler(name: str, factory: Callable[[], Sampler]) -> None:
    """Make a sampler of your own known by name in this process.

    `sampled_attention`, specs, forms and benchmarks then know the name. Other processes, such as the workers
    of the workbench and of sweeps, do not know it unless they register it themselves: a notebook that is
    swept can do so in a cell.

    Parameters
    ----------
    name : str
    factory : callable
        Makes the sampler without arguments, as a class does.

    Raises
    ------
    ArgumentError
        If the name is taken by a sampler of the lab or is no name.
    DtypeError
        If factory cannot be called.

    Examples
    --------
    >>> class Heaviest(Sampler):
    ...     name = "heaviest"
    ...
    ...     def draw(self, logits, num_samples, *, values=None, generator=None, replicates=1):
    ...         heaviest = logits.argmax(-1, keepdim=True)
    ...         indices = heaviest.expand(*logits.shape[:-1], replicates * num_samples)
    ...         return Draws(indices, torch.full(indices.shape, 1 / indices.shape[-1]), replicates=replicates)
    >>> register_sampler("heaviest", Heaviest)
    >>> make_sampler("heaviest").name
    'heaviest'
    >>> unregister_sampler("heaviest")
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"name={quoted(name)} is not allowed: it must be a text that is not empty.")
    if name == "circuit" or (name in SAMPLERS | BASELINES and name not in _REGISTERED):
        raise ArgumentError(f"name={name!r} is taken by a sampler of the lab: choose another.")
    if not callable(factory):
        raise DtypeError(f"factory is a {type(factory).__name__}; it must make the sampler when called.")
    _REGISTERED.add(name)
    SAMPLERS[name] = factory


def unregister_sampler(name: str) -> None:
    """Forget a name that `register_sampler` made known.

    Raises
    ------
    ArgumentError
        If it did not.
    """
    if name not in _REGISTERED:
        raise unknown_name("name", name, _REGISTERED)
    _REGISTERED.discard(name)
    del SAMPLERS[name]


def make_sampler(sampler: object) -> Sampler:
    """The sampler of that name, or the sampler itself; an object that only draws is wrapped as a `Sampler`.

    Raises
    ------
    ArgumentError, DtypeError
        If no sampler has that name; if the object cannot draw.

    Examples
    --------
    >>> make_sampler("head-tail").unbiased
    True
    """
    if isinstance(sampler, Sampler):
        if not sampler.name or not isinstance(sampler.name, str):
            raise DtypeError(
                f"name={quoted(sampler.name)} of the sampler {quoted(sampler)} is not allowed: it must "
                "be a text."
            )
        return sampler
    if not isinstance(sampler, str):
        return ForeignSampler(sampler)
    known = SAMPLERS | BASELINES
    if sampler == "circuit":
        raise ArgumentError(
            "sampler='circuit' needs to know where circuits run: hand in CircuitSampler(backend)."
        )
    if sampler not in known:
        raise unknown_name("sampler", sampler, known)
    return make_sampler(known[sampler]())


class ForeignSampler(Sampler):
    """An object with `name`, `independent` and `draw` as a `Sampler`; `unbiased` too, where it says so.

    Raises
    ------
    DtypeError
        If it has not got them.
    """

    def __init__(self, wrapped: Any):
        missing = [name for name in ("name", "independent", "draw") if not hasattr(wrapped, name)]
        if missing or isinstance(wrapped, type):
            what = "a class, not an object" if isinstance(wrapped, type) else f"without {', '.join(missing)}"
            raise DtypeError(
                f"sampler={quoted(wrapped)} is {what}: it must be a name or an object with name, independent "
                "and draw."
            )
        self.wrapped, self.name, self.independent = wrapped, wrapped.name, bool(wrapped.independent)
        self.unbiased = bool(getattr(wrapped, "unbiased", False))

    def draw(
        self,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        generator: torch.Generator | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys: see `Sampler.draw`."""
        return self.wrapped.draw(
            logits, num_samples, values=values, generator=generator, replicates=replicates
        )


__all__ = [
    "BASELINES",
    "SAMPLERS",
    "Budget",
    "Design",
    "ExactSampler",
    "HeadTailSampler",
    "InversionSampler",
    "LearnedImportanceSampler",
    "MonteCarloSampler",
    "QuasiMonteCarloSampler",
    "SampledRows",
    "Sampler",
    "SantaSampler",
    "StratifiedSampler",
    "StreamSampler",
    "SystematicSampler",
    "TopKSampler",
    "VAttentionSampler",
    "make_sampler",
    "register_sampler",
    "unregister_sampler",
]
