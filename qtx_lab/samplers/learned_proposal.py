"""Attention rows with a low-rank proposal beside them: exact logits only where keys were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import AttentionProblem, Block, blocks
from .inversion import invert, row_masses

BLOCK_ELEMENTS = 1 << 20
"""Size of a block of rows: keys, or draws times features, whichever is more, over its rows."""

FIT_GROWTH = 1.1
"""A causal row's map is fitted to the first 64, 70, 77, … keys that it sees. On the reference model (all
layers, n = 512) the error relative to independent draws is then 1.05 at S = 8 and .72 at S = 64; with maps of
all keys, later ones too, it was 1.01 and .71, and with steps of 2 it would be 1.34 and 1.17."""

SURE = 0.9
"""How much of a key's variance training leaves out where the key is sure to be drawn.

If it left out all of it, training would no longer care how heavy such a key is, and would lose the key on
rows that it has not seen."""

Maps = tuple[Tensor, Tensor, Tensor]
"""A^T (heads, E, r), a (heads, 1, r) and B^T (heads, E, r) of the proposal's logits scale <A x + a, B k>."""


class ProposedRows:
    """The rows (N, M) of a problem with a proposal for each.

    The proposal is q_j = (1 - epsilon) softmax_j(scale <A x + a, B k_j>) + epsilon / keys seen.

    Parameters
    ----------
    problem : AttentionProblem
    maps : Maps or None
        One for each head or one for all; where None, `best_low_rank` of each key head's own queries and keys.
        A causal row then has the map of the first 64, 128, 256, … keys that it sees
        (`AttentionProblem.runs`), and one that sees fewer its exact logits.
    rank : int
        Of the maps where None are given.
    defensive : float
        epsilon.
    """

    def __init__(self, problem: AttentionProblem, maps: Maps | None, rank: int, defensive: float):
        self.problem, self.rank, self.defensive = problem, rank, defensive
        self.fitted = None if maps is None else self._projected(maps)
        self.maps_of_known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def _projected(self, maps: Maps) -> AttentionProblem:
        """The problem whose logits are those of the proposal."""
        p = self.problem
        query, key = project(p.queries, p.keys, maps)
        query, key = query.view(*p.row_shape, query.shape[-1]), key.view(*p.k.shape[:-1], key.shape[-1])
        return replace(p, q=query, k=key, v=key)

    def _proposed_logits(self, heads: slice, rows: slice) -> Tensor:
        """The proposal's logits of a block, (heads, rows, keys), as far as its last row sees."""
        if self.fitted is not None:
            return self.fitted.logits(heads, rows)
        runs = [self._run(heads, part, known) for known, part in self.problem.runs(rows, FIT_GROWTH)]
        if not runs:
            return self.problem.logits(heads, rows)
        reach = max(run.shape[-1] for run in runs)
        return torch.cat([F.pad(run, (0, reach - run.shape[-1]), value=-torch.inf) for run in runs], 1)

    def _run(self, heads: slice, rows: slice, known: int) -> Tensor:
        """The proposal's logits of rows that know so many of the first keys."""
        problem = self.problem
        if known == 0:
            return problem.logits(heads, rows)
        key = heads.start, heads.stop, known
        if key not in self.maps_of_known:
            queries = problem.queries[heads].unflatten(1, (problem.group, problem.length))
            past = max(1, known - problem.first_position) if problem.is_causal else problem.length
            queries = queries[:, :, :past].flatten(1, 2)
            self.maps_of_known[key] = best_low_rank(queries, problem.keys[heads, :known], self.rank)
        a, b = self.maps_of_known[key]
        reach = problem.reach(rows)
        count = rows.stop - rows.start
        # Products of a few rows are split over threads, which rounds otherwise: sixteens are not.
        queries = F.pad(problem.queries[heads, rows], (0, 0, 0, -count % 16)) * problem.scale
        logits = (queries @ a) @ (problem.keys[heads, :reach] @ b).mT
        return problem.logits_of(logits[:, :count].contiguous(), heads, rows)

    def blocks(self, draws: int) -> Iterator[Block]:
        """(heads, rows) of blocks whose workspace is bounded, in memory order."""
        features = max(self.problem.k.shape[-1], self.problem.width)
        return blocks(self.problem.shape, BLOCK_ELEMENTS // max(self.problem.num_keys, draws * features))

    def log_proposal(self, heads: slice, rows: slice) -> Tensor:
        """log q of a block, (heads, rows, keys), -inf where a key is masked.

        A causal block reaches to the last key that it sees.
        """
        return mix(self._proposed_logits(heads, rows), self.defensive)

    def log_target(self, heads: slice, rows: slice) -> Tensor:
        """log p of a block, from all exact logits."""
        return log_probabilities(self.problem.logits(heads, rows))

    def draw(self, heads: slice, rows: slice, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, exact logits, log q) of the keys at points (heads, rows, T), each (heads, rows, T)."""
        log_q = self.log_proposal(heads, rows)
        indices, _ = invert(row_masses(log_q), points)
        row = self.problem.row_numbers(heads, rows)
        exact = self.problem.logits_at(row, indices.flatten(0, 1)).view(indices.shape)
        return indices, exact, log_q.gather(-1, indices)

    def average(self, row: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """sum_t weights_t v_{j_t} of rows (B,) at keys (B, T), (B, Ev)."""
        p = self.problem
        first = (row // p.shape[1] * p.num_keys)[:, None]
        return F.embedding_bag(
            indices + first, p.values.flatten(0, 1), per_sample_weights=weights, mode="sum"
        )


def project(q: Tensor, k: Tensor, maps: Maps) -> tuple[Tensor, Tensor]:
    """A q + a and B k: (N, M, E), (N, n, E) -> (N, M, r), (N, n, r), N a multiple of the maps' heads."""
    a, bias, b = (m.to(q.dtype).repeat(q.shape[0] // max(1, m.shape[0]), 1, 1) for m in maps)
    return torch.baddbmm(bias, q, a), torch.bmm(k, b)


def mix(logits: Tensor, defensive: float) -> Tensor:
    """log of (1 - epsilon) softmax(logits) + epsilon / (number of keys seen); -inf where masked."""
    seen = logits > -torch.inf
    share = defensive / seen.sum(-1, keepdim=True).clamp_min(1).to(logits.dtype)
    q = (1 - defensive) * logits.softmax(-1) + share
    # The logarithm of a masked 0 has no gradient: 1 stands in for it.
    return torch.where(seen, q, 1).log().masked_fill(~seen, -torch.inf)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of rows (..., n); -inf everywhere in a row in which all is masked."""
    return torch.where(logits > -torch.inf, logits.log_softmax(-1), -torch.inf)


def renyi(
    log_p: Tensor,
    log_q: Tensor,
    log_cost: Tensor | None = None,
    num_samples: int | None = None,
    independent: bool = True,
) -> Tensor:
    """log sum_j cost_j p_j^2 / q_j of each row, in nats; masked keys add nothing.

    Where S = num_samples is given, (1 - SURE pi_j) / pi_j stands in for 1 / q_j.
    """
    masked = log_p == -torch.inf
    terms, log_q = 2 * log_p.masked_fill(masked, 0), log_q.masked_fill(masked, 0)
    if num_samples is None:
        terms = terms - log_q
    else:
        log_pi = log_inclusion(log_q, num_samples, independent)
        terms = terms - log_pi + torch.log1p(-SURE * log_pi.exp())
    terms = terms if log_cost is None else terms + log_cost
    return terms.masked_fill(masked, -torch.inf).logsumexp(-1)


def log_inclusion(log_q: Tensor, num_samples: int | Tensor, independent: bool) -> Tensor:
    """log pi of keys of probability q among S draws of a row."""
    if independent:
        q = log_q.exp().clamp_max(1)
        return (-torch.expm1(num_samples * torch.log1p(-q))).log()
    return (log_q.exp() * num_samples).clamp_max(1).log()


def best_low_rank(q: Tensor, k: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The maps of rank r that minimise the mean of (q . k - <A q, B k>)^2 over all pairs, keys centred.

    With C_q = mean of q q^T, C_k the covariance of the keys (a shift of all keys changes no attention row)
    and the singular value decomposition C_q^{1/2} C_k^{1/2} = U diag(s) W^T, cut off after r values,

        A^T = C_k^{1/2} W diag(s)^{-1/2},        B^T = C_q^{1/2} U diag(s)^{-1/2}

    (Eckart and Young 1936, in the metric of the queries' and keys' second moments).

    Parameters
    ----------
    q : Tensor, (N, M, E)
    k : Tensor, (N, n, E)
    rank : int
        r, 1 <= r <= E.

    Returns
    -------
    tuple of Tensor
        A^T and B^T, each (N, E, r), in q's dtype: q @ A^T and k @ B^T are the maps' values.
    """
    x, y = q.double(), k.double()
    y = y - y.mean(1, keepdim=True)
    moment_q, moment_k = (t.mT @ t / max(1, t.shape[1]) for t in (x, y))
    root = _root(moment_k)
    squares, w = torch.linalg.eigh(root @ moment_q @ root)  # s^2, smallest first, and W
    s = squares.flip(-1)[..., None, :rank].clamp_min(0).sqrt()
    # Directions without variance carry no logits: 0 rather than a division by 0.
    inverse = torch.where(s > 1e-7 * s[..., :1], s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt(), 0.0)
    a = root @ w.flip(-1)[..., :rank] * inverse
    b = moment_q @ a * inverse.square()  # C_q^{1/2} U = C_q C_k^{1/2} W / s
    return a.to(q.dtype), b.to(q.dtype)


def _root(c: Tensor) -> Tensor:
    """The symmetric square root of positive semi-definite matrices (N, E, E)."""
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT
