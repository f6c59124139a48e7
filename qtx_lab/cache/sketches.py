"""What proposes keys: sketches, a few small numbers a key from which every logit of a row is guessed."""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_count
from ..errors import ArgumentError
from ..kernels.sketch_decode.reference import SketchTable
from ..samplers.learned_proposal import best_low_rank
from .store import ROOM, grown

FITTED_KEYS = 8192
"""A sketch is fitted to no more keys than that, evenly spread."""

EXACT_SHARE, FEWEST_EXACT = 1 / 256, 4
"""The keys that a sketch represents worst have exact logits: this share of them, and at least so many."""

RIDGE = 1e-4
"""How much of the queries' mean variance is added in all directions, because the next query may differ."""

REFIT_GROWTH = 1.25
"""A sketch is fitted anew when there are this many times the keys that it was fitted to.

On SmolLM2's keys, growing from 1,000 to 2,000, 16 components then have .69 times the error that they have
with one fit for each doubling.
"""

SMALLEST_STEP = 1e-9
"""The least step of a component over the largest one. Later keys may vary where the fitted ones do not."""

DEFAULT_RANK = 32
"""Components of a low-rank sketch: at a byte each as much as 16 in half precision."""

DEFAULT_MIXED_RANK = 24
"""Components of a mixed sketch: 8 bytes a key."""

STEP_FACTORS = torch.logspace(-2, 1, 19, 2.0).tolist()
"""Steps that a mixed sketch tries, in units of the one that suits normally distributed numbers."""


class QueryMoment:
    """The second moment of the queries that a cache has seen: which directions of the keys matter.

    Threads may add queries at the same time.

    Parameters
    ----------
    heads, features : int
    device : torch.device
    """

    def __init__(self, heads: int, features: int, device: torch.device):
        self.total = torch.zeros(heads, features, features, dtype=torch.float64, device=device)
        """Sum of q q^T, (N, E, E)."""
        self.count = 0
        """Queries of a head in `total`."""
        self._latest: list[Tensor] = []  # summed up together, which costs less
        self._waiting = 0  # queries of a head in `_latest`
        self._lock = threading.Lock()

    def __getstate__(self) -> tuple[Tensor, int]:
        self.sum_up()
        return self.total, self.count

    def __setstate__(self, state: tuple[Tensor, int]) -> None:
        self.total, self.count = state
        self._latest, self._waiting = [], 0
        self._lock = threading.Lock()  # a lock has no copy

    def add(self, queries: Tensor) -> None:
        """Remember queries (N, M, E)."""
        with self._lock:
            self._latest.append(queries)
            self._waiting += queries.shape[1]
            if self._waiting >= queries.shape[-1]:
                self._sum_up()

    def sum_up(self) -> None:
        """Let `total` and `count` hold all queries."""
        with self._lock:
            self._sum_up()

    def _sum_up(self) -> None:
        if self._latest:
            q = torch.cat(self._latest, 1).double()
            self.total += q.mT @ q
            self.count, self._latest, self._waiting = self.count + q.shape[1], [], 0

    def root(self) -> Tensor:
        """E queries a head with the second moment of those seen and a little more, float64, (N, E, E).

        All directions count equally where none was seen.
        """
        self.sum_up()
        features = self.total.shape[-1]
        if not self.count:
            return torch.eye(features, dtype=torch.float64, device=self.total.device).expand_as(self.total)
        values, vectors = torch.linalg.eigh(self.total * (features / self.count))
        values = values.clamp_min(0) + RIDGE * values.mean(-1, keepdim=True)
        return values.sqrt()[..., None] * vectors.mT

    def select(self, heads: Tensor) -> QueryMoment:
        """The moment of some of the heads, int64, (N',), with repetitions."""
        self.sum_up()
        chosen = QueryMoment(len(heads), self.total.shape[-1], self.total.device)
        chosen.total, chosen.count = self.total[heads], self.count
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.total.nbytes + sum(x.nbytes for x in self._latest)


class ComponentSketch(ABC):
    """Base of the sketches: components of the keys in whole numbers, the same on every device.

    A key's components are its coordinates in the basis that loses least of the logits (`best_low_rank`,
    for the queries seen so far), in steps of each component's own. The keys that they represent worst,
    sinks among them, have exact logits. A sketch is fitted to the keys held, and again whenever a quarter
    more are held; keys that are appended between are sketched as the others are.

    Parameters
    ----------
    rank : int
        r, the components of a key.
    """

    proposal: ClassVar[str]
    levels: ClassVar[int]
    """The largest size of a stored whole number."""
    clipped_share: ClassVar[float] = 0.0
    """The share of a component's numbers that are cut off, so that the steps of the others are smaller."""
    mixed: ClassVar[bool] = False
    """Whether components have 4 and 2 bits, which the Triton kernel does not scan."""
    bounded: ClassVar[bool] = False
    """Whether it knows how far each guessed logit may be from the exact one: see `Int8Sketch`."""
    saved_tensors: ClassVar[tuple[str, ...]] = ("centre", "weight", "key_map", "exact_keys")
    """What has to be saved beside the lines."""
    headroom: ClassVar[float] = 1.0
    """How many times as large the numbers of later keys may be: those of slow rotary components drift."""

    def __init__(self, rank: int):
        self.rank = rank
        self.length = 0
        """Keys sketched."""
        self.fitted_length = 0
        """Keys that there were when the sketch was fitted."""
        none = torch.empty(0)
        self.centre, self.weight, self.key_map, self.exact_keys = none, none, none, none
        self.storage = none
        """Lines, as they lie in memory: by components on CPUs, by keys on GPUs; see `lines`."""

    @classmethod
    @abstractmethod
    def pack(cls, levels: Tensor) -> Tensor:
        """Whole numbers (N, m, r), as floats, as they are stored: (N, m, columns)."""

    @classmethod
    @abstractmethod
    def unpack(cls, lines: Tensor, rank: int) -> Tensor:
        """Stored lines (N, m, columns) as whole numbers (N, m, r)."""

    @property
    def lines(self) -> Tensor:
        """What is stored of each key, in the order of the places: (N, n, columns), a view."""
        return self._by_key(self.storage)[:, : self.length]

    def _by_key(self, storage: Tensor) -> Tensor:
        return storage if storage.is_cuda else storage.mT

    def needs_fit(self, length: int) -> bool:
        """Whether a sketch of so many keys should be fitted anew."""
        return length >= REFIT_GROWTH * self.fitted_length

    def fit(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Fit to keys (N, n, E) in the order of arrival, and to queries (N, M, E); then call `place`.

        Returns
        -------
        Tensor, int64, (N, T)
            The keys that are represented worst.
        """
        self.centre = keys.mean(1, keepdim=True)
        n, some = keys.shape[1], keys[:, :: -(-keys.shape[1] // FITTED_KEYS)]
        to_query, to_key = best_low_rank(queries.to(keys.dtype), some, self.rank)
        step = self._steps((some - self.centre) @ to_key)
        self.weight, self.key_map = to_query * step, to_key / step
        centred = keys - self.centre
        levels = self._levels(centred)
        missed = (centred - levels @ self.weight.mT) @ queries.to(keys.dtype).mT
        count = _exact_count(n)
        self.fitted_length = n
        self._store(self.pack(levels))
        self.exact_keys = keys[:, :count]
        return missed.square().sum(-1).topk(count, 1).indices

    def restore(self, tensors: Mapping[str, Tensor], lines: Tensor, fitted_length: int) -> None:
        """Be the sketch that these tensors and lines (N, n, columns) were saved of."""
        self.centre, self.weight, self.key_map = tensors["centre"], tensors["weight"], tensors["key_map"]
        self.exact_keys, self.fitted_length = tensors["exact_keys"], fitted_length
        self._store(lines)

    def _store(self, lines: Tensor) -> None:
        self.length = lines.shape[1]
        if lines.is_cuda:
            self.storage = lines.contiguous()
            return
        self.storage = lines.new_zeros(lines.shape[0], lines.shape[2], _apart(self.length))
        self._by_key(self.storage)[:, : self.length] = lines

    def _steps(self, components: Tensor) -> Tensor:
        """The step of each component, (N, 1, r), from components (N, m, r).

        `levels` steps reach to the largest number of a component, but for the keys that lie farthest out,
        and for the share of numbers that are cut off.
        """
        size = _without_farthest(components).abs_()
        cut = int(self.clipped_share * size.shape[1])
        return _no_tiny_steps(size.topk(cut + 1, 1).values[:, -1:] * (self.headroom / self.levels))

    def _levels(self, centred: Tensor) -> Tensor:
        return (centred @ self.key_map).round_().clamp_(-self.levels, self.levels)

    def extend(self, keys: Tensor) -> None:
        """Sketch more keys (N, m, E), at the last places."""
        start, end = self.length, self.length + keys.shape[1]
        packed = self.pack(self._levels(keys - self.centre))
        room = self._by_key(self.storage).shape[1]
        if end > room:
            larger = self.storage.new_zeros(
                (*self.storage.shape[:2], _apart(end + start // 4 + ROOM))
                if not self.storage.is_cuda
                else (self.storage.shape[0], end + start // 4 + ROOM, self.storage.shape[2])
            )
            self._by_key(larger)[:, :start] = self.lines
            self.storage = larger
        self._by_key(self.storage)[:, start:end] = packed
        self.length = end

    def reorder(self, index: Tensor) -> None:
        """Let the line of place j be the one that was at place index_j; index (N, n)."""
        columns = self.lines.mT  # by components
        columns.copy_(columns.gather(2, index[:, None].expand(-1, columns.shape[1], -1)))

    def shorten(self, length: int) -> bool:
        """Keep the lines at the first `length` places alone; returns whether the sketch is still good."""
        self.length, self.fitted_length = length, min(self.fitted_length, length)
        return self.exact_keys.shape[1] <= length

    def crop(self, index: Tensor) -> bool:
        """Keep the lines at places index (N, m) alone, in that order.

        Returns whether the sketch is still good: not where a key with exact logits is gone, and the sketch
        has to be fitted anew.
        """
        lines = self.lines.gather(1, index[..., None].expand(-1, -1, self.lines.shape[-1]))
        holds = self.shorten(index.shape[1])
        self.lines.copy_(lines)
        exact = self.exact_keys.shape[1]
        first = torch.arange(exact, device=index.device)
        return holds and bool((index[:, :exact] == first).all())

    def select(self, heads: Tensor) -> Self:
        """A sketch with some of the heads, int64, (N',), with repetitions; its memory is its own."""
        chosen = copy.copy(self)
        for name in ("centre", "weight", "key_map", "exact_keys", "storage"):
            vars(chosen)[name] = vars(self)[name][heads]
        return chosen

    def place(self, places: Tensor, keys: Tensor) -> None:
        """After `fit` to keys (N, n, E): have the key at each place, places (N, n), the worst first."""
        self.reorder(places)
        first = places[:, : self.exact_keys.shape[1], None].expand(-1, -1, keys.shape[-1])
        self.exact_keys = keys.gather(1, first) - self.centre

    def fit_in_order(self, keys: Tensor, queries: Tensor | None = None) -> Tensor:
        """Fit to keys (N, n, E), with the worst at the first places and the others as they come.

        All directions of the queries count equally where None. Returns the key at each place, int64, (N, n).
        """
        if queries is None:
            queries = torch.eye(keys.shape[-1], device=keys.device).expand(keys.shape[0], -1, -1)
        rank = torch.zeros(keys.shape[:2], device=keys.device).scatter_(1, self.fit(keys, queries), -1)
        places = rank.argsort(dim=1, stable=True)
        self.place(places, keys)
        return places

    @classmethod
    def table_of(cls, k: Tensor, rank: int | None = None, queries: Tensor | None = None) -> SketchTable:
        """What a kernel scans of keys k (..., Hkv, n, E): a sketch of `rank` components, fitted to them.

        The rank is E where None.
        `queries`, (..., H, L, E), are what it is fitted to besides; all directions of queries count
        equally where None.
        """
        keys = k.detach().flatten(0, -3).float()
        if queries is not None:
            queries = queries.detach().float().reshape(len(keys), -1, k.shape[-1])
        sketch = cls(k.shape[-1] if rank is None else rank)
        return sketch.scanned(sketch.fit_in_order(keys, queries))

    def score(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        """Guessed logits of scaled queries (heads, M, E), up to a shift of each row: (heads, M, n).

        They are in the order of the places.
        """
        levels = self.unpack(self.lines[heads], self.rank).to(x.dtype)
        scores = torch.bmm(torch.bmm(x, self.weight[heads].to(x.dtype)), levels.mT)
        exact = self.exact_keys[heads].to(x.dtype)
        scores[..., : exact.shape[1]] = torch.bmm(x, exact.mT)
        return scores

    def scanned(self, order: Tensor) -> SketchTable:
        """What the Triton kernel scans, with the token at each place, order (N, n)."""
        lines = self.lines
        table = lines if lines.stride(-1) == 1 else lines.contiguous()
        return SketchTable(table, self.weight, self.centre[:, 0], self.exact_keys.shape[1], order)

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room to grow."""
        return sum(x.nbytes for x in (self.storage, self.centre, self.weight, self.key_map, self.exact_keys))

    @property
    def scanned_nbytes(self) -> int:
        """Bytes that a query of each key head reads in full."""
        return self.lines.nbytes + self.exact_keys.nbytes


class LowRankSketch(ComponentSketch):
    """The `rank` components that matter most to the queries, a byte each."""

    proposal = "low-rank"
    levels = 127
    headroom = 1.25

    @classmethod
    def pack(cls, levels: Tensor) -> Tensor:
        """Whole numbers (N, m, r), as floats, as int8 (N, m, r)."""
        return levels.to(torch.int8)

    @classmethod
    def unpack(cls, lines: Tensor, rank: int) -> Tensor:
        """The lines as they are."""
        return lines


class Int8Sketch(LowRankSketch):
    """All components of a key, a byte each, and how far each key is from what is stored of it.

    With y = W^T x the query in components and g_j numbers near the components of key j, of which the whole
    numbers m_j are stored, let e_j = g_j - m_j and r_j = k_j - centre - W g_j, which is 0 but for rounding
    where the maps have full rank. Then

        x . (k_j - centre) - y . m_j = y . e_j + x . r_j,    at most |y|_1 max_i |e_ji| + |x| |r_j|.

    This holds for every query, every key and any g_j, also for a later key that is cut off. Bounds of both
    numbers are stored in half precision: 4 bytes a key.

    *Rounding.* Let u be half the distance of 1 from the next number, gamma_n = n u / (1 - n u), E the
    features, r the components, W_i the columns of W and C = sum_i |W_i|. A computed dot product of n terms
    is within gamma_n sum |a_i b_i| of the exact one, in any order and with fused multiply-adds or without
    (Higham 2002, eq. 3.5). So the computed y_i is within gamma_E |x| |W_i| of y_i, and at most
    (1 + gamma_E) |x| |W_i|; the computed score, with m_j of at most `levels`, is within

        levels |x| C (gamma_E + gamma_r (1 + gamma_E)) <= gamma levels |x| C,    gamma = 2 (E + r + 16) u,

    of y . m_j, and |y|_1 at most (1 + gamma) times its computed value and gamma |x| C. This is larger than
    rounding of the score itself wherever y cancels: where keys lie far out in a direction that the query
    hardly has. The keys of exact scores are rounded once, as k_j - centre in the sketch's precision u', which
    moves their scores by at most (u' + gamma) |x| |k_j - centre|. What is stored, e_j and r_j, is computed in
    float64, with a bound of the rounding of r_j added; `rounded_up` has room for the rest, and norms and sums
    of numbers that are not negative err by a factor of at most 1 + gamma.

    Source: Higham, Accuracy and stability of numerical algorithms (2002), chapter 3.
    """

    proposal = "int8"
    bounded = True
    headroom = 1.0
    saved_tensors = (*LowRankSketch.saved_tensors, "slack")

    def __init__(self, rank: int):
        super().__init__(rank)
        self.slack = torch.empty(0, dtype=torch.float16)
        """max_i |e_ji| and |r_j| of the key at each place, (N, n or more, 2)."""

    def fit(self, keys: Tensor, queries: Tensor) -> Tensor:
        """Fit to keys and queries: see `ComponentSketch.fit`."""
        worst = super().fit(keys, queries)
        self.slack = self._slack(keys, self.lines)
        return worst

    def restore(self, tensors: Mapping[str, Tensor], lines: Tensor, fitted_length: int) -> None:
        """Be the sketch that was saved: see `ComponentSketch.restore`."""
        super().restore(tensors, lines, fitted_length)
        self.slack = tensors["slack"]

    def extend(self, keys: Tensor) -> None:
        """Sketch more keys: see `ComponentSketch.extend`."""
        start = self.length
        super().extend(keys)
        self.slack = grown(self.slack, start, self.length)
        self.slack[:, start : self.length] = self._slack(keys, self.lines[:, start:])

    def reorder(self, index: Tensor) -> None:
        """Move what is stored of the keys: see `ComponentSketch.reorder`."""
        super().reorder(index)
        self.slack[:, : self.length] = self.slack.gather(1, index[..., None].expand(-1, -1, 2))

    def crop(self, index: Tensor) -> bool:
        """Keep some of the keys: see `ComponentSketch.crop`."""
        self.slack = self.slack.gather(1, index[..., None].expand(-1, -1, 2))
        return super().crop(index)

    def select(self, heads: Tensor) -> Self:
        """A sketch with some of the heads: see `ComponentSketch.select`."""
        chosen = super().select(heads)
        chosen.slack = self.slack[heads]
        return chosen

    def score_bounds(self, x: Tensor, heads: slice = slice(None)) -> Tensor:
        """The most by which `score` of scaled queries (heads, M, E) may be wrong: (heads, M, n).

        In the order of the places, for the shift x . centre of each row; rounding of the score in the
        precision of x is a part of it (see the class).
        """
        slack = self.slack[heads, : self.length].to(x.dtype)
        weight = self.weight[heads].to(x.dtype)
        gamma = self._gamma(x.dtype)
        norm = x.norm(dim=-1, keepdim=True)
        rounding = gamma * norm * weight.norm(dim=1).sum(-1)[:, None, None]  # gamma |x| C
        size = torch.bmm(x, weight).abs().sum(-1, keepdim=True) + rounding  # |y|_1
        bounds = size * slack[:, None, :, 0] + norm * slack[:, None, :, 1] + self.levels * rounding
        exact = self.exact_keys[heads]
        rounded_once = torch.finfo(exact.dtype).eps / 2 + gamma
        bounds[..., : exact.shape[1]] = rounded_once * norm * exact.to(x.dtype).norm(dim=-1)[:, None]
        return bounds * (1 + gamma)

    def key_bound(self, heads: slice = slice(None)) -> Tensor:
        """A bound of |k_j - centre| of all keys, by what is stored: float64, (heads,)."""
        largest = self.slack[heads, : self.length].double().amax(1)
        columns = self.weight[heads].double().norm(dim=1).sum(-1)
        return (columns * (self.levels + largest[:, 0]) + largest[:, 1]) * (1 + self._gamma(torch.float64))

    def _gamma(self, dtype: torch.dtype) -> float:
        """gamma in this precision."""
        return (sum(self.weight.shape[-2:]) + 16) * torch.finfo(dtype).eps

    def _slack(self, keys: Tensor, lines: Tensor) -> Tensor:
        """Bounds of max_i |e_ji| and |r_j| for keys (N, m, E) with these lines: float16, (N, m, 2)."""
        weight, centred = self.weight.double(), keys.double() - self.centre.double()
        components = centred @ self.key_map.double()  # g
        rounded = (components - lines.double()).abs().amax(-1)
        rest = (centred - components @ weight.mT).norm(dim=-1)
        size = centred.norm(dim=-1) + (components.abs() @ weight.norm(dim=1)[..., None])[..., 0]
        return rounded_up(torch.stack((rounded, rest + self._gamma(torch.float64) * size), -1))

    @property
    def nbytes(self) -> int:
        """Bytes held, with the room to grow."""
        return super().nbytes + self.slack.nbytes

    @property
    def scanned_nbytes(self) -> int:
        """Bytes that a query of each key head reads in full."""
        return super().scanned_nbytes + self.slack[:, : self.length].nbytes


def rounded_up(x: Tensor) -> Tensor:
    """Numbers that are not negative, in half precision and not below what they were.

    They stay above them by a factor of 1 + 2^-12 at the least, for what rounding took from x before and for
    what it takes from products with them.
    """
    return (x * (1 + 2**-10) + 2**-23).to(torch.float16)


class Int4Sketch(ComponentSketch):
    """All components, 4 bits each: component i and component ceil(r / 2) + i share a byte.

    Components rather than the keys' own channels: a query weighs all channels, and the rounding of the
    large ones would drown the directions in which keys hardly differ.
    """

    proposal = "int4"
    levels = 7
    clipped_share = 1 / 256

    @classmethod
    def pack(cls, levels: Tensor) -> Tensor:
        """Whole numbers (N, m, r), as floats, as uint8 (N, m, ceil(r / 2))."""
        low, high = F.pad(levels + 8, (0, levels.shape[-1] % 2), value=8).to(torch.uint8).chunk(2, -1)
        return low | high << 4

    @classmethod
    def unpack(cls, lines: Tensor, rank: int) -> Tensor:
        """Lines (N, m, ceil(r / 2)) as int8 (N, m, r)."""
        return torch.cat((lines & 15, lines >> 4), -1)[..., :rank].to(torch.int8) - 8


class MixedSketch(ComponentSketch):
    """The `rank` components that matter most, ceil(r / 3) of them in 4 bits each and the others in 2.

    For a given number of bytes the error is the least where each component's own error is alike (the reverse
    water-filling of rate-distortion theory: Cover and Thomas, Elements of Information Theory, 2006, theorem
    10.3.3): those that vary most have more bits. On SmolLM2's keys, 24 components in 8 bytes are as good as
    16 of 8 bits in 16, and 48 components in 16 bytes are nearly as good as 64 of 4 bits in 32.

    The components of 4 bits are stored as by `Int4Sketch`; of the others, four a byte: component i of q =
    ceil((r - ceil(r / 3)) / 4) in the lowest bits, then q + i, 2 q + i and 3 q + i, as 0 to 3 for -3, -1, 1
    and 3.
    """

    proposal = "mixed"
    levels = 7
    mixed = True

    @staticmethod
    def upper(rank: int) -> int:
        """How many components have 4 bits."""
        return -(-rank // 3)

    @classmethod
    def pack(cls, levels: Tensor) -> Tensor:
        """Whole numbers (N, m, r), as floats, as uint8 (N, m, ceil(u / 2) + ceil((r - u) / 4))."""
        upper, lower = levels.tensor_split((cls.upper(levels.shape[-1]),), -1)
        stored = F.pad(lower, (0, -lower.shape[-1] % 4), value=-3).add(3).div(2).to(torch.uint8)
        quads = stored.unflatten(-1, (4, -1)).unbind(-2)
        packed = quads[0] | quads[1] << 2 | quads[2] << 4 | quads[3] << 6
        return torch.cat((Int4Sketch.pack(upper), packed), -1)

    @classmethod
    def unpack(cls, lines: Tensor, rank: int) -> Tensor:
        """Stored lines as int8 (N, m, r)."""
        upper = cls.upper(rank)
        pairs, quads = lines.tensor_split((-(-upper // 2),), -1)
        stored = torch.cat([quads >> shift & 3 for shift in (0, 2, 4, 6)], -1)[..., : rank - upper]
        return torch.cat((Int4Sketch.unpack(pairs, upper), 2 * stored.to(torch.int8) - 3), -1)

    def _steps(self, components: Tensor) -> Tensor:
        """Those with the least squared error, but for the keys that lie farthest out.

        The step of a component of 2 bits is half the distance of its levels.
        """
        upper = self.upper(components.shape[-1])
        components = _without_farthest(components)
        normal = torch.full_like(components[:1, :1], 0.335)  # Max, Quantizing for minimum distortion, 1960
        normal[..., upper:] = 0.498
        normal = normal * components.square().mean(1, keepdim=True).sqrt()
        least, best = torch.full_like(normal, torch.inf), normal
        for factor in STEP_FACTORS:
            step = _no_tiny_steps(normal * factor)
            error = components - self._rounded(components / step) * step
            error = error.square().mean(1, keepdim=True)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
        return best

    def _rounded(self, x: Tensor) -> Tensor:
        upper, lower = x.tensor_split((self.upper(x.shape[-1]),), -1)
        lower = (lower / 2).floor().mul(2).add(1).clamp(-3, 3)
        return torch.cat((upper.round().clamp(-self.levels, self.levels), lower), -1)

    def _levels(self, centred: Tensor) -> Tensor:
        return self._rounded(centred @ self.key_map)


def _without_farthest(components: Tensor) -> Tensor:
    """Components (N, m, r), copied, with 0 for the keys that lie farthest out."""
    spread = components.square().mean(1, keepdim=True).sqrt()
    size = components.abs() / spread.clamp_min(torch.finfo(components.dtype).tiny)
    farthest = size.amax(-1).topk(_exact_count(components.shape[1]), 1).indices  # [N, T]
    return components.scatter(1, farthest[..., None].expand(-1, -1, components.shape[-1]), 0)


def _no_tiny_steps(step: Tensor) -> Tensor:
    least = step.amax(-1, keepdim=True) * SMALLEST_STEP
    return torch.maximum(step, least).clamp_min(torch.finfo(step.dtype).tiny)


def _apart(length: int) -> int:
    """Numbers of a line with room for this many, an odd number of cache lines of 64 bytes.

    Lines that are a multiple of 4,096 bytes apart would share a few places of a core's first cache: the scan
    of 32 lines of 65,536 numbers took 161 µs then, and 125 µs otherwise.

    >>> _apart(8192), _apart(8193)
    (8256, 8256)
    """
    return 64 * (-(-length // 64) | 1)


def _exact_count(n: int) -> int:
    """Keys of n that have exact logits."""
    return min(n, max(FEWEST_EXACT, round(EXACT_SHARE * n)))


SKETCHES: dict[str, type[ComponentSketch]] = {
    x.proposal: x for x in (LowRankSketch, Int8Sketch, Int4Sketch, MixedSketch)
}
PROPOSALS = ("exact", *SKETCHES)
"""`exact` proposes keys by their exact logits, without a sketch."""


def make_sketch(proposal: str, rank: int | None, features: int) -> ComponentSketch | None:
    """The sketch of a proposal, not fitted yet; None for `exact`.

    Raises
    ------
    ArgumentError
        If the rank is not allowed.
    """
    if proposal not in ("low-rank", "mixed") and rank is not None:
        raise ArgumentError(
            f"rank={rank} is for proposal='low-rank' and proposal='mixed' only; given {proposal!r}."
        )
    if rank is not None:
        rank = check_count("rank", rank)
        if rank > features:
            raise ArgumentError(f"rank={rank} is not allowed: it must be at most E={features}.")
    if proposal == "exact":
        return None
    if proposal == "int4":
        return Int4Sketch(features)
    if proposal == "int8":
        return Int8Sketch(features)
    if proposal == "mixed":
        return MixedSketch(int(rank) if rank is not None else min(DEFAULT_MIXED_RANK, features))
    return LowRankSketch(int(rank) if rank is not None else min(DEFAULT_RANK, features))
