"""Sampled attention of many queries and its gradients, block by block.

No map of queries by keys is ever in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...streams import Stream
from ..inputs import Inputs
from ..launches import (
    InputArguments,
    StreamArguments,
    launch,
    power_of_two,
    size_class,
)
from ..masses import PAGE
from .reference import Gradients, refuse_unknown
from .triton import backward_kv_kernel, backward_q_kernel, forward_kernel


@dataclass(frozen=True)
class PrefillResult:
    """The sampled output, and what its gradients need besides.

    Parameters
    ----------
    output : Tensor, float32, (N, M, Ev)
    normaliser : Tensor, float32, (N, M)
        The base-2 logarithm of the sum of 2^logit over the row's keys; 0 where none is seen.
    """

    output: Tensor
    normaliser: Tensor

    def log_sum_exp(self, x: Inputs) -> Tensor:
        """The log-sum-exp of each row's natural logits, (N, M); -inf where no key is seen."""
        if x.mask is None:
            return self.normaliser * math.log(2)
        seen = (x.mask if x.mask.dtype == torch.bool else x.mask > -torch.inf).any(-1)
        return (self.normaliser * math.log(2)).masked_fill(~seen.view(self.normaliser.shape), -torch.inf)


def prefill(x: Inputs, num_samples: int, stream: Stream, *, is_causal: bool = False) -> PrefillResult:
    """Sample the output of many queries: unbiased.

    Each page of keys has systematic draws of its own: S times its probability, rounded up or down at random.
    So a page can be drawn again without the others, as the gradients need it. What the draws of a page miss
    of its probability is spread evenly over its keys, as a control variate: only the differences of values
    within a page make noise. All of K is read twice and all of V once, whatever S is. So this serves training
    with the noise of draws, and is not faster than exact attention.

    Parameters
    ----------
    x : Inputs
        As for `decode`, but with a mask and a `first_position` alone, and without caches of 8 bits.
    num_samples : int
        S, the draws of a row, on average.
    stream : Stream
        Of N heads and L positions, on the same device; its first replicate is drawn.
    is_causal : bool
        Query i attends to keys 0 … first_position + i.

    Raises
    ------
    ShapeError
        If the stream does not fit.
    ArgumentError, DtypeError
        If there is anything else: see `reference.refuse_unknown`.
    """
    heads, rows, _, width = x.shape
    output = x.q.new_empty(heads, rows, width, dtype=torch.float32)
    normaliser = x.q.new_empty(heads, rows, dtype=torch.float32)
    launch(
        forward_kernel,
        lambda meta: (-(-rows // meta["BM"]) * heads,),
        InputArguments.of(x),
        StreamArguments.of(stream, x),
        output=output,
        normaliser=normaliser,
        num_samples=num_samples,
        **_options(x, is_causal),
    )
    return PrefillResult(output, normaliser)


def gradients(
    x: Inputs,
    num_samples: int,
    stream: Stream,
    g: Tensor,
    forward: PrefillResult,
    *,
    is_causal: bool = False,
) -> Gradients:
    """Estimate the gradients of q, k and v without bias: see `reference.gradients`.

    Parameters
    ----------
    x, num_samples, stream, is_causal
        As `prefill` had them.
    g : Tensor, (N, M, Ev)
        The gradient of the output.
    forward : PrefillResult
        What `prefill` returned.
    """
    heads, rows, n, width = x.shape
    features = x.q.shape[2]
    dq, dk, dv = (
        x.q.new_empty(heads, *shape, dtype=torch.float32)
        for shape in ((rows, features), (n, features), (n, width))
    )
    groups = (InputArguments.of(x), StreamArguments.of(stream, x), forward)
    arguments = {
        "g": g.to(x.q.dtype).contiguous(),
        "delta": (g.float() * forward.output).sum(-1),
        "scale": x.scale,
        "num_samples": num_samples,
        **_options(x, is_causal),
    }
    grid = lambda meta: (-(-rows // meta["BM"]) * heads,)  # noqa: E731
    launch(backward_q_kernel, grid, *groups, dq=dq, **arguments)
    launch(backward_kv_kernel, (-(-n // PAGE) * heads,), *groups, dk=dk, dv=dv, **arguments)
    return Gradients(dq, dk, dv)


def _options(x: Inputs, is_causal: bool) -> dict[str, Any]:
    """What all three kernels are specialised for."""
    refuse_unknown(x)
    _, _, n, width = x.shape
    return {
        "BD": max(16, power_of_two(x.q.shape[2])),
        "BV": max(16, power_of_two(width)),
        "PAGE": PAGE,
        "CAUSAL": is_causal,
        "SIZE": size_class(n),
    }
