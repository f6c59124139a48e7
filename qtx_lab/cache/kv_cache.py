"""`SampledKVCache`: keys and values kept for decoding, attended to by reading a small sketch and then few of them."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count, check_finite, check_generator, check_scale, check_tensors
from ..errors import ArgumentError, DtypeError, ShapeError, unknown_name
from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse, rounding_variance
from ..kernels.choice import choose_cpu, triton_considered
from ..kernels.sketch_decode.reference import FITTED_KEYS, GrowingSketch, Sketch, int4_sketch, low_rank_sketch
from ..problem import blocks
from ..samplers import SystematicSampler
from ..samplers.base import Uniform, invert, row_masses
from ..samplers.learned_estimators import delta_terms
from ..samplers.learned_proposal import best_low_rank
from ..samplers.value_order import value_order
from ..storage import read_tensors, write_tensors
from .kernel_path import attend_sketched

if TYPE_CHECKING:
    from ..kernels.cpu_decode import Found, Scanned

P = ParamSpec("P")
T = TypeVar("T")
PROPOSALS = ("exact", "low-rank", "int4")
SINKS, RECENT, BLOCK = 4, 64, 256
"""The first `SINKS` tokens and the last `RECENT` are never sketched, nor are up to `BLOCK` that wait for a segment."""
ORDER_FEATURES, ORDER_LEAF = 16, 8
"""Of the value order: with all features and down to single keys it takes some ten times as long at d = 128, and errors on
the reference model's own keys were the same to 2 %."""
RIDGE = 1e-4
"""Of the mean variance of the queries seen, added in all directions: the next query may be another."""
FARTHEST = 8.0
"""A sketched component is cut off at that many times the largest of the keys fitted to."""
OUTLIER = 1 / 256
"""The share of a channel's largest keys that int4 keeps as they are."""
FIRST_RATE, NEWTON_STEPS = 2.0, 2
"""Where the search for the draws a unit of mass starts, in draws, and its steps: see `_limit`."""
PIECE = 1 << 14
"""Keys whose scores are summed up together: few enough to stay in a processor's own cache."""
HALF_RANGE, LEAST = 6e4, 1e-30
BLOCK_ELEMENTS = 1 << 24
"""Size of a block of queries: keys, or draws times features, whichever is more, over its rows."""

SEEING = threading.Lock()
"""Threads may attend to a cache at the same time; nothing else may go on while it is appended to."""

FEWEST_FOR_KERNEL = 16
"""Draws below which the kernel's error bars, of the keys drawn alone, say too little."""

SAVED = ("proposal", "rank", "defensive", "features", "seen")


def as_usual(method: Callable[P, T]) -> Callable[P, T]:
    """Whatever mode the caller is in: no autocast, no gradients, and tensors that may be changed outside inference mode."""

    @functools.wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> T:
        tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return method(*args, **options)

    return call


class SampledKVCache:
    """Keys and values of the tokens so far, of which a query reads all of a sketch and few rows.

    For a query x the sketch gives a score l~_j near scale x . k_j for every key, and a proposal

        q_j = (1 - epsilon) softmax_j(l~) + epsilon / n.

    Key j is drawn with probability pi_j = min(1, c q_j), c such that sum_j pi_j is S: the heaviest surely, none twice,
    as by `HeadTailSampler`, by systematic points along the values' order (`value_order`). The exact logits l_j of the
    drawn keys alone then weigh them, w_j proportional to exp(l_j) / pi_j (Hajek 1971): the self-normalised estimate of
    `LearnedImportanceSampler`, with its error bars, which take keys to be in random order: in value order they err on the
    safe side. Biased by O(1 / S); exact where every key is drawn.

    Sketches:

    - `exact`: the keys. All of k is read, v only at the draws.
    - `low-rank`: `rank` numbers a key, in half precision. Keys are kept in a basis fitted by `best_low_rank` to them and to
      the queries seen so far (all directions alike where none was seen), all E components, half of float32 keys' memory
      again; a query reads the `rank` components that matter most to it, by the size of its own times the keys' spread.
      (Choosing components by the query is SparQ's idea: Ribar and others 2023; there among the channels themselves.)
    - `int4`: 4 bits a number, in steps of its channel's; the `OUTLIER` largest of a channel, and what is appended out
      of its range, are kept beside.

    The first `SINKS` tokens and the last `RECENT` to `RECENT + BLOCK` have exact logits (not in the GPU's kernel, which
    scans one sketch of all tokens: `qtx_lab.kernels.sketch_decode`). Tokens that leave that window are put in value order
    among themselves, as a segment, and segments are merged and ordered anew once all those after one hold as many tokens:
    O(log n) times a token, at most log2(n / BLOCK) segments. A merger of all fits the sketch anew.

    Every query sees the whole cache: no masks, no gradients.

    Examples
    --------
    >>> import torch
    >>> g = torch.Generator().manual_seed(0)
    >>> k, v = (torch.randn(2, 500, 16, generator=g) for _ in range(2))
    >>> cache = SampledKVCache.build(k, v, proposal="low-rank", rank=8)
    >>> cache.append(k[:, :1], v[:, :1])
    >>> est = cache.attend(torch.randn(4, 1, 16, generator=g), num_samples=64, generator=g)  # two queries a key head
    >>> len(cache), est.output.shape, est.std_error.shape
    (501, torch.Size([4, 1, 16]), torch.Size([4, 1, 16]))
    """

    _growing: GrowingSketch | None = None
    """The sketch for the kernel, where that is used."""

    @as_usual
    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        *,
        proposal: str = "low-rank",
        rank: int | None = None,
        defensive: float = 0.02,
        queries: Tensor | None = None,
    ):
        if proposal not in PROPOSALS:
            raise unknown_name("proposal", proposal, PROPOSALS)
        _check(k, v)
        features = k.shape[-1]
        if proposal != "low-rank" and rank is not None:
            raise ArgumentError(f"rank={rank} is for proposal='low-rank' only; given {proposal!r}.")
        rank = min(16, features) if rank is None else rank
        check_count("rank", rank)
        if rank > features:
            raise ArgumentError(f"rank={rank} is not allowed: it must be at most E={features}.")
        if not isinstance(defensive, int | float) or not 0 < defensive < 1:
            raise ArgumentError(f"defensive={defensive!r} is not allowed: it must be between 0 and 1.")
        self.proposal, self.rank, self.defensive = proposal, int(rank), float(defensive)
        self.lead, self.heads, self.length = k.shape[:-2], k.shape[:-2].numel(), 0
        self.features, self.dtype = features, torch.promote_types(k.dtype, torch.float32)
        self.moment = torch.zeros(self.heads, features, features, dtype=torch.float64, device=k.device)
        self.seen = 0  # queries in `moment`, a head
        self._asked: list[Tensor] = []  # those that are not in it yet, `_waiting` of a head
        self._waiting = 0
        self._table = k.new_empty(self.heads, 0, features + v.shape[-1])  # k and v side by side
        self._order = torch.empty(self.heads, 0, dtype=torch.int64, device=k.device)
        self._maps: dict[str, Tensor] = {}  # what all segments are sketched by
        self._segments: list[dict[str, Tensor]] = []
        self._sizes: list[int] = []
        self._sums = torch.zeros(2, self.heads, 1, v.shape[-1], dtype=torch.float64, device=v.device)
        if queries is not None:
            rows, _ = self._rows(queries)
            check_finite("queries", queries)
            self._see(rows)
        self.append(k, v)

    @classmethod
    def build(
        cls,
        k: Tensor,
        v: Tensor,
        proposal: str = "low-rank",
        rank: int | None = None,
        *,
        defensive: float = 0.02,
        queries: Tensor | None = None,
    ) -> SampledKVCache:
        """A cache of these tokens.

        Parameters
        ----------
        k : Tensor, (..., Hkv, n, E), n >= 1
        v : Tensor, (..., Hkv, n, Ev)
            float32, float64, float16 or bfloat16, as k; both are copied.
        proposal : {"exact", "low-rank", "int4"}
        rank : int, optional
            r of the low-rank sketch, 16 where None (or E, if less).
        defensive : float
            epsilon, 0 < epsilon < 1, the weight of the proposal's uniform part.
        queries : Tensor, (..., H, L, E), optional
            Queries that a low-rank sketch is fitted to, as those of the prompt.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            If shapes or dtypes do not fit, numbers are not finite, or an argument is not allowed.
        """
        return cls(k, v, proposal=proposal, rank=rank, defensive=defensive, queries=queries)

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"SampledKVCache({self.length} tokens, {self.heads} heads, {self.proposal!r}, {self.nbytes:,} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, sketch, order, and room to grow."""
        held = [self._table, self._order, self.moment, self._sums, *self._maps.values()]
        return sum(x.nbytes for part in (*self._segments, {}) for x in part.values()) + sum(
            x.nbytes for x in held
        )

    def sketch_nbytes(self) -> int:
        """Bytes of it that one query of each key head reads in full: the sketch, and the keys that have none."""
        sketched = 0 if self.proposal == "exact" else sum(self._sizes)
        plain = (self.length - sketched) * self.features * self.heads * self._table.element_size()
        held = sum(x.nbytes for part in self._segments for x in part.values())
        return plain + (held * self.rank // self.features if self.proposal == "low-rank" else held)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Keys (..., Hkv, n, E) and values (..., Hkv, n, Ev), copied, in the order in which they came."""
        n = self.length
        back = self._order[:, :n].argsort(-1)[..., None].expand(-1, -1, self._table.shape[-1])
        found = self._table[:, :n].gather(1, back).view(*self.lead, n, -1)
        return found[..., : self.features], found[..., self.features :]

    # --- Growing ------------------------------------------------------------------------------

    @as_usual
    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens: k (..., Hkv, m, E) and v (..., Hkv, m, Ev), as those of `build`.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            As `build`; the cache is then as it was.
        """
        _check(k, v)
        widths = {"k": self.features, "v": self._table.shape[-1] - self.features}
        for name, x in (("k", k), ("v", v)):
            if x.dtype != self._table.dtype:
                raise DtypeError(f"{name} is {x.dtype}; the cache holds {self._table.dtype}.")
            if x.shape[:-2] != self.lead or x.shape[-1] != widths[name]:
                raise ShapeError(
                    f"{name} is {tuple(x.shape)} {x.dtype}; the cache holds (..., n, features) = "
                    f"{(*self.lead, self.length, widths[name])} {self._table.dtype}."
                )
        k, v = (x.detach().reshape(self.heads, *x.shape[-2:]) for x in (k, v))
        start, end = self.length, self.length + k.shape[1]
        self._table, self._order = _grown(self._table, start, end), _grown(self._order, start, end)
        self._table[:, start:end, : self.features] = k
        self._table[:, start:end, self.features :] = v
        self._order[:, start:end] = torch.arange(start, end, device=k.device)
        self._sums = self._sums.clone()  # estimates hold on to what it was
        for held, x in zip(self._sums, (v, v.to(self.dtype).square()), strict=True):
            held += x.sum(1, keepdim=True, dtype=torch.float64)
        self.length = end
        waiting = end - sum(self._sizes) - SINKS - RECENT
        if waiting >= BLOCK:
            self._settle(waiting)

    def _settle(self, waiting: int) -> None:
        """Make a segment of the oldest tokens that have none, and merge it with those before that are no larger."""
        laid = sum(self._sizes)
        sizes = [*self._sizes, waiting]
        first = next(i for i in range(len(sizes)) if sizes[i] <= sum(sizes[i + 1 :]) or i == len(sizes) - 1)
        start, end = sum(sizes[:first]), laid + waiting
        place = torch.arange(end + SINKS - start, device=self._order.device)
        sinks = (place >= laid - start) & (place < laid - start + SINKS)  # they go behind the segment
        moved = place[~sinks]
        order = value_order(self._values(start, end + SINKS)[:, moved], ORDER_FEATURES, ORDER_LEAF)
        self._move(start, torch.cat((moved[order], place[sinks].expand(self.heads, -1)), 1))
        self._sizes = [*sizes[:first], end - start]
        k = self._keys(start, end).to(self.dtype)
        if first == 0:
            self._maps = self._fitted(k)
        self._segments[first:] = [self._sketched(k)]

    def _keys(self, start: int, end: int, heads: slice = slice(None)) -> Tensor:
        return self._table[heads, start:end, : self.features]

    def _values(self, start: int, end: int) -> Tensor:
        return self._table[:, start:end, self.features :]

    def _move(self, start: int, index: Tensor) -> None:
        """Put in place start + i what is in place start + index_i, index (N, m)."""
        for x in (self._table, self._order):
            some = x[:, start : start + index.shape[1]]
            some.copy_(some.gather(1, index if x.ndim == 2 else index[..., None].expand_as(some)))

    def _fitted(self, k: Tensor) -> dict[str, Tensor]:
        """Maps or steps to sketch keys by, fitted to k (N, m, E)."""
        if self.proposal == "exact":
            return {}
        centre = k.mean(1, keepdim=True)
        if self.proposal == "low-rank":
            some = k[:, :: -(-k.shape[1] // FITTED_KEYS)]
            a, b = best_low_rank(self._queries(), some, self.features)
            found = (some - centre) @ b
            peak = found.abs().amax(1, keepdim=True).clamp_min(torch.finfo(self.dtype).tiny)
            spread = (found / peak).square().mean(1, keepdim=True).sqrt()
            return {"centre": centre, "a": a * peak, "b": b / peak, "spread": spread}
        kept = max(1, round(OUTLIER * k.shape[1]))
        largest = (k - centre).abs().topk(kept + 1, 1).values[:, -1:]  # that is not kept beside
        return {"centre": centre, "step": (largest / 7).clamp_min(torch.finfo(self.dtype).tiny)}

    def _sketched(self, k: Tensor) -> dict[str, Tensor]:
        """The sketch of keys (N, m, E)."""
        if self.proposal == "exact":
            return {}
        k = k - self._maps["centre"]
        if self.proposal == "low-rank":
            low = torch.bmm(k, self._maps["b"]).clamp(-FARTHEST, FARTHEST).half()
            width = min(k.shape[1], PIECE)
            pieces = F.pad(low, (0, 0, 0, -k.shape[1] % width)).unflatten(1, (-1, width))
            return {"low": pieces.permute(1, 0, 3, 2).contiguous()}  # [pieces, N, E, width]
        scaled = k / self._maps["step"]
        level = scaled.round().clamp(-7, 7)
        head, key, channel = (x.contiguous() for x in (scaled.abs() > 7.5).nonzero(as_tuple=True))
        rest = ((scaled - level) * self._maps["step"])[head, key, channel]
        nibbles = F.pad((level + 8).to(torch.uint8), (0, k.shape[-1] % 2)).mT  # [N, E, m]
        packed = (nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).contiguous()  # [N, E / 2, m]
        return {"packed": packed, "head": head, "key": key, "channel": channel, "rest": rest}

    def _see(self, q: Tensor) -> None:
        """Remember queries (N, M, E): by their second moment, but for the latest, which cost less together."""
        with SEEING:
            self._asked.append(q)
            self._waiting += q.shape[1]
            if self._waiting >= q.shape[-1]:
                self._sum_up()

    def _sum_up(self) -> None:
        if self._asked:
            q = torch.cat(self._asked, 1).double()
            self.moment += q.mT @ q
            self.seen, self._asked, self._waiting = self.seen + q.shape[1], [], 0

    def _queries(self) -> Tensor:
        """E queries a head that have the second moment of those seen, and a little more, (N, E, E)."""
        with SEEING:
            self._sum_up()
        eye = torch.eye(self.features, dtype=torch.float64, device=self.moment.device)
        if not self.seen:
            return eye.expand_as(self.moment).to(self.dtype)
        values, vectors = torch.linalg.eigh(self.moment * (self.features / self.seen))
        values = values.clamp_min(0) + RIDGE * values.mean(-1, keepdim=True)
        return (values.sqrt()[..., None] * vectors.mT).to(self.dtype)

    # --- Attending ------------------------------------------------------------------------------

    @as_usual
    def attend(
        self,
        q: Tensor,
        num_samples: int = 64,
        *,
        replicates: int = 1,
        scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> AttentionEstimate:
        """Estimate softmax(q k^T scale) v over all tokens held.

        Parameters
        ----------
        q : Tensor, (..., H, L, E)
            H a multiple of Hkv; query head h uses key head h // (H / Hkv). The heads of a group share their random
            numbers. Low-rank sketches remember its second moment for when they are fitted next.
        num_samples : int
            S, the draws of a row and replicate.
        replicates : int
            R independent repetitions, averaged.
        scale : float, optional
            1 / sqrt(E) where None.
        generator : torch.Generator, optional
            The only source of randomness; torch's default generator of the device where None.

        Returns
        -------
        AttentionEstimate
            `std_error` by the delta method, as for `LearnedImportanceSampler`; indices count tokens as they came. Draws
            that found no key that was not drawn yet have weight 0. float32 on the CPU is attended to by a kernel, which
            numba compiles at the first call of all (some ten seconds; then it is kept on disk), others by plain torch or
            Triton: `diagnostics["kernel"]` says which and why.

        Raises
        ------
        ShapeError, DtypeError, ArgumentError
            Before any work.
        """
        check_count("num_samples", num_samples)
        check_count("replicates", replicates)
        check_generator(generator)
        rows, group = self._rows(q)
        check_scale(scale)
        scale = 1 / math.sqrt(self.features) if scale is None else float(scale)
        told: dict[str, Any] = {}
        kernels = triton_considered(q)
        choice = None if kernels else choose_cpu((rows, self._table))
        if choice is None or choice.path != "cpu":  # that kernel looks at q itself
            check_finite("q", q)
        if kernels and (self.proposal == "exact" or num_samples < FEWEST_FOR_KERNEL):
            reason = "it takes sketches; sampled_attention has one for exact keys"
            if self.proposal != "exact":
                reason = f"it takes {FEWEST_FOR_KERNEL} draws or more"
            told = {"kernel": KernelUse("torch", reason)}
        elif kernels:
            self._growing = self._growing or GrowingSketch(self._kernel_sketch)
            k, v, order = (
                self._keys(0, self.length),
                self._values(0, self.length),
                self._order[:, : self.length],
            )
            options: dict[str, Any] = {
                "num_samples": num_samples,
                "replicates": replicates,
                "scale": scale,
                "generator": generator,
            }
            laid, epsilon = tuple(self._sizes), self.defensive
            done, told = attend_sketched(
                q, rows, k, v, order, self._growing, laid, defensive=epsilon, **options
            )
            if done is not None:
                if self.proposal == "low-rank":
                    self._see(rows)
                return self._with_rounding(done, num_samples * replicates)
        if choice is not None:
            cpu = choice.path == "cpu"
            use = KernelUse("cpu" if cpu else "torch", choice.reason, "cpu_decode" if cpu else None)
            told = {"kernel": use, "fallbacks": choice.fallbacks}
        (n, m), total, row_shape = rows.shape[:2], num_samples * replicates, q.shape[:-1]
        uniform = Uniform(generator, q.device)
        shares: Tensor | tuple[Tensor, ...]
        if told["kernel"].path == "cpu":
            u = uniform(n, q.shape[-2], replicates)  # of `SystematicSampler`'s points (s + u) / S
            found = self._draw_compiled(rows, scale, u, num_samples, row_shape)
            if found is None:
                check_finite("q", q)
                raise ArgumentError("logits holds NaN or +inf; only finite numbers and -inf are allowed.")
            indices, shares, rate, output, effective = found
        else:
            x = rows * scale
            points = SystematicSampler().points((n, q.shape[-2]), num_samples, replicates, uniform)
            points = points.flatten(-2).repeat(1, group, 1)
            step = BLOCK_ELEMENTS // max(self.length, total * self._table.shape[-1])
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
                parts = [
                    self._draw(x[heads, part], points[heads, part], heads, num_samples)
                    for heads, part in blocks((n, m), step)
                ]
            if len(parts) > 1:
                columns = zip(*([x.flatten(0, 1) for x in block] for block in parts), strict=True)
                parts = [tuple(torch.cat(x).unflatten(0, (n, m)) for x in columns)]
            place, weights, proposed, pi, rate, output = parts[0]
            shares = weights, proposed, pi
            indices = self._order[:, None].expand(-1, m, -1).gather(-1, place)
            effective = Draws(indices, weights).effective_sample_size().view(row_shape)
            output = output.view(*row_shape, output.shape[-1]).to(self._table.dtype)
        if self.proposal == "low-rank":
            self._see(rows)
        length, sums = self.length, self._sums  # tokens may come and move until error bars are asked for

        @as_usual
        def std_error_of(output: Tensor) -> Tensor:
            # Draws that count for nothing are keys of their own, which no other is taken for.
            weights, proposed, pi = shares
            none = length + torch.arange(total, device=indices.device)
            apart = Draws(torch.where(weights > 0, indices, none), weights, None, replicates)
            now = self._order[:, : self.length].argsort(-1)
            rows = self._drawn(now[:, None].expand(-1, m, -1).gather(-1, indices), slice(0, n))
            drawn = rows[..., self.features :]
            found = output.view(n, m, output.shape[-1])
            error = _std_error(apart, proposed, pi, rate, drawn, found, sums / length, self._table.dtype)
            return error.view(output.shape)

        return AttentionEstimate(
            output=output,
            num_keys=self.length,
            degrees_of_freedom=math.inf,
            make_draws=lambda: Draws(indices, shares[0], None, replicates).view(row_shape),
            make_std_error=lambda: std_error_of(output),
            group=group,
            info=EstimateInfo(
                sampler=f"cache, {self.proposal}",
                unbiased=False,
                num_samples=num_samples,
                replicates=replicates,
                draws_per_row=total,
                effective_sample_size=effective,
                **told,
            ),
        )

    def _with_rounding(self, estimate: AttentionEstimate, total: int) -> AttentionEstimate:
        """The kernel's estimate; its standard errors know of draws, not of rounding."""
        size = (self._sums[1] / self.length).sqrt().to(torch.float32)  # [N, 1, Ev]
        make, output, dtype = estimate.make_std_error, estimate.output, self._table.dtype

        def with_rounding() -> Tensor:
            assert make is not None
            found = make()
            rows = output.reshape(self.heads, -1, output.shape[-1]).float()
            rounding = rounding_variance(rows, size, total, dtype).view(found.shape)
            return (found.square() + rounding).sqrt()

        return replace(estimate, make_std_error=with_rounding)

    def _kernel_sketch(self, k: Tensor) -> Sketch:
        """What the kernel scans in place of the segments: one table of keys (N, n, E), `rank` numbers of each or 4 bits."""
        return (
            low_rank_sketch(k, self.rank, queries=self._queries())
            if self.proposal == "low-rank"
            else int4_sketch(k)
        )

    @as_usual
    def scores(self, q: Tensor, scale: float | None = None) -> Tensor:
        """What the sketch takes the logits of queries q (..., H, L, E) to be, but for a shift of each row:
        (..., H, L, n), tokens as they came. For plots and tests."""
        rows, _ = self._rows(q)
        check_finite("q", q)
        check_scale(scale)
        scale = 1 / math.sqrt(self.features) if scale is None else float(scale)
        found = self._scores(rows * scale, slice(0, self.heads))
        order = self._order[:, None, : self.length].expand_as(found)
        return torch.empty_like(found).scatter_(-1, order, found).view(*q.shape[:-1], self.length)

    def _draw_compiled(
        self, rows: Tensor, scale: float, offsets: Tensor, num_samples: int, row_shape: tuple[int, ...]
    ) -> Found | None:
        """As `_draw`, with tokens in place of places, for all queries (N, M, E); points are (s + offset) / S."""
        search = (self.defensive, FIRST_RATE, NEWTON_STEPS, LEAST)
        return _kernel().draw(rows, scale, offsets, self._scanned(), num_samples, row_shape, search)

    def _scanned(self) -> Scanned:
        """What the CPU's kernel reads. Made for each call: its addresses outlive no change and go into no copy."""
        maps = self._maps
        segments: list[tuple[int, ...]] = []
        for keys, part in zip(self._sizes, self._segments, strict=True):
            if self.proposal == "low-rank":
                segments.append((keys, part["low"].shape[-1], part["low"].data_ptr(), 0, 0, 0, 0, 0))
            elif self.proposal == "int4":
                names = ("packed", "head", "key", "channel", "rest")
                held = [part[name].data_ptr() for name in names]
                segments.append((keys, keys, *held, len(part["rest"])))
        if not maps:  # keys are scanned themselves
            return _kernel().Scanned("exact", self.length, 0, self._table, self._order)
        size = maps["spread" if self.proposal == "low-rank" else "step"]
        laid = (self.length, self.rank, self._table, self._order, segments, maps["centre"], size)
        return _kernel().Scanned(self.proposal, *laid, maps.get("a"))

    def _draw(self, x: Tensor, points: Tensor, heads: slice, num_samples: int) -> tuple[Tensor, ...]:
        """Of scaled queries x (heads, M, E) at points (heads, M, T): places, weights, q and pi of the draws, each
        (heads, M, T), the draws a unit of q (heads, M, 1), and the output (heads, M, Ev)."""
        mass = row_masses(self._scores(x, heads))
        limit, total = _limit(mass, self.length, num_samples, self.defensive)
        last = num_samples * limit.double()
        place, held = invert(torch.minimum(mass, limit), points, scale=last)
        proposed = mass.gather(-1, place)
        pi = (proposed / limit).clamp_(max=1)
        rows = self._drawn(place, heads).flatten(0, 1)
        k, v = rows[..., : self.features], rows[..., self.features :]  # [N M, T, E]
        log_w = torch.bmm(x.flatten(0, 1)[:, None], k.mT).view(place.shape) - pi.log()
        log_w.masked_fill_(points * last >= held, -torch.inf)  # past the last key
        apart, log_w = (
            y.unflatten(-1, (points.shape[-1] // num_samples, num_samples)) for y in (place, log_w)
        )
        # A key of pi = 1 holds one point, or two by rounding.
        log_w[..., 1:].masked_fill_(apart[..., 1:] == apart[..., :-1], -torch.inf)
        weights = (log_w.softmax(-1) / log_w.shape[-2]).flatten(-2)
        output = torch.bmm(weights.flatten(0, 1)[:, None], v).view(*x.shape[:2], v.shape[-1])
        return place, weights, proposed / total, pi, total / limit, output

    def _drawn(self, place: Tensor, heads: slice) -> Tensor:
        """Keys and values, side by side, at places (heads, M, T): (heads, M, T, E + Ev)."""
        first = torch.arange(heads.start, heads.stop, device=place.device) * self._table.shape[1]
        return F.embedding(place + first[:, None, None], self._table.flatten(0, 1)).to(self.dtype)

    def _scores(self, x: Tensor, heads: slice) -> Tensor:
        """Logits of scaled queries (heads, M, E) by the sketch, in the order of the places: (heads, M, n)."""
        if self.proposal == "exact" or not self._segments:
            return torch.bmm(x, self._keys(0, self.length, heads).to(self.dtype).mT)
        scores, start = x.new_empty(*x.shape[:2], self.length), 0
        score = self._score_low_rank(x, heads) if self.proposal == "low-rank" else self._score_int4(x, heads)
        for size, part in zip(self._sizes, self._segments, strict=True):
            score(part, scores[..., start : start + size])
            start += size
        shift = torch.bmm(x, self._maps["centre"][heads].mT)  # sketches are of centred keys
        scores[..., start:] = torch.baddbmm(
            shift, x, self._keys(start, self.length, heads).to(self.dtype).mT, beta=-1
        )
        return scores

    def _score_low_rank(self, x: Tensor, heads: slice) -> Callable[[dict[str, Tensor], Tensor], None]:
        component = torch.bmm(x, self._maps["a"][heads])
        first = torch.arange(heads.start, heads.stop, device=x.device)[:, None, None] * self.features
        most = (component.abs() * self._maps["spread"][heads]).topk(self.rank, sorted=False).indices
        weight = component.gather(-1, most)
        unit = (weight.abs().sum(-1, keepdim=True) * (FARTHEST / HALF_RANGE)).clamp_min(
            1
        )  # so that none overflows
        bags, weight = (most + first).flatten(0, 1), (weight / unit).flatten(0, 1).half()

        large = bool((unit > 1).any())

        def score(part: dict[str, Tensor], out: Tensor) -> None:
            for low, piece in zip(part["low"], out.split(part["low"].shape[-1], -1), strict=True):
                found = F.embedding_bag(bags, low.flatten(0, 1), per_sample_weights=weight, mode="sum")
                piece.copy_(found[:, : piece.shape[-1]].view(piece.shape))
            if large:
                out.mul_(unit)

        return score

    def _score_int4(self, x: Tensor, heads: slice) -> Callable[[dict[str, Tensor], Tensor], None]:
        step = F.pad(x * self._maps["step"][heads], (0, self.features % 2))
        shift = step.sum(-1, keepdim=True) * -8  # levels are kept + 8

        def score(part: dict[str, Tensor], out: Tensor) -> None:
            packed = part["packed"][heads]
            low = torch.baddbmm(shift, step[..., ::2], (packed & 15).to(x.dtype))
            low.baddbmm_(step[..., 1::2], (packed >> 4).to(x.dtype))
            mine = (part["head"] >= heads.start) & (part["head"] < heads.stop)
            head, key, channel, rest = (part[name][mine] for name in ("head", "key", "channel", "rest"))
            head = head - heads.start
            low.transpose(1, 2).index_put_((head, key), x[head, :, channel] * rest[:, None], accumulate=True)
            out.copy_(low)

        return score

    def _rows(self, q: Tensor) -> tuple[Tensor, int]:
        """q (..., H, L, E), which may hold anything, as rows (N, G L, E), and G."""
        check_tensors(q=q)
        lead = self.lead
        heads = q.shape[-3] if q.ndim > 2 else 1
        each = lead[-1] if lead else 1
        fits = q.ndim == len(lead) + 2 and q.shape[:-3] == lead[:-1] and heads and heads % each == 0
        if not fits or q.shape[-1] != self.features:
            raise ShapeError(
                f"q has shape {tuple(q.shape)}; to keys {(*lead, self.length, self.features)} it must be "
                "(..., H, L, features), H a multiple of the keys' heads."
            )
        group = heads // each
        return q.detach().to(self.dtype).reshape(self.heads, group * q.shape[-2], self.features), group

    # --- On disk ------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write tokens, order and sketch as safetensors.

        Raises
        ------
        StorageError
            If the file cannot be written.
        """
        self._sum_up()
        self._growing = None  # this one's kernel fits its sketch anew then, as that of what is read back does
        n = self.length
        tensors = {"table": self._table[:, :n], "order": self._order[:, :n]}
        tensors |= {"moment": self.moment, "sums": self._sums}
        for i, part in enumerate([self._maps, *self._segments]):
            tensors |= {f"{i}.{name}": x for name, x in part.items()}
        about = {"lead": list(self.lead), "sizes": self._sizes}
        about |= {name: getattr(self, name) for name in SAVED}
        write_tensors(path, tensors, {"sampled_kv_cache": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> SampledKVCache:
        """The cache that `save` wrote, on the CPU: the same draws from the same generator.

        Raises
        ------
        ArgumentError
            If the file is missing or holds something else.
        """
        cache = cls.__new__(cls)
        try:
            tensors, metadata = read_tensors(path)
            about: Mapping[str, Any] = json.loads(metadata["sampled_kv_cache"])
            for name in SAVED:
                setattr(cache, name, about[name])
            cache.lead, cache._sizes = torch.Size(about["lead"]), list(about["sizes"])
            cache._table, cache._order = tensors["table"], tensors["order"]
            cache.moment, cache._sums = tensors["moment"], tensors["sums"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"path={str(path)!r} does not hold a cache: {error}") from error
        cache.heads, cache.length = cache._table.shape[:2]
        cache.dtype = torch.promote_types(cache._table.dtype, torch.float32)
        cache._asked, cache._waiting = [], 0
        parts: list[dict[str, Tensor]] = [{} for _ in range(1 + len(cache._sizes))]
        for name, x in tensors.items():
            number, _, of = name.partition(".")
            if of:
                parts[int(number)][of] = x
        cache._maps, *cache._segments = parts
        return cache


def _limit(mass: Tensor, n: int, num_samples: int, defensive: float) -> tuple[Tensor, Tensor]:
    """The mass from which a key of rows of masses (N, M, n and padding) is sure, 1 / c, and the total, each (N, M, 1).

    Adds the defensive part to `mass`. c solves sum_j min(1, c mass_j) = S by Newton's steps. The sum is concave in c: from
    its first step on it is not above S, and what is left of S after the last are draws without a key. Two steps leave under
    3 % of them on the reference model's rows.
    """
    total = mass.sum(-1, keepdim=True)
    mass[..., :n] += total * (defensive / (1 - defensive) / n)
    total = total / (1 - defensive)
    if n <= num_samples:  # the sum is never S: every key is drawn
        return torch.full_like(total, LEAST), total
    most, work = total / num_samples, torch.empty_like(mass)
    limit = most / FIRST_RATE
    for _ in range(NEWTON_STEPS):
        sure = torch.ge(mass, limit, out=work).sum(-1, keepdim=True)
        light = torch.minimum(mass, limit, out=work).sum(-1, keepdim=True).addcmul_(sure, limit, value=-1)
        limit = (light / (num_samples - sure)).clamp_min(LEAST)
        # Where as many were sure as there are draws, the search started too far out.
        limit = torch.minimum(torch.where(sure < num_samples, limit, most), most)
    return limit, total


def _std_error(
    draws: Draws,
    proposed: Tensor,
    pi: Tensor,
    rate: Tensor,
    drawn: Tensor,
    output: Tensor,
    moments: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Standard errors (N, M, d): `learned_estimators.Spread`, from the values drawn (N, M, T, d) and the mean of v and
    of v^2 over all keys."""
    a, unseen = delta_terms(draws, proposed, pi, rate)
    mean, square = moments  # [N, 1, d]
    spread = (square - mean.square()).clamp_min(0) + (mean - output).square()
    variance = torch.einsum("nmt,nmtd->nmd", a, (drawn - output[..., None, :]).square())
    variance = (variance + (unseen * spread).to(variance.dtype)) / draws.replicates
    rounding = rounding_variance(output, square.sqrt().to(output.dtype), draws.indices.shape[-1], dtype)
    return (variance + rounding).sqrt()


@functools.cache
def _kernel() -> Any:
    """The module of the CPU's kernel: numba takes a second to import."""
    from ..kernels import cpu_decode

    return cpu_decode


def _grown(x: Tensor, used: int, needed: int) -> Tensor:
    """x with room for `needed` along dimension 1, of which the first `used` hold something: a quarter more, where it grows."""
    if x.shape[1] >= needed:
        return x
    larger = x.new_zeros(
        x.shape[0], needed if used == 0 else max(needed, used + used // 4 + BLOCK), *x.shape[2:]
    )
    larger[:, :used] = x[:, :used]
    return larger


def _check(k: Tensor, v: Tensor) -> None:
    """Refuse what cannot be kept."""
    check_tensors(k=k, v=v)
    if k.shape[:-1] != v.shape[:-1] or 0 in (*k.shape, v.shape[-1]):
        raise ShapeError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be (..., n, features), alike but for their features, with "
            "at least one token and one feature."
        )
    for name, x in (("k", k), ("v", v)):
        check_finite(name, x)
