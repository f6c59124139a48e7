"""`ProductCodes`: keys in a few bits, parts of them each by the nearest of some centroids."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentError
from ...streams import Purpose, Stream
from .base import HALF_BYTES, LayerPrompt
from .chosen_keys import DecodeStep
from .guessed_keys import Guesses

MAX_CODE_BITS = 12
"""The most bits of the code of a part of a key: with more, there are hardly fewer centroids than keys."""


class ProductCodes:
    """Guesses logits by product quantisation: each part of a key is replaced by its centroid.

    The centroids are those of Lloyd's k-means of the prompt's keys, from random keys on; later keys get the
    code of the nearest ones. A query makes a table of its products with all centroids and adds up its
    numbers by code. Source: Jégou, Douze and Schmid, Product quantization for nearest neighbor search (2011),
    with asymmetric distances; for keys Zhang and others, PQCache (2407.12820), section 3.2.

    Parameters
    ----------
    prompt : LayerPrompt
    parts : int
        Parts of a key, each with a code; a divisor of E.
    bits : int
        Of a code: there are 2^bits centroids a part, or as many as keys if these are fewer.
    rounds : int
        Of k-means.
    seed : Tensor, int64, ()
        By which the first centroids are drawn.
    """

    def __init__(self, prompt: LayerPrompt, parts: int, bits: int, rounds: int, seed: Tensor):
        keys = prompt.flat_keys().float()
        width = keys.shape[-1]
        if width % parts:
            raise ArgumentError(
                f"parts={parts} is not allowed: it must divide the {width} features of a key."
            )
        self.parts, self.bits = parts, bits
        count = min(1 << bits, keys.shape[1])
        stream = Stream.of(seed, prompt.batch, prompt.key_heads, 1, 0, keys.device)
        turn = stream.of_purpose(Purpose.TIES).uniform(1, keys.shape[1])[:, 0, 0]
        first = turn.topk(count, -1, largest=False).indices
        split = self._split(keys)  # [N, m, n, E / m]
        start = split.gather(2, first[:, None, :, None].expand(-1, parts, -1, split.shape[-1]))
        self.centroids, codes = _lloyd(split, start, rounds)  # [N, m, C, E / m], [N, m, n]
        self._codes = codes.to(torch.int16)

    def guess(self, step: DecodeStep) -> Guesses:
        """Guessed logits of all keys: see `LogitGuesser.guess`."""
        self._extend(step.keys)
        q = self._split(step.queries.float())  # [N, m, G, E / m]
        table = q @ self.centroids.mT  # [N, m, G, C]
        codes = self._codes.long()[:, :, None].expand(-1, -1, q.shape[2], -1)
        logits = table.gather(-1, codes).sum(1)
        return Guesses(logits.to(step.queries.dtype), self.nbytes)

    @property
    def nbytes(self) -> float:
        """Bytes of all codes and, in half precision, centroids."""
        return self._codes.numel() * self.bits / 8 + self.centroids.numel() * HALF_BYTES

    def _extend(self, keys: Tensor) -> None:
        known = self._codes.shape[-1]
        if known < keys.shape[1]:
            split = self._split(keys[:, known:].float())
            codes = torch.cdist(split, self.centroids).argmin(-1).to(torch.int16)
            self._codes = torch.cat((self._codes, codes), -1)

    def _split(self, x: Tensor) -> Tensor:
        """Vectors (N, m, E) by parts, (N, parts, m, E / parts)."""
        return x.unflatten(-1, (self.parts, -1)).transpose(1, 2)


def _lloyd(points: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Centroids (..., C, d) of points (..., n, d) after some rounds of k-means, and the code of each point.

    A centroid that no point is nearest to stays where it is.
    """
    for _ in range(rounds):
        codes = torch.cdist(points, centroids).argmin(-1)
        index = codes[..., None].expand(points.shape)
        count = torch.zeros_like(centroids[..., 0]).scatter_add_(-1, codes, torch.ones_like(points[..., 0]))
        total = torch.zeros_like(centroids).scatter_add_(-2, index, points)
        centroids = torch.where(count[..., None] > 0, total / count[..., None].clamp_min(1), centroids)
    return centroids, torch.cdist(points, centroids).argmin(-1)
