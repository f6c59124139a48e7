"""Estimates from a cache without bias: self-normalised ones of more and more draws, cut off at random."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import (
    AttentionEstimate,
    Draws,
    EstimateInfo,
    mixed_degrees_of_freedom,
    reliability,
    rounding_variance,
)
from ..problem import blocks
from ..samplers.inversion import invert, row_masses
from ..samplers.learned_errors import LevelDraws, mixed_variance
from ..streams import Purpose
from .attend import BLOCK_ELEMENTS, Call, plain_mode, refuse_after_crop, scores_by_place
from .sketches import ComponentSketch
from .store import TokenStore

LEVEL_RATIO = 2**-1.5
"""P(level + 1) / P(level). A level doubles the draws and divides the variance of its correction by 4: any
ratio between 1/4 and 1/2 has finite variance and finite cost, the geometric mean is the best."""


def attend_debiased(store: TokenStore, sketch: ComponentSketch | None, call: Call) -> AttentionEstimate:
    """The estimate of attention over all tokens of the store whose mean is the exact output.

    Let o_l be the self-normalised estimate from S 2^l independent draws of the proposal: the mean of values
    by weights exp(l_j) / q_j that sum to 1, which is biased by O(1 / (S 2^l)). In a replicate, a level l is
    drawn with P(l) = (1 - r) r^l, r = `LEVEL_RATIO`, then S 2^l keys. With a_l the mean of the two estimates
    o_(l-1) from the halves of the draws, the output is

        (the mean of o_0 of all 2^l parts) + (o_l - a_l) / P(l),        without the second term for l = 0.

    The mean of the bracket over l is the sum of E o_l - E o_(l-1), and so that of the output is the limit of
    E o_l, which is o. The difference of a level from its halves has a variance of O(4^-l), which makes the
    variance of all finite. The mean number of draws is S (1 - r) / (1 - 2 r) = 2.2 S.

    The standard error is that of the replicates' mean, for two or more, together with what the draws predict
    of it, which knows of values that no replicate has drawn (`LevelDraws.predicted_variance`); there is no
    bias. Reading `reliability` computes the probability of every key.

    Source: McLeish, A general method for debiasing a Monte Carlo estimator (2011); Rhee and Glynn, Unbiased
    estimation with square root convergence for SDE models (2015); Blanchet, Chen and Glynn, Unbiased Monte
    Carlo computation of smooth functions of expectations via Taylor expansions (2015), for the halves.

    Parameters
    ----------
    store : TokenStore
    sketch : ComponentSketch or None
    call : Call
        Of its rule, `num_samples` is S and `replicates` R.
    """
    (n, m, _), rule, row_shape = call.rows.shape, call.rule, call.q.shape[:-1]
    replicates = rule.replicates
    u = call.stream(store).of_purpose(Purpose.LEVEL).uniform(replicates, 1)[..., 0]  # [N, L, R]
    levels = ((1 - u.repeat(1, call.group, 1)).log() / math.log(LEVEL_RATIO)).long()  # P(l or more) = r^l
    levels = levels.flatten()
    means = call.rows.new_zeros(n * m * replicates, store.width)
    drawn = [
        x
        for block in blocks((n, m), max(1, BLOCK_ELEMENTS // store.length))
        for x in _draw_block(store, sketch, call, block, levels)
    ]
    values = store.values().to(means.dtype).flatten(0, 1)
    for x in drawn:
        rows = x.indices + (x.pair // (m * replicates))[:, None] * store.length
        means[x.pair] = F.embedding_bag(rows, values, per_sample_weights=x.weights, mode="sum")
    means = means.view(n, m, replicates, store.width)
    output = means.mean(-2)
    spent = (rule.num_samples << levels).view(n, m, replicates).sum(-1)

    def make_draws() -> Draws:
        most = max((x.indices.shape[1] for x in drawn), default=0)
        indices = torch.zeros(n * m * replicates, most, dtype=torch.int64, device=means.device)
        weights = means.new_zeros(indices.shape)
        for x in drawn:
            size = x.indices.shape[1]
            indices[x.pair, :size], weights[x.pair, :size] = x.indices, x.weights / replicates
        shape = (*row_shape, replicates * most)
        return Draws(indices.view(shape), weights.view(shape), None, replicates)

    errors = _Errors(store, call, drawn, means)
    degrees = mixed_degrees_of_freedom(max(2, replicates))

    def make_std_error() -> Tensor:
        return errors.std_error().to(store.dtype).view(*row_shape, store.width)

    def make_reliability() -> Tensor:
        hidden = errors.hidden(make_draws().dense(errors.length).view(n, m, errors.length))
        return reliability(errors.std_error(), hidden, degrees).to(store.dtype).view(row_shape)

    proposal = "exact" if sketch is None else sketch.proposal
    return AttentionEstimate(
        output=output.to(store.table.dtype).view(*row_shape, store.width),
        num_keys=store.length,
        degrees_of_freedom=degrees,
        make_draws=make_draws,
        make_std_error=make_std_error if replicates > 1 else None,
        make_reliability=make_reliability if replicates > 1 else None,
        group=call.group,
        info=EstimateInfo(
            sampler=f"cache, {proposal}",
            unbiased=True,
            estimator="debiased",
            num_samples=rule.num_samples,
            replicates=replicates,
            draws_per_row=float(spent.double().mean()) if spent.numel() else 0.0,
            draws_of_each_row=spent.view(row_shape),
            cache={"proposal": proposal, "tokens": store.length},
        ),
    )


def _draw_block(
    store: TokenStore,
    sketch: ComponentSketch | None,
    call: Call,
    block: tuple[slice, slice],
    levels: Tensor,
) -> list[LevelDraws]:
    """Draws of all replicates of some rows."""
    heads, part = block
    m, replicates, num_samples = call.rows.shape[1], call.rule.replicates, call.rule.num_samples
    x, stream = call.rows[block] * call.scale, call.stream(store)
    q = scores_by_place(store, sketch, x, heads).softmax(-1)
    q = (1 - call.rule.defensive) * q + call.rule.defensive / store.length
    places = store.places(heads)
    row = torch.arange(heads.start, heads.stop, device=x.device)[:, None] * m
    row = (row + torch.arange(part.start, part.stop, device=x.device)).flatten()
    pairs = (row[:, None] * replicates + torch.arange(replicates, device=x.device)).flatten()
    x, q, width = x.flatten(0, 1), q.flatten(0, 1), part.stop - part.start
    mass = row_masses(q.log())
    keys = store.keys(heads).to(x.dtype).flatten(0, 1)
    drawn: list[LevelDraws] = []
    for level in levels[pairs].unique().tolist():
        size = num_samples << level
        these = (levels[pairs] == level).nonzero()[:, 0]
        step = max(1, BLOCK_ELEMENTS // max(store.length, size * store.table.shape[-1]))
        for some in these.split(step):
            here, pair = some // replicates, pairs[some]  # rows of the block; pairs of all
            which = pair // replicates
            position = store.length - call.positions + which % m % call.positions
            numbers = stream.of_single_rows(which // m, position, pair % replicates).uniform(1, size)
            place, _ = invert(mass[here], numbers[:, 0, 0])
            head = here // width
            indices = places[head].gather(-1, place)
            drawn_keys = F.embedding(indices + head[:, None] * store.length, keys)
            logits = torch.einsum("be,bte->bt", x[here], drawn_keys)
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            # Without the largest logit, next to which the logarithm of q could be lost to rounding.
            largest, proposal = logits.amax(-1, keepdim=True), q[here].gather(-1, place)
            log_w = logits - largest - proposal.log()
            sinks = None if call.sinks is None else call.sinks.flatten()[which] - largest[:, 0]
            w, normalised = _normalised(log_w, num_samples, sinks), _normalised(log_w, size, sinks)
            if level:
                difference = normalised - _normalised(log_w, size // 2, sinks)
                w = w + difference / ((1 - LEVEL_RATIO) * LEVEL_RATIO**level)
            drawn.append(LevelDraws(pair, indices, w, normalised, proposal))
    return drawn


class _Errors:
    """How wrong a debiased estimate may be, computed when it is asked for.

    Parameters
    ----------
    store : TokenStore
    call : Call
    drawn : sequence of LevelDraws
    means : Tensor, (N, M, R, d)
        Of the replicates.
    """

    def __init__(self, store: TokenStore, call: Call, drawn: Sequence[LevelDraws], means: Tensor):
        self.store, self.call, self.drawn, self.means = store, call, drawn, means
        # Tokens may come later.
        self.length, self.table, self.sums = store.length, store.table, store.value_sums
        self.check = refuse_after_crop(store)

    def std_error(self) -> Tensor:
        """Float64, (N, M, d)."""
        self.check("std_error")
        means, rule = self.means.double(), self.call.rule
        m, replicates = means.shape[1:3]
        mean, square = self.sums[:, :, 0] / self.length  # [N, d]
        values = self.table[..., self.store.features :].flatten(0, 1)
        predicted = means.new_zeros(2, *means.shape).flatten(1, 3)
        with plain_mode(means.device):
            for x in self.drawn:
                head = x.pair // (m * replicates)
                v = F.embedding(x.indices + head[:, None] * self.table.shape[1], values).double()

                def distance(o: Tensor, at: Tensor = head) -> Tensor:
                    return (square[at] - 2 * o * mean[at] + o.square()).clamp_min(0)

                predicted[:, x.pair] = torch.stack(x.predicted_variance(v, distance))
            variance = mixed_variance(means, *predicted.view(2, *means.shape).mean(-2))
            size, computed = square[:, None].sqrt(), self.means.dtype
            draws = rule.num_samples * replicates
            rounding = rounding_variance(means.mean(-2), size, draws, self.table.dtype, computed)
            return (variance + rounding).sqrt()

    def hidden(self, weights: Tensor) -> Tensor:
        """What `qtx_lab.estimates.reliability` sets standard errors against: float64, (N, M).

        From the exact probabilities of all keys, O(n E) a row, beside the weights (N, M, n) of the draws.
        """
        self.check("reliability")
        call, features = self.call, self.store.features
        hidden = self.means.new_empty(self.means.shape[:2], dtype=torch.float64)
        with plain_mode(hidden.device):
            for heads, part in blocks((hidden.shape[0], hidden.shape[1]), BLOCK_ELEMENTS // self.length):
                table = self.table[heads, : self.length].double()
                logits = (call.rows[heads, part].double() * call.scale) @ table[..., :features].mT
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                if call.sinks is not None:
                    logits = torch.cat((logits, call.sinks[heads, part, None].double()), -1)
                p = logits.softmax(-1)[..., : self.length]
                centre = self.sums[0, heads] / self.length
                distance = (table[..., features:] - centre).square().sum(-1)[..., None]
                hidden[heads, part] = ((weights[heads, part] - p).square() @ distance)[..., 0].sqrt()
        return hidden


def _normalised(log_w: Tensor, size: int, sinks: Tensor | None) -> Tensor:
    """Weights (B, T) of the mean of the self-normalised estimates of parts of `size` draws."""
    parts = log_w.unflatten(-1, (-1, size))
    total = parts.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks[:, None, None] + math.log(size))
    return ((parts - total).exp() / parts.shape[1]).flatten(-2)
