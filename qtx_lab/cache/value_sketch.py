"""`ValueSketch`: values in a byte a feature, and how far each is from what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .sketches import rounded_up
from .store import grown

LEVELS = 127
"""The largest size of a stored whole number."""


@dataclass
class ValueSketch:
    """Values v_j of N heads as u_j = step_j times whole numbers, and |v_j - u_j|, in the order of arrival.

    Every token has a step of its own, so that a heavy value takes nothing from the others, and nothing stored
    changes when tokens are appended.

    Parameters
    ----------
    lines : Tensor, int8, (N, C, d)
        The whole numbers, and room for more.
    steps : Tensor, (N, C)
    misses : Tensor, float16, (N, C)
        |v_j - u_j| in steps, rounded up.
    length : int
        n, the tokens held.
    """

    lines: Tensor
    steps: Tensor
    misses: Tensor
    length: int = 0

    @classmethod
    def of(cls, values: Tensor) -> ValueSketch:
        """The sketch of values (N, n, d)."""
        heads, _, width = values.shape
        sketch = cls(
            torch.empty(heads, 0, width, dtype=torch.int8, device=values.device),
            values.new_empty(heads, 0),
            torch.empty(heads, 0, dtype=torch.float16, device=values.device),
        )
        sketch.extend(values)
        return sketch

    def extend(self, values: Tensor) -> None:
        """Sketch more values (N, m, d)."""
        start, end = self.length, self.length + values.shape[1]
        self.lines, self.steps, self.misses = (
            grown(x, start, end) for x in (self.lines, self.steps, self.misses)
        )
        steps = (values.abs().amax(-1) / LEVELS).clamp_min(torch.finfo(values.dtype).tiny)
        levels = (values / steps[..., None]).round_().clamp_(-LEVELS, LEVELS)
        self.lines[:, start:end], self.steps[:, start:end] = levels.to(torch.int8), steps
        # In steps before squares are taken, which could be below all numbers.
        off = (values.double() - (levels * steps[..., None]).double()) / steps.double()[..., None]
        self.misses[:, start:end] = rounded_up(off.norm(dim=-1))
        self.length = end

    def crop(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.length = length

    def select(self, heads: Tensor) -> ValueSketch:
        """A sketch with some of the heads, int64, (N',), with repetitions; its memory is its own."""
        return replace(self, lines=self.lines[heads], steps=self.steps[heads], misses=self.misses[heads])

    def values(self, heads: slice = slice(None)) -> Tensor:
        """u_j of some heads, (heads, n, d)."""
        steps = self.steps[heads, : self.length, None]
        return self.lines[heads, : self.length].to(steps.dtype) * steps

    def errors(self, heads: slice = slice(None)) -> Tensor:
        """Bounds of |v_j - u_j|, float64, (heads, n)."""
        return self.misses[heads, : self.length].double() * self.steps[heads, : self.length].double()

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room to grow."""
        return self.lines.nbytes + self.steps.nbytes + self.misses.nbytes

    @property
    def scanned_nbytes(self) -> int:
        """Bytes of it that one query of each key head reads in full."""
        tensors = (self.lines, self.steps, self.misses)
        return sum(x[:, : self.length].nbytes for x in tensors)
