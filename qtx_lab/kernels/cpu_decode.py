"""A cache's rows on the CPU, compiled by numba: sketch, draws, exact logits and output, a row at a time in a core's cache.

The reference is `SampledKVCache._draw`: the same scores and points give the same draws, but for rounding.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

KINDS = ("exact", "low-rank", "int4")
LOW_RANK, INT4 = 1, 2
CHUNK = 2048
"""Keys whose scores are summed up together: they stay in the first cache."""
BLOCK = 64
"""Keys a block of the inversion: blocks are passed by whole until the one that holds a point."""
TILE = 8
"""Rows of a head that read a chunk of the sketch together."""
AHEAD = 16
"""Draws whose keys and values are asked for in advance."""
STRETCH, NEXT = 128, 1024
"""Keys of a component between two requests for what comes next, and how far that is, in bytes."""
GROUP = 16
"""Channels whose 4-bit levels, times weights of 8 bits, are summed in 16 bits: 16 * 15 * 127 < 2^15."""
SUMS = {"contract", "reassoc", "nsz"}
"""What sums may do to be vectorised: change their order, not overlook infinities."""

zero: Any = np.float32(0)
one: Any = np.float32(1)
built_in: Any = intrinsic  # a call has one argument less than mypy is told


@built_in
def _pointer(typing: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@built_in
def _next(typing: Any, address: Any) -> Any:
    """The number at an address, which is one more from then on, whoever else does so."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        at = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", at, number(1), "monotonic")

    return types.int64(types.int64), generate


@built_in
def _prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, to read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@built_in
def _half(typing: Any, bits: Any) -> Any:
    """The float32 of a float16's bits, by the processor's own instruction where it has one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple, _, features = context.codegen().magic_tuple()
        single, word = ir.FloatType(), ir.IntType(32)
        if "+f16c" in features or triple.startswith(("aarch64", "arm64")):
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), single)
        # The exponent in its place, 112 too small; the sign is where sign extension put it.
        moved = builder.and_(builder.shl(builder.sext(args[0], word), word(13)), word(0x8FFFE000))
        return builder.fmul(builder.bitcast(moved, single), single(2.0**112))

    return types.float32(types.int16), generate


@njit(fastmath={"contract"})  # in this order, or the reduction of x loses its last digits
def _exp(x: Any) -> Any:
    """e^x, x <= 0, to 2e-7: the polynomial of Cephes' expf, which the compiler can vectorise."""
    x = np.float32(-87) if x < np.float32(-87) else x
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    x = x - n * np.float32(0.693359375)
    x = x + n * np.float32(2.12194440e-4)
    y = np.float32(1.9875691500e-4)
    y = y * x + np.float32(1.3981999507e-3)
    y = y * x + np.float32(8.3334519073e-3)
    y = y * x + np.float32(4.1665795894e-2)
    y = y * x + np.float32(1.6666665459e-1)
    y = y * x + np.float32(5.0000001201e-1)
    y = y * (x * x) + x + one
    return y * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


# --- Scores -----------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _dot(x: Any, y: Any) -> Any:
    total = zero
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@njit
def _ask(a: Any, b: Any, c: Any, d: Any, ahead: Any, length: Any) -> None:
    """Ask for `length` bytes of each, `ahead` of where it starts."""
    for byte in range(ahead, ahead + length, 64):
        _prefetch(a.ctypes.data + byte)
        _prefetch(b.ctypes.data + byte)
        _prefetch(c.ctypes.data + byte)
        _prefetch(d.ctypes.data + byte)


@njit(fastmath={"contract"})
def _add_halves(out: Any, a: Any, b: Any, c: Any, d: Any, w: Any) -> None:
    """Add four components' float16, times their weights."""
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for first in range(0, out.shape[0], STRETCH):
        part, e = out[first : first + STRETCH], a[first : first + STRETCH]
        f, g, h = b[first : first + STRETCH], c[first : first + STRETCH], d[first : first + STRETCH]
        _ask(a, b, c, d, 2 * first + NEXT, 2 * part.shape[0])
        for j in range(part.shape[0]):
            part[j] += (w0 * _half(e[j]) + w1 * _half(f[j])) + (w2 * _half(g[j]) + w3 * _half(h[j]))


@njit
def _pair(byte: Any, low: Any, high: Any) -> Any:
    """The two levels of a byte times their weights; in 16 bits all the way, which numba's own products are not."""
    byte = np.int16(byte)
    return np.int16(np.int16(np.int16(byte & 15) * low) + np.int16(np.int16(byte >> 4) * high))


@njit
def _add_levels(out: Any, a: Any, b: Any, c: Any, d: Any, w: Any, ahead: Any) -> None:
    """Add eight channels' levels, two a byte, times their weights, in 16 bits; the next are `ahead` bytes away."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for first in range(0, out.shape[0], 2 * STRETCH):
        part, e = out[first : first + 2 * STRETCH], a[first : first + 2 * STRETCH]
        f, g, h = (
            b[first : first + 2 * STRETCH],
            c[first : first + 2 * STRETCH],
            d[first : first + 2 * STRETCH],
        )
        _ask(a, b, c, d, first + ahead, part.shape[0])
        for j in range(part.shape[0]):
            ef = np.int16(_pair(e[j], w0, w1) + _pair(f[j], w2, w3))
            gh = np.int16(_pair(g[j], w4, w5) + _pair(h[j], w6, w7))
            part[j] = np.int16(part[j] + np.int16(ef + gh))


@njit(fastmath={"contract"})
def _add_scaled(out: Any, x: Any, scale: Any) -> None:
    for j in range(out.shape[0]):
        out[j] += scale * np.float32(x[j])


@njit(fastmath={"contract"})
def _choose(x: Any, basis: Any, spread: Any, chosen: Any, weight: Any, rank: Any) -> None:
    """The components that matter most to a query, and its own of them; padded to whole fours by ones of weight 0."""
    component = np.zeros(basis.shape[1], np.float32)
    for e in range(x.shape[0]):
        for c in range(component.shape[0]):
            component[c] += x[e] * basis[e, c]
    left = np.abs(component) * spread
    for i in range(chosen.shape[0]):
        if i < rank:
            best = np.argmax(left)
            chosen[i], weight[i], left[best] = best, component[best], -one
        else:
            chosen[i], weight[i] = chosen[0], zero


@njit
def _low_rank_scores(out: Any, to: Any, address: Any, stride: Any, chosen: Any, weight: Any) -> None:
    """Scores from components a `stride` apart, float16."""
    out[:] = zero
    for t in range(0, chosen.shape[0], 4):
        _add_halves(
            out,
            carray(_pointer(address + 2 * (chosen[t] * stride + to)), out.shape[0], np.int16),
            carray(_pointer(address + 2 * (chosen[t + 1] * stride + to)), out.shape[0], np.int16),
            carray(_pointer(address + 2 * (chosen[t + 2] * stride + to)), out.shape[0], np.int16),
            carray(_pointer(address + 2 * (chosen[t + 3] * stride + to)), out.shape[0], np.int16),
            weight[t : t + 4],
        )


@njit
def _int4_scores(
    out: Any, to: Any, address: Any, stride: Any, packed: Any, level: Any, scale: Any, sums: Any
) -> None:
    """Scores from `packed` pairs of channels a `stride` apart; `level` and `scale` are the query's, by groups."""
    out[:] = scale[-1]
    sums = sums[: out.shape[0]]
    for group in range(level.shape[0] // GROUP):
        sums[:] = np.int16(0)
        for t in range(group * GROUP, (group + 1) * GROUP, 8):
            pair, most = t // 2, packed - 1
            _add_levels(
                sums,
                carray(_pointer(address + min(pair, most) * stride + to), out.shape[0], np.uint8),
                carray(_pointer(address + min(pair + 1, most) * stride + to), out.shape[0], np.uint8),
                carray(_pointer(address + min(pair + 2, most) * stride + to), out.shape[0], np.uint8),
                carray(_pointer(address + min(pair + 3, most) * stride + to), out.shape[0], np.uint8),
                level[t : t + 8],
                4 * stride,
            )
        _add_scaled(out, sums, scale[group])


@njit
def _in_levels(x: Any, level: Any, scale: Any) -> None:
    """A query in levels of 8 bits, a scale for each group of channels; last, what levels kept + 8 are too much."""
    for group in range(level.shape[0] // GROUP):
        part = x[group * GROUP : (group + 1) * GROUP]
        unit = max(np.abs(part).max() / np.float32(127), np.float32(1e-30))
        scale[group] = unit
        for i in range(part.shape[0]):
            level[group * GROUP + i] = np.int16(np.rint(part[i] / unit))
            scale[-1] -= np.float32(8) * unit * np.float32(level[group * GROUP + i])


@njit
def _score(
    out: Any, head: Any, x: Any, table: Any, n: Any, kind: Any, segments: Any, maps: Any, rank: Any
) -> None:
    """Scores (rows, n) of the rows x of a head, in the order of the places."""
    centre, basis, size = maps
    rows, features = x.shape
    heads, laid = table.shape[0], 0
    shift = np.zeros(rows, np.float32)
    if segments.shape[0]:
        packed = (features + 1) // 2
        chosen, weight = (
            np.empty((rows, (rank + 3) // 4 * 4), np.int64),
            np.empty((rows, (rank + 3) // 4 * 4), np.float32),
        )
        groups = (features + GROUP - 1) // GROUP
        level, scale = np.zeros((rows, groups * GROUP), np.int16), np.zeros((rows, groups + 1), np.float32)
        sums = np.empty(CHUNK, np.int16)
        for i in range(rows):
            shift[i] = _dot(x[i], centre[head])
            if kind == LOW_RANK:
                _choose(x[i], basis[head], size[head], chosen[i], weight[i], rank)
            else:
                _in_levels(x[i] * size[head], level[i], scale[i])
        for s in range(segments.shape[0]):
            keys, width, address = segments[s, 0], segments[s, 1], segments[s, 2]
            for first in range(0, keys, width):
                piece = (first // width * heads + head) * width
                for to in range(0, min(width, keys - first), CHUNK):
                    begin = laid + first + to
                    end = min(begin + CHUNK, laid + first + width, laid + keys)
                    for i in range(rows):
                        part = out[i, begin:end]
                        if kind == LOW_RANK:
                            start = address + 2 * piece * features
                            _low_rank_scores(part, to, start, width, chosen[i], weight[i])
                        else:
                            start = address + piece * packed
                            _int4_scores(part, to, start, width, packed, level[i], scale[i], sums)
            if kind == INT4:
                many = segments[s, 7]
                of_head = carray(_pointer(segments[s, 3]), many, np.int64)
                key = carray(_pointer(segments[s, 4]), many, np.int64)
                channel = carray(_pointer(segments[s, 5]), many, np.int64)
                rest = carray(_pointer(segments[s, 6]), many, np.float32)
                for o in range(np.searchsorted(of_head, head), np.searchsorted(of_head, head + 1)):
                    for i in range(rows):
                        out[i, laid + key[o]] += x[i, channel[o]] * rest[o]
            laid += keys
    for j in range(laid, n):
        for i in range(rows):
            out[i, j] = _dot(x[i], table[head, j, :features]) - shift[i]


# --- Draws ------------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _top(x: Any) -> Any:
    """The largest, or NaN if any is not finite; in lanes, for a maximum is not vectorised otherwise."""
    best, none = x[:256].copy(), zero
    for first in range(0, x.shape[0], 256):
        part = x[first : first + 256]
        for j in range(part.shape[0]):
            best[j] = part[j] if part[j] > best[j] else best[j]
            none += part[j] * zero
    return best.max() + none


@njit(fastmath=SUMS)
def _finite(x: Any) -> Any:
    total = zero
    for j in range(x.shape[0]):
        total += x[j] * zero
    return total == zero


@njit(fastmath=SUMS)
def _exponentials(x: Any, top: Any) -> Any:
    """exp(x - top) in place, and its sum."""
    total = 0.0
    for first in range(0, x.shape[0], 1024):
        part, some = x[first : first + 1024], zero
        for j in range(part.shape[0]):
            part[j] = _exp(part[j] - top)
            some += part[j]
        total += np.float64(some)
    return total


@njit(fastmath=SUMS)
def _above(x: Any, limit: Any) -> Any:
    """How many are at least `limit`, and the sum of the others."""
    count, total = 0, 0.0
    for first in range(0, x.shape[0], 1024):
        part, some = x[first : first + 1024], zero
        sure: Any = np.int32(0)
        for j in range(part.shape[0]):
            some += part[j] if part[j] < limit else zero
            sure += np.int32(part[j] >= limit)
        count, total = count + sure, total + np.float64(some)
    return count, total


@njit(fastmath=SUMS)
def _clipped_sum(x: Any, limit: Any) -> Any:
    total = zero
    for j in range(x.shape[0]):
        total += x[j] if x[j] < limit else limit
    return total


@njit(error_model="numpy")
def _limit(mass: Any, total: Any, count: Any, first_rate: Any, steps: Any, least: Any) -> Any:
    """The mass from which a key is sure: `kv_cache._limit`."""
    if mass.shape[0] <= count:
        return np.float32(least)
    most = total / count
    limit = most / first_rate
    for _ in range(steps):
        sure, light = _above(mass, np.float32(limit))
        limit = min(max(light / (count - sure), least), most) if sure < count else most
    return np.float32(limit)


@njit(error_model="numpy")
def _place(mass: Any, limit: Any, offset: Any, cdf: Any, last: Any, place: Any) -> Any:
    """Keys (S,) at the points (s + offset) / S of the masses cut at `limit`, and how many points lie within these."""
    n, count = mass.shape[0], place.shape[0]
    held = cdf[-1]
    below, within, block, at, sum_ = np.nextafter(held, 0.0), 0, -1, 0, 0.0
    for s in range(count):
        point = (s + offset) / count * last
        if point < held:
            within += 1
        point = min(point, below)
        if block < 0 or cdf[block] <= point:
            block += 1
            while cdf[block] <= point:
                block += 1
            at = block * BLOCK
            sum_ = (cdf[block - 1] if block else 0.0) + min(mass[at], limit)
        end = min(n, (block + 1) * BLOCK) - 1
        while sum_ <= point and at < end:
            at += 1
            sum_ += min(mass[at], limit)
        place[s] = at
    return within


@njit(error_model="numpy", fastmath={"contract"})
def _weigh(
    x: Any, rows: Any, place: Any, within: Any, pi: Any, weights: Any, output: Any, share: Any
) -> None:
    """Weights (S,) of the draws by their exact logits; adds the average of their values to `output`, `share` of it."""
    count, features, width = place.shape[0], x.shape[0], rows.shape[1]
    address, size = rows.ctypes.data, np.int64(4 * width)
    top = np.float32(-np.inf)
    for s in range(-AHEAD, count):
        if s + AHEAD < count:
            line = address + place[s + AHEAD] * size
            for byte in range(0, size, 512):  # the processor goes on by itself
                _prefetch(line + byte)
        if s < 0:
            continue
        if s >= within or (s and place[s] == place[s - 1]):  # past the last key, or a sure one's second point
            weights[s] = -np.inf
        else:
            weights[s] = _dot(x, rows[place[s], :features]) - np.log(pi[s])
            top = max(top, weights[s])
    total = zero
    for s in range(count):
        weights[s] = zero if weights[s] == -np.inf else _exp(weights[s] - top)
        total += weights[s]
    for s in range(count):
        weights[s] *= share / total
        if weights[s] > zero:
            value, w = rows[place[s], features:], weights[s]
            for i in range(output.shape[0]):
                output[i] += w * value[i]


FIELDS = 30
"""Of a task: the next unit, whether a score is not finite, numbers, shapes and addresses."""


def _attend(task: Any) -> None:
    """Tiles of rows of the task at this address, until none is left; any number of threads may do so at once."""
    of = carray(_pointer(task), FIELDS, np.int64)
    units, tile, n, kind, rank, known = of[2], of[3], of[4], of[5], of[6], of[7]
    heads, rows, features, capacity, width = of[8], of[9], of[10], of[11], of[12]
    levels, replicates, draws = of[13], of[14], of[15]
    queries = carray(_pointer(of[16]), (heads, rows, features), np.float32)
    offsets = carray(_pointer(of[17]), (heads, levels, replicates), np.float64)
    table = carray(_pointer(of[18]), (heads, capacity, features + width), np.float32)
    order = carray(_pointer(of[19]), (heads, capacity), np.int64)
    centre = carray(_pointer(of[20]), (heads, features), np.float32)
    basis = carray(_pointer(of[21]), (heads, features, features), np.float32)
    size = carray(_pointer(of[22]), (heads, features), np.float32)
    indices = carray(_pointer(of[23]), (heads, rows, replicates * draws), np.int64)
    shares = carray(_pointer(of[24]), (3, heads, rows, replicates * draws), np.float32)
    weights, proposed, pi = shares[0], shares[1], shares[2]
    rate = carray(_pointer(of[25]), (heads, rows), np.float32)
    output = carray(_pointer(of[26]), (heads, rows, width), np.float32)
    effective = carray(_pointer(of[27]), (heads, rows), np.float32)
    segments = carray(_pointer(of[28]), (known, 8), np.int64)
    reals = carray(_pointer(of[29]), 5, np.float64)
    scale, defensive, first_rate, least = np.float32(reals[0]), reals[1], reals[2], reals[4]
    steps = np.int64(reals[3])
    tiles = (rows + tile - 1) // tile
    x, scores = np.empty((tile, features), np.float32), np.empty((tile, n), np.float32)
    place = np.empty(draws, np.int64)
    cdf = np.empty((n + BLOCK - 1) // BLOCK, np.float64)
    while True:
        unit = _next(task)
        if unit >= units:
            return
        head, begin = unit // tiles, unit % tiles * tile
        end = min(begin + tile, rows)
        x[: end - begin] = queries[head, begin:end] * scale
        _score(scores, head, x[: end - begin], table, n, kind, segments, (centre, basis, size), rank)
        for m in range(begin, end):
            mass = scores[m - begin]
            top = _top(mass)
            if not (_finite(x[m - begin]) and top == top):
                of[1] = 1
                return
            total = _exponentials(mass, top)
            mass += np.float32(total * (defensive / (1 - defensive) / n))
            total /= 1 - defensive
            limit = _limit(mass, total, draws, first_rate, steps, least)
            held = 0.0
            for block in range(cdf.shape[0]):
                held += _clipped_sum(mass[block * BLOCK : (block + 1) * BLOCK], limit)
                cdf[block] = held
            output[head, m] = 0
            for r in range(replicates):
                part = slice(r * draws, (r + 1) * draws)
                offset = offsets[head, m % levels, r]
                within = _place(mass, limit, offset, cdf, draws * np.float64(limit), place)
                of_draws = pi[head, m, part]
                for s in range(draws):
                    q = mass[place[s]]
                    indices[head, m, r * draws + s] = order[head, place[s]]
                    proposed[head, m, r * draws + s] = q / total
                    of_draws[s] = min(q / limit, one)
                _weigh(
                    x[m - begin],
                    table[head],
                    place,
                    within,
                    of_draws,
                    weights[head, m, part],
                    output[head, m],
                    one / np.float32(replicates),
                )
            rate[head, m] = total / limit
            effective[head, m] = one / _dot(weights[head, m], weights[head, m])


# --- From torch -------------------------------------------------------------------------------

ALONE = 1 << 18
"""Numbers of a sketch below which a second thread takes longer to wake than it saves."""


class Found(NamedTuple):
    """Draws of rows (N, M): `indices` (N, M, T), their weights, q and pi (3, N, M, T), the draws a unit of q (N, M, 1),
    the output (..., Ev) and Kish's effective number of draws (...), rows as the caller has them."""

    indices: Tensor
    shares: Tensor
    rate: Tensor
    output: Tensor
    effective: Tensor


class Scanned(NamedTuple):
    """What is scanned: tokens' keys and values (N, C, E + Ev), of C the first n, and which tokens they are (N, C).

    A segment is its number of keys, those a piece, and the address of its components or levels; of 4 bits also those of
    the outliers' heads, keys, channels and sizes, and how many there are. Keys are sketched by `centre` (N, 1, E), `size`
    (N, 1, E), what a component is worth or a step of 4 bits, and `basis` (N, E, E) of low rank.
    """

    kind: str
    length: int
    rank: int
    table: Tensor
    order: Tensor
    segments: Sequence[Sequence[int]] = ()
    centre: Tensor | None = None
    size: Tensor | None = None
    basis: Tensor | None = None


@functools.cache
def compiled() -> Any:
    """`_attend` in machine code, kept on disk where there is a place for it."""
    with _COMPILING:
        for keep in (True, False):
            try:
                return cfunc(types.void(types.int64), cache=keep, error_model="numpy")(_attend)
            except (OSError, RuntimeError):  # no folder to write to, a full disk
                if not keep:
                    raise
    raise AssertionError


_COMPILING = threading.Lock()
_FORKED = threading.Event()


@functools.cache
def _team() -> Any:
    """What starts torch's own threads where they are GNU's OpenMP's: after a product they wait, awake, on their cores."""
    start = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if start is not None:
        start.argtypes, start.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint), None
    return start


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "qtx-lab-decode")


def _in_a_copy() -> None:
    """Threads are not copied with a process, nor does OpenMP learn that its own are gone."""
    _FORKED.set()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_copy)


def draw(
    queries: Tensor,
    scale: float,
    offsets: Tensor,
    held: Scanned,
    num_samples: int,
    row_shape: tuple[int, ...],
    search: tuple[float, ...],
) -> Found | None:
    """Draws of queries (N, M, E) at the points (s + offset) / S, offsets (N, L, R) float64 in [0, 1), L dividing M.

    `search` has epsilon, and FIRST_RATE, NEWTON_STEPS and LEAST of the cache. None if a query or a score is not finite.
    On `torch.get_num_threads()` threads; any number of calls may go on at once.
    """
    # Between a model's other work, little of what this needs is in the processor's caches: the less, the faster.
    (heads, rows, features), (_, levels, replicates) = queries.shape, offsets.shape
    total, width = num_samples * replicates, held.table.shape[-1] - features
    empty = queries.new_empty
    indices, rate = empty(heads, rows, total, dtype=torch.int64), empty(heads, rows, 1)
    shares, output, effective = empty(3, heads, rows, total), empty(*row_shape, width), empty(row_shape)
    terms = held.rank if held.kind == "low-rank" else features
    threads = torch.get_num_threads()
    if heads * rows * held.length * terms <= ALONE:
        threads = 1
    tile = max(1, min(TILE, heads * rows // threads))
    numbers = (
        heads * -(-rows // tile),
        tile,
        held.length,
        KINDS.index(held.kind),
        held.rank,
        len(held.segments),
    )
    shapes = (heads, rows, features, held.table.shape[1], width, levels, replicates, num_samples)
    given = (queries.contiguous(), offsets.contiguous(), held.table, held.order)
    tensors = (*given, held.centre, held.basis, held.size, indices, shares, rate, output, effective)
    lists = array("q", [x for segment in held.segments for x in segment]), array("d", (scale, *search))
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    addresses += [x.buffer_info()[0] for x in lists]
    task = array("q", (0, 0, *numbers, *shapes, *addresses))
    run, (address, _) = compiled(), task.buffer_info()
    team = None if threads == 1 or _FORKED.is_set() else _team()
    if team is not None:
        team(run.address, address, threads, 0)
    else:
        # A Ctrl-C ends the waiting here, not the others' work: what they write to is held for them.
        kept = (tensors, lists, task, held)
        others = [_pool(threads - 1).submit(lambda _: run.ctypes(address), kept) for _ in range(1, threads)]
        run.ctypes(address)
        for other in others:
            other.result()
    if task[1]:
        return None
    return Found(indices, shares, rate, output, effective)
