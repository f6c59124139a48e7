"""Sink, window and heaviest keys exactly, the others uniformly: vAttention, a baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_number
from ...errors import ArgumentError
from ...estimates import Draws
from ...streams import Stream
from ..base import StreamSampler
from ..inversion import row_probabilities


class VAttentionSampler(StreamSampler):
    """Keeps the first, the last and the heaviest visible keys of a row and draws from the others uniformly.

    A key that is read exactly counts its mass, one of the b that are drawn without replacement from the m
    others m / b times its mass, and the weights are normalised by their own sum: a ratio of two unbiased
    sums, so biased by O(1 / b). Variance: to leading order m^2 / b times that of p_j (v_j - o) over the
    others, times 1 - b / m. Exact where no more than S keys are visible. The last visible key is taken to be
    the row's own position, as in causal attention.

    Source: Desai et al., vAttention: verified sparse attention (2025, arXiv:2510.05688), with oracle top-k.
    There the number of draws follows from a tolerance, here it is what `num_samples` leaves; the released
    code draws with replacement, which is never better.

    Parameters
    ----------
    sink, local, heavy : float
        Shares of the draws that go to the first, the last and the heaviest keys, at most 1 together. The
        defaults are about those that the released code has at 32,768 keys of which a tenth is read.

    Raises
    ------
    ArgumentError
        If a share is not allowed.
    """

    name = "vattention"
    unbiased = False
    independent = False

    def __init__(self, sink: float = 0.04, local: float = 0.04, heavy: float = 0.5):
        sink, local, heavy = (
            check_number(name, share, least=0, most=1)
            for name, share in (("sink", sink), ("local", local), ("heavy", heavy))
        )
        if sink + local + heavy > 1:
            raise ArgumentError(
                f"sink={sink}, local={local}, heavy={heavy} is not allowed: they are at most 1 together."
            )
        self.sink, self.local, self.heavy = sink, local, heavy

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys with the random numbers of a stream: see `Sampler.draw_from`."""
        n, s = logits.shape[-1], num_samples
        p = row_probabilities(logits)
        first, last, most = (int(share * s) for share in (self.sink, self.local, self.heavy))
        seen = logits > -torch.inf
        place = seen.cumsum(-1)
        exact = (place <= first) | (place > place[..., -1:] - last)
        heaviest = logits.masked_fill(exact, -torch.inf).topk(min(most, n), -1).indices
        exact = exact.scatter(-1, heaviest, True) & seen

        # A key's turn: exact ones first, then the others in random order, never the masked ones.
        turn = stream.uniform(replicates, n)
        turn = turn.masked_fill_(exact[..., None, :], -1).masked_fill_(~seen[..., None, :], 2)
        turn, indices = turn.topk(min(s, n), -1, largest=False)  # [..., R, min(S, n)]
        turn, indices = (
            F.pad(turn, (0, s - turn.shape[-1]), value=2.0),
            F.pad(indices, (0, s - turn.shape[-1])),
        )
        drawn = (turn >= 0) & (turn < 1)
        others = (seen & ~exact).sum(-1)[..., None, None].to(p.dtype)
        factor = torch.where(drawn, others / drawn.sum(-1, keepdim=True).clamp_min(1), 1).masked_fill(
            turn > 1, 0
        )

        p, drawn_logits = (
            x[..., None, :].expand(*turn.shape[:-1], n).gather(-1, indices) for x in (p, logits.to(p.dtype))
        )
        # By logits, because the probabilities of keys far from the heaviest one are below all numbers.
        log_w = drawn_logits + factor.to(p.dtype).log()
        weights = log_w.softmax(-1).masked_fill((log_w == -torch.inf).all(-1, keepdim=True), 0) / replicates
        return Draws(indices.flatten(-2), weights.flatten(-2), p.flatten(-2), replicates)
