"""Attention over a cache within a tolerance: which keys are read, and how many are drawn.

The keys of which the sketches may leave out most are read for sure. Others are drawn until the bound on the
error is small enough. `guarantee` has the theorem, the letters and what rounding adds to the bound. All is
computed in float64: in float32 the worst case of a sum of 65,536 terms would be a part of the tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..estimates import AttentionEstimate, Draws, EstimateInfo
from ..kernels.cpu_decode.reference import rows_at
from ..problem import blocks
from .attend import Call
from .guarantee import (
    DRAWN_ROUNDING,
    UNIT,
    Promise,
    error_bound,
    logit_rounding,
    planned_draws,
    psi,
    sum_rounding,
    whole_shares,
)
from .sketches import Int8Sketch
from .store import TokenStore
from .value_sketch import ValueSketch

BLOCK_ELEMENTS = 1 << 21
"""Size of a block of rows: its rows times the keys."""

ROUNDS = 3
"""How often the keys to be read are chosen anew, by what was read before."""

USUAL_RATIO = 0.2
"""|z_j| / M_j, as a root mean square, that draws are planned for before there are any."""

RATIO_DRAWS = 8
"""How many draws of the usual ratio are counted beside those that were made, where more are planned."""

FEWEST_SORTED, SORTED_SHARE = 64, 8
"""How many keys are sorted by their bounds before all of them are: at least so many, or one in so many."""

FEWEST_MORE = 4
"""The fewest draws that are made at a time."""

MARGIN = 0.97
"""The part of the allowed error for which draws are planned."""

MOST_BLOCKS = 16
"""How often more draws are made before a row is computed exactly."""

SHIFT = 0.25
"""rho over the mean distance of the values from c: how much errors of the sum of weights count."""

CANDIDATES = 1.2
"""The ratio of the numbers of keys to read that are compared."""

RESOLVED = 2.0**24
"""Bounds of logits are at least so many times their rounding, which is then next to nothing of a draw's X."""

LEAST_NORMALISER = 2.0**-500
"""Below it D_0 tells nothing: the bounds of all logits are beyond what weights can hold."""

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class _Plan:
    """What a row is to read next, each (h, r).

    `reads` is a number of keys, those with the largest M_j; `draws` the draws that follow; `exact` where all
    of this is no less than reading every key.
    """

    reads: Tensor
    draws: Tensor
    exact: Tensor


@dataclass(frozen=True)
class _Centre:
    """What follows from the keys read so far, without draws.

    Parameters
    ----------
    offset : Tensor, (h, r, 1)
        What is taken off all logits, so that no weight overflows, beside the block's `common`.
    masses : Tensor, (h, r, n)
        exp(l_j) of the keys in H, a_j of the others.
    normaliser : Tensor, (h, r, 1)
        D_0.
    output : Tensor, (h, r, d)
        c.
    shift : Tensor, (h, r, 1)
        rho.
    bounds : Tensor, (h, r, n)
        M_j; 0 in H.
    rounding : Tensor, (h, r)
        What rounding adds to R: rho_0 in `guarantee`.
    """

    offset: Tensor
    masses: Tensor
    normaliser: Tensor
    output: Tensor
    shift: Tensor
    bounds: Tensor
    rounding: Tensor


@dataclass(frozen=True)
class BoundedRows:
    """Rows within a tolerance, (N, M): in float64 until they are put together.

    Parameters
    ----------
    output : Tensor, (N, M, d)
    bound : Tensor, (N, M)
        E; for exact rows how far rounding may move them.
    log_sum_exp : Tensor, (N, M)
    keys_read : Tensor, int64, (N, M)
    draws : Tensor, int64, (N, M)
        How many draws a row took; 0 where no draw was needed.
    exact : Tensor, bool, (N, M)
    indices, weights : Tensor, (N, M, T)
        The keys read, each once, and their estimated probabilities; weight 0 fills up.
    """

    output: Tensor
    bound: Tensor
    log_sum_exp: Tensor
    keys_read: Tensor
    draws: Tensor
    exact: Tensor
    indices: Tensor
    weights: Tensor


class _Block:
    """Some rows of some heads on their way to the tolerance."""

    def __init__(
        self,
        store: TokenStore,
        sketch: Int8Sketch,
        value_sketch: ValueSketch,
        call: Call,
        promise: Promise,
        block: tuple[slice, slice],
    ):
        heads, part = block
        self.call, self.promise = call, promise
        self.features = store.features
        self.table = store.table[heads, : store.length]
        self.x = call.rows[block].double() * call.scale  # [h, r, E]
        self.block = block
        # Logits are those of the keys less their centre: a large part that all have in common rounds nothing.
        self.key_centre = sketch.centre[heads].double()  # [h, 1, E]
        self.common = torch.einsum("hre,he->hr", self.x, self.key_centre[:, 0])[..., None]
        self.sinks = None if call.sinks is None else call.sinks[block][..., None].double()
        size = sketch.key_bound(heads)[:, None, None]
        if call.softcap is not None or self.sinks is not None:  # which see the common part, too
            size = size + self.key_centre.norm(dim=-1, keepdim=True)
        self.logit_rounding = logit_rounding(self.x, size, self.sinks)  # omega, [h, r, 1]
        self.sum_rounding = sum_rounding(store.length + store.width)  # gamma
        if call.softcap is None and self.sinks is not None:
            self.sinks = self.sinks - self.common
        self.stream = call.stream(store)[heads, :]
        self.queries = torch.arange(part.start, part.stop, device=self.x.device) % max(1, call.positions)
        self.guessed = value_sketch.values(heads).double()  # u, [h, n, d]
        self.misses = value_sketch.errors(heads)[:, None]  # e, [h, 1, n]
        self.guessed_square = self.guessed.square().sum(-1)[:, None]
        places = store.places(heads)[:, None]
        scores, slack = sketch.score(self.x, heads), sketch.score_bounds(self.x, heads)
        resolved = RESOLVED * self.logit_rounding
        slack = slack + torch.where(resolved <= 1, resolved, torch.inf)
        places = places.expand_as(scores)
        self.logits = self._capped(torch.empty_like(scores).scatter_(-1, places, scores))
        self.slack = torch.empty_like(scores).scatter_(-1, places, slack)  # b; 0 once a key was read
        self.known = torch.zeros_like(scores, dtype=torch.bool)  # H
        self.read = torch.zeros_like(self.known, dtype=torch.int8)  # 1 for H and what was drawn
        self.read_indices: list[Tensor] = []
        self.read_valid: list[Tensor] = []

    def _capped(self, logits: Tensor) -> Tensor:
        """Logits (h, r, T) of centred keys, capped as a whole, which brings no two of them farther apart."""
        cap = self.call.softcap
        return logits if cap is None else cap * torch.tanh((logits + self.common) / cap)

    def _logits_of(self, keys: Tensor) -> Tensor:
        """Logits (h, r, T) of keys (h, r, T, E), as in `logits`."""
        centred = keys - self.key_centre[:, None]
        return self._capped(torch.einsum("hre,hrte->hrt", self.x, centred))

    # --- Keys that are read for sure ---

    def look_up(self, indices: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Read keys (h, r, T) where `valid`: their exact logits (h, r, T), and their values (h, r, T, d)."""
        rows = rows_at(self.table, indices).to(self.x.dtype)
        keys, values = rows[..., : self.features], rows[..., self.features :]
        logits = self._logits_of(keys)
        # A key that was drawn twice, or read before, is read once.
        ordered, place = indices.masked_fill(~valid, -1).sort(dim=-1, stable=True)
        first = F.pad(ordered[..., 1:] != ordered[..., :-1], (1, 0), value=True)
        first = torch.empty_like(valid).scatter_(-1, place, first)
        fresh = valid & first & (self.read.gather(-1, indices) == 0)
        self.read.scatter_add_(-1, indices, fresh.to(self.read.dtype))
        self.read_indices.append(indices)
        self.read_valid.append(fresh)
        return logits, values

    def learn(self, indices: Tensor, valid: Tensor) -> None:
        """Put keys (h, r, T) into H where `valid`."""
        logits, _ = self.look_up(indices, valid)
        # An index that is not valid is scattered back as it was, before those that are.
        before = self.logits.gather(-1, indices)
        self.logits.scatter_(-1, indices, torch.where(valid, logits, before))
        self.slack.scatter_(-1, indices, torch.where(valid, 0, self.slack.gather(-1, indices)))
        self.known.scatter_(-1, indices, valid | self.known.gather(-1, indices))

    def centre(self) -> _Centre:
        """What follows from the keys read so far."""
        upper = self.logits + self.slack
        offset = upper.amax(-1, keepdim=True)
        if self.sinks is not None:
            offset = torch.maximum(offset, self.sinks)
        masses, upper = (self.logits - offset).exp(), (upper - offset).exp() + TINY
        normaliser = masses.sum(-1, keepdim=True)
        if self.sinks is not None:
            normaliser = normaliser + (self.sinks - offset).exp()
        some = normaliser.clamp_min(LEAST_NORMALISER)
        total = masses @ self.guessed
        for indices, valid in zip(self.read_indices, self.read_valid, strict=True):
            values = rows_at(self.table, indices).to(total.dtype)[..., self.features :]
            off = values - rows_at(self.guessed, indices)
            total = total + torch.einsum("hrt,hrtd->hrd", masses.gather(-1, indices) * valid, off)
        output = total / some
        square = output.square().sum(-1, keepdim=True)
        distance = self.guessed_square - 2 * output @ self.guessed.mT + square
        # The square of a difference, as a difference of squares, is rounded by no more than that.
        width = output.shape[-1]
        rounded = 2 * sum_rounding(width) * (self.guessed_square + square) + width * TINY
        distance = (distance.clamp_min(0) + rounded).sqrt()
        usual = (masses * distance).sum(-1, keepdim=True) / some
        shift = SHIFT * usual + self.promise.tolerance * square.sqrt()
        bounds = (upper - masses) * (distance.square() + shift.square()).sqrt() + upper * self.misses
        bounds = bounds.masked_fill_(self.known, 0)
        # rho_0: what is off by rounding, in units of the normaliser, and weights too small for a number.
        size = (masses * (self.guessed_square.sqrt() + self.misses)).sum(-1, keepdim=True) / some
        share = 4 * (self.logit_rounding + self.sum_rounding)
        rounding = share * normaliser * (size + usual + 2 * square.sqrt() + shift)
        lost = masses.shape[-1] * TINY * (distance + self.misses).amax(-1, keepdim=True)
        return _Centre(offset, masses, normaliser, output, shift, bounds, (rounding + lost)[..., 0])

    def allowed(self, centre: _Centre) -> Tensor:
        """The R, (h, r), for which draws are planned."""
        return self.allowed_radius(centre, centre.output, centre.normaliser[..., 0])

    def allowed_radius(self, centre: _Centre, output: Tensor, normaliser: Tensor) -> Tensor:
        """The R that is planned for, (h, r), where output and D_hat will be about these."""
        tolerance, size = self.promise.tolerance, output.norm(dim=-1)
        error = MARGIN * (tolerance / (1 + tolerance) * size - self.stored_rounding(output)).clamp_min(0)
        shift = centre.shift[..., 0].clamp_min(TINY)
        radius = error / (1 + (error / shift).square()).sqrt() * normaliser
        return (radius - centre.rounding).clamp_min(0)

    def stored_rounding(self, output: Tensor) -> Tensor:
        """How far an output (h, r, d) may move as it is stored in the cache's precision, (h, r).

        It may be rounded to float32 before it is to half of that.
        """
        about, width = torch.finfo(self.table.dtype), output.shape[-1]
        once = about.eps / 2 * (output.norm(dim=-1) + math.sqrt(width) * about.tiny)
        return (1 + 2**-12) * once

    def plan(self, centre: _Centre) -> _Plan:
        """The fewest reads, (h, r): of keys with the largest bounds, and draws from the others."""
        n = self.logits.shape[-1]
        few = min(n, max(FEWEST_SORTED, n // SORTED_SHARE))
        plan, more = self._plan_among(centre, few)
        return self._plan_among(centre, n)[0] if bool(more.any()) else plan

    def _plan_among(self, centre: _Centre, most: int) -> tuple[_Plan, Tensor]:
        """The plan with at most so many reads for sure, and the rows that might do better with more."""
        n = self.logits.shape[-1]
        ladder = {min(most, round(CANDIDATES**i)) for i in range(math.ceil(math.log(most, CANDIDATES)) + 1)}
        counts = torch.tensor([0, *sorted(ladder)], device=self.x.device)
        heaviest = F.pad(centre.bounds.topk(most, -1).values, (1, 0)).cumsum(-1)[..., counts]
        left = (centre.bounds.sum(-1, keepdim=True) - heaviest).clamp_min(0)  # G after so many reads
        if most == n:
            left[..., -1] = 0
        share = self.allowed(centre)[..., None] / left.clamp_min(TINY)
        draws, _ = planned_draws(share, self.promise.risk, USUAL_RATIO**2)
        draws = torch.where(share >= 1, 0, draws.ceil())
        cost, place = (counts + draws).min(-1)
        chosen = draws.gather(-1, place[..., None])[..., 0]
        exact = ~(cost < n - self.known.sum(-1))
        plan = _Plan(counts[place].masked_fill(exact, 0), chosen.masked_fill(exact, 0).long(), exact)
        return plan, (cost >= most) & (most < n)

    def read_heaviest(self) -> tuple[_Centre, _Plan]:
        """Read the keys of which the sketches may leave out most, until the rest is for draws or nothing."""
        centre = self.centre()
        plan = self.plan(centre)
        for _ in range(ROUNDS):
            most = int(plan.reads.max())
            if not most:
                break
            indices = centre.bounds.topk(most, -1).indices
            self.learn(indices, torch.arange(most, device=indices.device) < plan.reads[..., None])
            centre = self.centre()
            plan = self.plan(centre)
        known = centre.normaliser[..., 0] >= LEAST_NORMALISER  # not where it is no number, either
        return centre, replace(plan, exact=plan.exact | ~known)

    # --- Draws ---

    def estimate(self) -> BoundedRows:
        """All rows of the block."""
        centre, plan = self.read_heaviest()
        draws = _DrawnResidual(self, centre, plan)
        output, bound, normaliser, done = draws.until_kept()
        log_sum_exp = normaliser.log() + centre.offset[..., 0]
        drawn = self._draws(log_sum_exp)
        if self.call.softcap is None:
            log_sum_exp = log_sum_exp + self.common[..., 0]
        exact = ~done
        rows = BoundedRows(
            output,
            bound,
            log_sum_exp,
            self.read.sum(-1),
            draws.count,
            exact,
            *drawn,
        )
        return self._exact(rows) if bool(exact.any()) else rows

    def _draws(self, log_sum_exp: Tensor) -> tuple[Tensor, Tensor]:
        """The keys read, and their probabilities by their exact logits: see `BoundedRows`."""
        if not self.read_indices:
            none = self.logits[..., :0]
            return none.long(), none
        indices, valid = torch.cat(self.read_indices, -1), torch.cat(self.read_valid, -1)
        keys = rows_at(self.table, indices).to(self.x.dtype)[..., : self.features]
        logits = self._logits_of(keys)
        return indices, (logits - log_sum_exp[..., None]).exp() * valid

    def _exact(self, rows: BoundedRows) -> BoundedRows:
        """The same with exact rows where they are to be exact.

        A row that draws cannot keep is often one whose values cancel, so that their bound counts rounding.
        """
        exact, n = rows.exact, self.logits.shape[-1]
        heads = exact.any(-1)
        table, x = self.table[heads].double(), self.x[heads]
        keys, values = table[..., : self.features], table[..., self.features :]
        logits = x @ keys.mT
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        largest = logits.amax(-1, keepdim=True)
        sinks = None if self.call.sinks is None else self.call.sinks[self.block][heads, :, None].double()
        omega = logit_rounding(x, keys.norm(dim=-1).amax(-1)[:, None, None], sinks)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        p = (logits - largest).exp()
        total = p.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks - largest).exp()
        p, log_sum_exp = p / total, largest + total.log()
        output = p @ values
        share = 8 * (omega[..., 0] + self.sum_rounding)
        rounding = share * ((p @ values.norm(dim=-1)[..., None])[..., 0] + output.norm(dim=-1))
        rounding = rounding + n * TINY * values.norm(dim=-1).amax(-1, keepdim=True)
        width = rows.indices.shape[-1]
        indices, weights = (F.pad(x, (0, max(0, n - width))) for x in (rows.indices, rows.weights))
        every = torch.arange(n, device=p.device).expand_as(p)
        this = exact[heads][..., None]
        rows.output[heads] = torch.where(this, output, rows.output[heads])
        rows.log_sum_exp[heads] = torch.where(this[..., 0], log_sum_exp[..., 0], rows.log_sum_exp[heads])
        bound = rounding + self.stored_rounding(output)
        rows.bound[heads] = torch.where(exact[heads], bound, rows.bound[heads])
        padding = (0, indices.shape[-1] - n)
        indices[heads] = torch.where(this, F.pad(every, padding), indices[heads])
        weights[heads] = torch.where(this, F.pad(p, padding), weights[heads])
        return replace(
            rows,
            keys_read=rows.keys_read.masked_fill(exact, n),
            indices=indices,
            weights=weights,
        )


def kept(promise: Promise, bound: Tensor, output: Tensor) -> Tensor:
    """Whether |o_hat - o| <= E implies |o_hat - o| <= eps |o|, for E `bound` (...) and `output` (..., d)."""
    size = output.norm(dim=-1)
    # Both may be infinite, where squares of values are beyond all numbers.
    return ((1 + promise.tolerance) * (1 + 2**-40) * bound <= promise.tolerance * size) & bound.isfinite()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _DrawnResidual:
    """The estimate of Z by draws, which end when its bound is small enough."""

    def __init__(self, block: _Block, centre: _Centre, plan: _Plan):
        self.block, self.centre, self.plan = block, centre, plan
        self.shares, unit = whole_shares(centre.bounds)
        self.total = unit * 2.0**UNIT  # G, [h, r]
        self.bounds = self.shares * unit[..., None]  # M_j as they are drawn by, [h, r, n]
        self.reached = self.shares.cumsum(-1)
        self.known_total = (1 + block.sum_rounding) * centre.bounds.sum(-1)  # no less than G without draws
        zero = torch.zeros_like(self.total)
        self.rates, self.spent, self.squares = zero, zero, zero  # L, sum psi |X|^2, sum |X|^2
        self.sums = zero.new_zeros(*zero.shape, centre.output.shape[-1] + 1)  # sum lambda X
        self.count = torch.zeros_like(zero, dtype=torch.int64)

    def until_kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """o_hat, E, D_hat and whether the tolerance is kept, of all rows."""
        block, n = self.block, self.block.logits.shape[-1]
        output, bound, normaliser = self.estimate()
        done = kept(block.promise, bound, output)
        nothing = done | self.plan.exact | ~(self.total > 0)
        more_draws = self.plan.draws.clamp_min(FEWEST_MORE).masked_fill(nothing, 0)
        most = n - block.known.sum(-1)
        for _ in range(MOST_BLOCKS):
            more_draws = torch.where(self.count + more_draws <= most, more_draws, 0)
            if not bool(more_draws.any()):
                break
            self.draw(more_draws)
            new, new_bound, new_normaliser = self.estimate()
            drawn = more_draws > 0
            output = torch.where(drawn[..., None], new, output)
            bound = torch.where(drawn, new_bound, bound)
            normaliser = torch.where(drawn, new_normaliser, normaliser)
            done = done | drawn & kept(block.promise, new_bound, new)
            more_draws = self._more(output, normaliser).masked_fill(done | ~drawn, 0)
        return output, bound, normaliser, done

    def estimate(self) -> tuple[Tensor, Tensor, Tensor]:
        """o_hat (h, r, d), E (h, r) and D_hat (h, r)."""
        centre, block = self.centre, self.block
        rates = self.rates.clamp_min(TINY)
        residual = self.total[..., None] * self.sums / rates[..., None]
        log = math.log(2 / block.promise.risk)
        radius = self.total * ((log + self.spent) / rates + DRAWN_ROUNDING)
        radius = torch.where(self.count > 0, radius, self.known_total)
        shift = centre.shift[..., 0]
        normaliser = centre.normaliser[..., 0] + residual[..., -1] / shift.clamp_min(TINY)
        change = residual[..., :-1] / normaliser[..., None]
        output, moved = centre.output + change, change.norm(dim=-1)
        size = moved + centre.output.norm(dim=-1)
        rounding = centre.rounding + block.sum_rounding * normaliser.abs() * (size + shift)
        moved = moved + block.sum_rounding * size  # |o_hat - c| of the rounded output
        bound = error_bound(radius + rounding, normaliser, moved, shift)
        return output, bound + block.stored_rounding(output), normaliser

    def _more(self, output: Tensor, normaliser: Tensor) -> Tensor:
        """How many more draws are planned, (h, r)."""
        block = self.block
        share = block.allowed_radius(self.centre, output, normaliser) / self.total
        rate, square = self.rate(share)
        needed = math.log(2 / block.promise.risk) + self.spent - self.rates * share
        gain = (rate * share - psi(rate) * square).clamp_min(TINY)
        most = float(2 * block.logits.shape[-1])
        return (needed / gain).nan_to_num(most).clamp(FEWEST_MORE, most).ceil().long()

    def rate(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """lambda of the next draws, and the mean |X|^2 that is expected, by those before."""
        count = self.count.to(share.dtype)
        square = (self.squares + RATIO_DRAWS * USUAL_RATIO**2) / (count + RATIO_DRAWS)
        return planned_draws(share, self.block.promise.risk, square)[1], square

    def draw(self, more_draws: Tensor) -> None:
        """Draw and read `more_draws` (h, r) keys."""
        block, centre = self.block, self.centre
        most = int(more_draws.max())
        allowed = block.allowed(centre)
        rate, _ = self.rate(allowed / self.total)
        # A row's draws are its next numbers, whatever the rows beside it have drawn.
        turns = torch.arange(most, device=more_draws.device)
        numbers = block.stream.uniform(1, int((self.count + more_draws).max()))[:, block.queries, 0]
        numbers = numbers.gather(-1, (self.count[..., None] + turns).clamp_max(numbers.shape[-1] - 1))
        points = (numbers * 2.0**UNIT).long()  # the first bits of each number, all alike
        indices = torch.searchsorted(self.reached, points, right=True).clamp_max(self.reached.shape[-1] - 1)
        valid = turns < more_draws[..., None]
        logits, values = block.look_up(indices, valid)
        mass, guessed = (logits - centre.offset).exp(), rows_at(block.guessed, indices)
        guessed_mass = centre.masses.gather(-1, indices)
        away, excess = guessed - centre.output[..., None, :], mass - guessed_mass
        residual = excess[..., None] * away + mass[..., None] * (values - guessed)
        residual = torch.cat((residual, (excess * centre.shift)[..., None]), -1)
        bounds = self.bounds.gather(-1, indices).clamp_min(TINY)
        x = residual / bounds[..., None] * valid[..., None]  # X, [h, r, T, d + 1]
        square = ((x.norm(dim=-1) + DRAWN_ROUNDING) * valid).square().sum(-1)
        drawn = more_draws > 0
        self.rates = self.rates + rate * more_draws
        self.sums = self.sums + rate[..., None] * x.sum(-2)
        self.spent = self.spent + torch.where(drawn, psi(rate) * square, 0)
        self.squares, self.count = self.squares + square, self.count + more_draws


def attend_within(
    store: TokenStore, sketch: Int8Sketch, value_sketch: ValueSketch, call: Call, promise: Promise
) -> AttentionEstimate:
    """The estimate of attention over all tokens of the store, within the tolerance.

    Parameters
    ----------
    store : TokenStore
    sketch : Int8Sketch
    value_sketch : ValueSketch
    call : Call
        Of its rule nothing is used.
    promise : Promise
    """
    shape = (call.rows.shape[0], call.rows.shape[1])
    step = BLOCK_ELEMENTS // max(store.length, 1)
    parts = [
        (block, _Block(store, sketch, value_sketch, call, promise, block).estimate())
        for block in (blocks(shape, step) if shape[1] else ())
    ]
    rows = _together(parts, shape, call.rows.new_empty(*shape, store.width))
    return _estimate(store, sketch, value_sketch, call, promise, rows)


def _together(
    parts: list[tuple[tuple[slice, slice], BoundedRows]], shape: tuple[int, int], like: Tensor
) -> BoundedRows:
    """The rows of all blocks; `like` is (N, M, d), in the precision of the weights."""
    most = max((rows.indices.shape[-1] for _, rows in parts), default=0)
    integers = {"keys_read", "draws", "indices"}
    columns: dict[str, Tensor] = {}
    for name in ("bound", "log_sum_exp", "keys_read", "draws", "exact"):
        dtype = torch.int64 if name in integers else torch.bool if name == "exact" else torch.float64
        columns[name] = torch.zeros(shape, dtype=dtype, device=like.device)
    columns["output"] = like.double()
    columns["indices"] = torch.zeros(*shape, most, dtype=torch.int64, device=like.device)
    columns["weights"] = like.new_zeros(*shape, most)
    for block, rows in parts:
        for name, x in vars(rows).items():
            columns[name][block] = F.pad(x, (0, most - x.shape[-1])) if name in ("indices", "weights") else x
    return BoundedRows(**columns)


def _estimate(
    store: TokenStore,
    sketch: Int8Sketch,
    value_sketch: ValueSketch,
    call: Call,
    promise: Promise,
    rows: BoundedRows,
) -> AttentionEstimate:
    row_shape = call.q.shape[:-1]
    exact, total = int(rows.exact.sum()), rows.exact.numel()
    fallbacks: tuple[str, ...] = ()
    if exact:
        fallbacks = (
            f"{exact:,} of {total:,} rows were computed exactly: to keep tolerance={promise.tolerance:g} "
            f"with confidence={1 - promise.risk:g} they need as many reads as there are keys.",
        )
    small = int((~kept(promise, rows.bound, rows.output)).sum())
    if small:
        fallbacks += (
            f"{small:,} of {total:,} rows may miss tolerance={promise.tolerance:g} by rounding alone: their "
            f"outputs are too small beside their values, or for {_name(store.table.dtype)}.",
        )
    size = rows.output.norm(dim=-1)
    relative = torch.where(size > 0, rows.bound / size.clamp_min(TINY), torch.inf)
    relative = relative.nan_to_num(torch.inf, torch.inf)  # of squares beyond all numbers nothing is known
    relative = (relative * (1 + 2**-20)).to(store.dtype)  # not below what it was
    draws = Draws(rows.indices, rows.weights, rows.weights, 1)
    return AttentionEstimate(
        output=rows.output.view(*row_shape, store.width).to(store.table.dtype),
        num_keys=store.length,
        degrees_of_freedom=math.inf,
        make_draws=lambda: draws.view(row_shape),
        make_std_error=None,
        group=call.group,
        info=EstimateInfo(
            sampler=f"cache, {sketch.proposal}",
            unbiased=False,
            tolerance=promise.tolerance,
            confidence=1 - promise.risk,
            draws_per_row=rows.keys_read.view(row_shape),
            predicted_relative_error=relative.view(row_shape),
            fallbacks=fallbacks,
            cache={
                "proposal": sketch.proposal,
                "tokens": store.length,
                "components": sketch.rank,
                "levels": sketch.levels,
                "exact_keys": sketch.exact_keys.shape[1],
                "sketch_bytes": sketch.scanned_nbytes + value_sketch.scanned_nbytes,
                "rows_without_draws": int(((rows.draws == 0) & ~rows.exact).sum()),
                "rows_drawn": int(((rows.draws > 0) & ~rows.exact).sum()),
                "rows_exact": exact,
            },
            log_sum_exp="estimated",
        ),
        make_log_sum_exp=lambda: rows.log_sum_exp.to(store.dtype).view(row_shape),
    )
