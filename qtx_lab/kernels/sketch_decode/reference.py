"""Decoding by draws from a sketch of the keys, in plain torch.

It gives the draws of `launch.sketch_decode`, bit by bit. The rows of a group are the G query heads of a key
head at one position: they read the same keys, and so they share their draws.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ArgumentError, ShapeError
from ...streams import Stream
from ..inputs import Inputs
from ..masses import PAGE, Masses, group_dtype, group_offsets, locate_page

UPPER, LOWER = 127, 128
"""A component of a query is LOWER times an upper digit, from -UPPER to UPPER, plus a lower digit.

The unit is the query's largest component / (UPPER LOWER).
"""
SMALLEST = 1e-30
"""Components that are all smaller than this count as 0."""


@dataclass(frozen=True)
class SketchTable:
    """A small table from which all logits of a row are guessed, up to a shift that the row's logits share.

    It is of the keys as the cache holds them, without a `k_scale`.

    Parameters
    ----------
    table : Tensor, (N, n, r) or (N, n, ceil(r / 2))
        The components of the key at each place: int8, or uint8, which holds two components of 4 bits, 8 +
        one of the first half of the components in the lower bits and 8 + one of the second half in the
        upper ones.
    weight : Tensor, float32, (N, E, r)
        Maps queries to components: the logit of the key at place j is about scale (q weight) . table_j.
    centre : Tensor, float32, (N, E)
        What the table represents of a key is its difference from this, a shift that a row's logits share.
    num_exact : int
        How many of the first places hold keys whose logits are computed from the keys themselves.
    order : Tensor, int64, (N, n), optional
        The key at each place; keys lie in the order of the places where None. The first places of a sequence
        of m tokens hold these.
    """

    table: Tensor
    weight: Tensor
    centre: Tensor
    num_exact: int = 0
    order: Tensor | None = None

    def digits(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The components of base-2 queries in two digits, upper and lower (N, M, r), in a unit (N, M, 1).

        The guessed logit is unit (LOWER upper + lower) . table_j, which is rounded only once. In float64
        the order of a sum changes no digit.
        """
        components = torch.bmm(x.q.double(), self.weight.double())
        largest = components.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
        level = (components / largest * (UPPER * LOWER) + 0.5).floor()
        upper = ((level + LOWER // 2) / LOWER).floor()
        unit = (largest / (UPPER * LOWER)).float() * x.logit_scale
        return upper.char(), (level - LOWER * upper).char(), unit

    def logits_at(self, x: Inputs, places: Tensor) -> Tensor:
        """The base-2 logits of a group's keys at places (N, L, P), with the shift of the others.

        (N, M, P), float32.
        """
        head = torch.arange(len(places), device=places.device)[:, None, None]
        some = x.k.flatten(0, 1)[head, self.keys_at(places)].float()  # [N, L, P, E]
        q = x.q.float().unflatten(1, (-1, x.length))  # [N, G, L, E]
        products = torch.einsum("ngle,nlpe->nglp", q, some).flatten(1, 2)
        shift = torch.bmm(x.q.double(), self.centre.double()[..., None]).float()
        return (products - shift) * x.logit_scale

    def scores(self, x: Inputs) -> Tensor:
        """The guessed logits in base 2, up to a shift of each row, by places: (N, M, n), float32."""
        upper, lower, unit = self.digits(x)
        level = LOWER * upper.double() + lower.double()
        if self.table.dtype == torch.int8:
            scores = torch.bmm(level, self.table.double().mT).float() * unit
        else:
            low, high = ((self.table >> shift & 15).double().mT - 8 for shift in (0, 4))
            level_low, level_high = halves(level, 0)
            scores = (torch.bmm(level_low, low) + torch.bmm(level_high, high)).float() * unit
        places = torch.arange(self.num_exact, device=scores.device)
        scores[..., : self.num_exact] = self.logits_at(x, places.expand(len(scores), x.length, -1))
        return scores

    def log_normalisers(self, x: Inputs) -> Tensor:
        """Base-2 logarithms of the sums of 2^logit of all keys, roughly: (N, M), float32.

        They are estimated from the visible keys at the exact places and at `SAMPLED_PLACES` others, and need
        not be near: they only say how much weight each row of a group has in what the group draws. They are
        rounded, so that the order of a sum does not change them. -inf where a row sees no key.
        """
        places, weight = prepared_places(self.num_exact, *x.visible_range())
        group = x.q.shape[1] // x.length
        hidden = (weight == 0).repeat(1, group, 1)
        logits = self.logits_at(x, places).masked_fill(hidden, -torch.inf)
        largest = logits.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0)
        total = (torch.exp2(logits - largest) * weight.repeat(1, group, 1)).sum(-1)
        return ((largest[..., 0] + total.log2()) * STEPS_PER_BIT + 0.5).floor() / STEPS_PER_BIT

    @property
    def nbytes(self) -> int:
        """Bytes of the table and of what goes with it, without keys that are read for their own logits."""
        return self.table.nbytes + self.weight.nbytes + self.centre.nbytes

    def keys_at(self, places: Tensor) -> Tensor:
        """The keys at places (N, M, T): int64, (N, M, T)."""
        if self.order is None:
            return places
        return self.order[:, None].expand(-1, places.shape[1], -1).gather(-1, places)

    def in_order_of_keys(self) -> SketchTable:
        """The same sketch with each key at its own place, as windows need it; no key has an exact logit."""
        table = self.table
        if self.order is not None:
            table = torch.empty_like(table).scatter_(1, self.order[..., None].expand_as(table), table)
        return replace(self, table=table, num_exact=0, order=None)

    def check(self, x: Inputs) -> None:
        """Refuse inputs that the sketch is not of, or that see keys which lie anywhere in its order.

        Raises
        ------
        ShapeError
            If it is not one of N heads of n keys.
        ArgumentError
            If there is a mask; if there are, beside an order, a window, or lengths of several queries a head.
        """
        x.refuse("mask")
        heads, _, n, _ = x.shape
        if self.table.shape[:2] != (heads, n):
            raise ShapeError(
                f"sketch has {self.table.shape[1]} places of {self.table.shape[0]} heads; k has {n} keys of "
                f"{heads}."
            )
        if self.order is None:
            return
        for name, given in (("window", x.window), ("lengths", x.lengths if x.length > 1 else None)):
            if given is not None:
                shown = tuple(given.shape) if isinstance(given, Tensor) else given
                raise ArgumentError(
                    f"{name}={shown} is not possible with L={x.length} queries a head and a sketch with an "
                    "order, in which the keys that a query sees lie anywhere: use sketch.in_order_of_keys()."
                )


def halves(x: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """The first and the second half of the last dimension, which is filled up to an even number."""
    first, second = F.pad(x, (0, x.shape[-1] % 2), value=fill).chunk(2, -1)
    return first, second


STEPS_PER_BIT = 16
"""Normalisers of rows are rounded to this fraction of a bit."""

SAMPLED_PLACES = 1024
"""Places, besides the exact ones, from whose keys a row's normaliser is estimated."""


def prepared_places(num_exact: int, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The visible places from whose keys a row's normaliser is estimated, and how many keys each stands for.

    They are those of the first `num_exact` places, and up to `SAMPLED_PLACES` equally spaced others.

    Parameters
    ----------
    num_exact : int
    start, end : Tensor, int64, (N, L)
        The first place that a group sees, and the one behind the last.

    Returns
    -------
    places : Tensor, int64, (N, L, P)
    weight : Tensor, float32, (N, L, P)
        0 where a group has fewer than P.

    Examples
    --------
    >>> prepared_places(2, torch.tensor([[0]]), torch.tensor([[4]]))
    (tensor([[[0, 1, 2, 3]]]), tensor([[[1., 1., 1., 1.]]]))
    """
    start, end = start[..., None], end[..., None]
    exact = (end.clamp_max(num_exact) - start).clamp_min(0)
    others = start.clamp_min(num_exact)
    left = (end - others).clamp_min(0)
    step = (-(-left // SAMPLED_PLACES)).clamp_min(1)
    sampled = -(-left // step)
    i = torch.arange(int((exact + sampled).max()), device=start.device)
    places = torch.where(i < exact, start + i, others + (i - exact) * step)
    weight = torch.where(i < exact, 1.0, (left.double() / sampled.clamp_min(1)).float())
    exists = i < exact + sampled
    return torch.where(exists, places, 0), torch.where(exists, weight, 0)


@dataclass(frozen=True)
class SketchDecodeResult:
    """The draws of N heads of L groups of rows, their weights in each row, and the averages of the values.

    Parameters
    ----------
    output : Tensor, (N, M, Ev)
        In the dtype of the values, or of the queries where values have 8 bits; 0 where a row sees no key.
    group_indices : Tensor, int64, (N, L, R * S)
        The drawn keys, which the G = M / L rows of a group share.
    inclusion : Tensor, float32, (N, L, R * S)
        pi: the probability with which the key is drawn; 0 for a draw without a key.
    log_weights : Tensor, float32, (N, M, R * S)
        In base 2, before normalisation; -inf for a draw without a key.
    log_normaliser : Tensor, float32, (N, M, R)
        In base 2: the logarithm of the sum of a replicate's weights, and of the row's sink; -inf where the
        row sees nothing.
    """

    output: Tensor
    group_indices: Tensor
    inclusion: Tensor
    log_weights: Tensor
    log_normaliser: Tensor

    @property
    def indices(self) -> Tensor:
        """The drawn keys of each row: int64, (N, M, R * S)."""
        return self.group_indices.repeat(1, self.output.shape[1] // self.group_indices.shape[1], 1)

    def weights(self) -> Tensor:
        """The weight of each draw, (N, M, R * S), float32; those of a row sum to 1, less its sink's."""
        replicates = self.log_normaliser.shape[-1]
        normaliser = self.log_normaliser.masked_fill(self.log_normaliser == -torch.inf, 0)
        relative = self.log_weights.unflatten(-1, (replicates, -1)) - normaliser[..., None]
        return (torch.exp2(relative) / replicates).flatten(-2)

    @property
    def log_sum_exp(self) -> Tensor:
        """The estimated log-sum-exp of each row's natural logits, its sink among them: float32, (N, M).

        That of the mean over the replicates of sum_j exp(l_j) / pi_j; -inf where a row sees nothing.
        """
        logs = self.log_normaliser * math.log(2)
        return logs.logsumexp(-1) - math.log(logs.shape[-1])

    def std_error(self, x: Inputs) -> Tensor:
        """The standard error of the output: (N, M, Ev), float32; `x` are the inputs of the draws.

        The variance is estimated by sum_j (1 - pi_j) w_j^2 (v_j - o)^2, as of independent draws.
        """
        heads, rows, width = self.output.shape
        group = rows // self.group_indices.shape[1]
        a = self.weights().square() * (1 - self.inclusion).repeat(1, group, 1)  # [N, M, R S]
        variance = torch.empty(heads, rows, width, device=self.output.device)
        drawn = self.inclusion > 0
        for i in range(heads):  # gathered values are as many as those of a small cache
            values = x.values_at(i, self.group_indices[i])  # [L, R S, Ev]
            values = torch.where(drawn[i, ..., None], values, 0).repeat(group, 1, 1)  # [M, R S, Ev]
            difference = values - self.output[i, :, None].float()
            variance[i] = torch.einsum("mt,mtd->md", a[i], difference.square())
        return variance.sqrt()


SEARCHED_PAGES = 64
"""The search for the certain mass goes key by key through the pages of the largest keys, at most this many.

It samples as many pages from the others. See `Proposal.certain_mass`.
"""

NEWTON_STEPS = 6
"""The steps of that search."""


def inverse_page_share(defensive: float) -> float:
    """(1 - epsilon) / epsilon in single precision, as kernels have it.

    Of a group that sees T pages each gets at least one part in T times this of the guessed mass.
    """
    (share,) = struct.unpack("f", struct.pack("f", (1 - defensive) / defensive))
    return float(share)


@dataclass(frozen=True)
class Proposal:
    """The masses by which keys are drawn, made of a sketch's masses: raised where they are small.

    Every page gets at least the mass `page_floor`, its share of the defensive part epsilon. For that a page
    of little mass is shifted up by whole powers of two, and each of its keys gets `extra` besides. So all
    arithmetic within a page is on small whole numbers, and no key has less than about epsilon / (2 n) of the
    row.

    Parameters
    ----------
    up : Tensor, int64, (N, M, T)
        A key of mass m has the raised mass (m + extra) 2^up in the row's unit.
    extra : Tensor, int64, (N, M, T)
    max_up : Tensor, int64, (N, M, 1)
        No page's `up` is larger.
    """

    up: Tensor
    extra: Tensor
    max_up: Tensor

    @classmethod
    def of(cls, masses: Masses, visible: Tensor, defensive: float) -> Proposal:
        """Raise the masses of visible keys (N, M, T, PAGE), so that the defensive part has its share."""
        up, down = masses.shifts()
        total = torch.where(down == 0, masses.page_mass << up, 0).sum(-1, keepdim=True)
        pages = visible.any(-1).sum(-1, keepdim=True)
        share = (pages.double() * inverse_page_share(defensive) + 0.5).floor().clamp_min(1)
        page_floor = (total.double() / share).long().clamp_min(1)  # [N, M, 1]
        # 2^k s reaches `page_floor` for k the difference of their exponents, or one more.
        exponent = torch.frexp(page_floor.double()).exponent.long()
        missing = (exponent - torch.frexp(masses.page_mass.double()).exponent).clamp_min(0)
        missing = missing + (masses.page_mass << missing < page_floor)
        up = torch.maximum(up, missing)
        max_up = (exponent - masses.min_bits + 1).clamp_min(masses.fraction_bits)
        return cls(up, ((page_floor >> up) // PAGE).clamp_min(1), max_up)

    def certain_mass(self, masses: Masses, visible: Tensor, num_samples: int) -> Tensor:
        """The mass c from which a key is drawn with certainty: sum_j min(1, v_j / c) is about S.

        It is found by Newton's method for c S - sum_j min(v_j, c), a convex function, from above. No step
        falls below the root, so that no more than S draws are spent, which would cost the heaviest keys their
        certainty. At most `SEARCHED_PAGES` pages, those with the largest keys, are looked at key by key. Of
        the others every `stride`-th is sampled, and what c cuts off there is scaled up to the mass of all of
        them. Where the sample has certain keys, c is raised by a sixteenth, since to draw a few keys less
        costs little. It is rounded up to what every page can hold.

        Parameters
        ----------
        masses : Masses
        visible : Tensor, bool, (N, M, T, PAGE)
        num_samples : int
            S.

        Returns
        -------
        Tensor, int64, (N, M, 1)
            In the row's unit.
        """
        seen = visible.any(-1)  # [N, M, T]
        stride = (-(-seen.sum(-1, keepdim=True) // SEARCHED_PAGES)).clamp_min(1)  # [N, M, 1]
        searched = masses.page_exponent >= searched_exponent(masses.page_exponent)  # [N, M, T]
        page_mass = masses.page_mass + visible.sum(-1) * self.extra << self.up  # [N, M, T]
        own = torch.where(
            visible, masses.mass + self.extra[..., None] << self.up[..., None], 0
        )  # [N, M, T, PAGE]
        page = torch.arange(seen.shape[-1], device=own.device) - seen.byte().argmax(-1, keepdim=True)
        sampled = ~searched & (page % stride == 0)
        rest = torch.where(searched, 0, page_mass).sum(-1, keepdim=True).double()
        sampled_mass = torch.where(sampled, page_mass, 0).sum(-1, keepdim=True).double()
        ratio = torch.where(sampled_mass > 0, rest / sampled_mass, 0.0)  # [N, M, 1]
        total = page_mass.sum(-1, keepdim=True)
        c = (total.double() / num_samples).ceil().long()
        sampled_certain = torch.zeros_like(c)
        for _ in range(NEWTON_STEPS):
            certain = own >= c[..., None]
            count, mass = certain.sum(-1), torch.where(certain, own, 0).sum(-1)  # [N, M, T] each
            searched_count, sampled_certain, searched_mass, certain_sampled_mass = (
                torch.where(where, x, 0).sum(-1, keepdim=True)
                for x in (count, mass)
                for where in (searched, sampled)
            )
            left = num_samples - searched_count.double() - sampled_certain.double() * ratio
            light = total.double() - searched_mass.double() - certain_sampled_mass.double() * ratio
            closer = torch.minimum(c, (light / left.clamp_min(0.5)).ceil().long())
            c = torch.where(left > 0.5, closer, c).clamp_min(1)
        c = torch.where(sampled_certain > 0, c + (c >> 4), c)
        return c + (1 << self.max_up) - 1 >> self.max_up << self.max_up


def searched_exponent(page_exponent: Tensor) -> Tensor:
    """The least exponent that at most `SEARCHED_PAGES` pages reach: float32, (N, M, 1), of (N, M, T).

    It is larger than all exponents if more pages than that have the largest one.
    """
    row_exponent = page_exponent.amax(-1, keepdim=True)
    below = torch.full_like(row_exponent, -1)
    for bit in (64, 32, 16, 8, 4, 2, 1):
        count = (page_exponent >= row_exponent - (below + bit)).sum(-1, keepdim=True)
        below = torch.where(count <= SEARCHED_PAGES, below + bit, below)
    return row_exponent - below


@dataclass(frozen=True)
class ProposedDraws:
    """Keys that are drawn before their exact logits are known.

    Parameters
    ----------
    indices : Tensor, int64, (N, M, R * S)
    inclusion : Tensor, float32, (N, M, R * S)
        pi: the probability with which the key is drawn.
    drawn : Tensor, bool, (N, M, R * S)
        False for a point past the last key.
    """

    indices: Tensor
    inclusion: Tensor
    drawn: Tensor


def sketch_decode(
    x: Inputs,
    sketch: SketchTable,
    num_samples: int,
    replicates: int,
    stream: Stream,
    *,
    defensive: float = 0.02,
) -> SketchDecodeResult:
    """Average the values at draws from a sketch: see `qtx_lab.kernels.sketch_decode.launch.sketch_decode`."""
    sketch.check(x)
    x = x.side_by_side()
    start, end = (y[..., None] for y in x.visible_range())  # [N, L, 1] each
    key = torch.arange(-(-x.shape[2] // PAGE) * PAGE, device=x.q.device)
    visible = (key >= start) & (key < end)  # [N, L, T PAGE]
    relative = sketch.scores(x) - sketch.log_normalisers(x)[..., None]
    relative = relative.unflatten(1, (-1, x.length))  # [N, G, L, n]
    relative = relative.masked_fill(~visible[:, None, :, : x.shape[2]], -torch.inf)
    masses = Masses.of_groups(relative, group_dtype(num_samples, x.most_visible), most_pages(x))
    offsets = group_offsets(stream, replicates)
    proposed = draw(masses, visible.unflatten(-1, (-1, PAGE)), offsets, num_samples, defensive)
    proposed = replace(proposed, indices=sketch.keys_at(proposed.indices))
    return weigh(x, proposed, num_samples, replicates)


def most_pages(x: Inputs) -> int:
    """The most pages of which a query sees keys."""
    return min(-(-x.shape[2] // PAGE), (x.most_visible + PAGE - 2) // PAGE + 1)


def draw(
    masses: Masses, visible: Tensor, offsets: Tensor, num_samples: int, defensive: float
) -> ProposedDraws:
    """Draw keys at equally spaced points along their raised masses.

    No key counts for more than the certain mass.

    Parameters
    ----------
    masses : Masses
    visible : Tensor, bool, (N, L, T, PAGE)
    offsets : Tensor, float64, (N, L, R)
        Where the first point of each replicate lies, in units of the distance of points.
    num_samples : int
        S.
    defensive : float
        epsilon.
    """
    proposal = Proposal.of(masses, visible, defensive)
    extra, certain = proposal.extra[..., None], proposal.certain_mass(masses, visible, num_samples)
    all_drawn = visible.sum((-2, -1))[..., None] <= num_samples  # [N, M, 1]
    up, certain = torch.where(all_drawn, 0, proposal.up), torch.where(all_drawn, 1, certain)
    cap = (certain >> up)[..., None]  # [N, M, T, 1]
    own = torch.where(visible, torch.minimum(masses.mass + extra, cap), 0)  # [N, M, T, PAGE]
    page_mass = own.sum(-1) << up
    end = page_mass.cumsum(-1)
    row_mass = end[..., -1:]

    step = torch.maximum(certain, -(-row_mass // num_samples))  # [N, M, 1]
    first = torch.minimum((offsets * step).long(), step - 1)  # [N, M, R]
    s = torch.arange(num_samples, device=step.device)
    points = (s * step[..., None] + first[..., None]).flatten(-2)  # [N, M, R S]
    drawn = points < row_mass
    points = points.masked_fill(~drawn, 0)
    page, rest = locate_page(end - page_mass, points)
    rest = rest >> up.gather(-1, page)
    inside = own.gather(2, page[..., None].expand(*page.shape, PAGE))  # [N, M, R S, PAGE]
    place = (inside.cumsum(-1) <= rest[..., None]).sum(-1).clamp_max(PAGE - 1)
    mass = inside.gather(-1, place[..., None])[..., 0] << up.gather(-1, page)
    indices = torch.where(row_mass > 0, page * PAGE + place, 0)
    return ProposedDraws(indices, (mass.double() / step.double()).float(), drawn)


def weigh(x: Inputs, proposed: ProposedDraws, num_samples: int, replicates: int) -> SketchDecodeResult:
    """Weigh draws by their exact logits, and average their values."""
    heads, rows, _, width = x.shape
    indices, pi, drawn = (y.repeat(1, rows // x.length, 1) for y in vars(proposed).values())
    keys, values = (y.flatten(0, 1).float() for y in (x.k, x.v))
    at = indices.flatten(1)[..., None]
    drawn_k = keys.gather(1, at.expand(-1, -1, keys.shape[-1])).view(*indices.shape, -1)
    drawn_v = values.gather(1, at.expand(-1, -1, width)).view(heads, rows, -1, width)
    drawn_v = torch.where(drawn[..., None], drawn_v, 0).unflatten(2, (replicates, num_samples))
    logits = x.capped(torch.einsum("nmte,nme->nmt", drawn_k, x.q.float()) * x.logit_scale)
    log_weights = (logits - pi.log2()).masked_fill(~drawn, -torch.inf)
    log_w = log_weights.unflatten(-1, (replicates, num_samples))
    log_normaliser = (log_w * math.log(2)).logsumexp(-1)  # [N, M, R]
    if x.sinks is not None:
        log_normaliser = torch.logaddexp(log_normaliser, x.sinks.float()[..., None])
    log_normaliser = log_normaliser / math.log(2)
    shift = log_normaliser.masked_fill(log_normaliser == -torch.inf, 0)
    w = torch.exp2(log_w - shift[..., None])
    outputs = torch.einsum("nmrs,nmrsd->nmrd", w, drawn_v) * x.v_scale
    return SketchDecodeResult(
        outputs.mean(2).to(x.output_dtype),
        proposed.indices,
        proposed.inclusion.masked_fill(~proposed.drawn, 0),
        log_weights,
        log_normaliser,
    )
