"""The pass over a cache's rows that numba compiles, a row at a time in a core's cache.

It guesses scores from the sketch, draws keys, computes their exact logits and averages their values. The
reference is `reference.draw_rows`: the same scores and points give the same draws, up to rounding. All
compiled code is in this file, because numba's cache on disk notices changes of the file of the compiled
function and of no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from ...streams import Purpose
from .reference import FEWEST_LIGHT, FIRST_RATE, LEAST_MASS, NEWTON_STEPS

EXACT, INT8, INT4, MIXED = 0, 1, 2, 3
"""What is scanned (`Task.kind`): the keys themselves, components of 8 bits, of 4, or of 4 and 2 bits."""

TASK = np.dtype(
    [
        ("next_unit", np.int64),  # the next tile of rows that no thread has taken yet
        ("not_finite", np.int64),  # 1 once a query or a score is not finite
        ("units", np.int64),  # tiles of all heads
        ("tile", np.int64),  # rows of a tile
        ("kind", np.int64),
        ("heads", np.int64),  # N
        ("groups", np.int64),  # key heads of a sequence
        ("rows", np.int64),  # M
        ("positions", np.int64),  # L, positions of the queries: row m is at first_position + m % L
        ("first_position", np.int64),
        ("features", np.int64),  # E
        ("width", np.int64),  # Ev
        ("keys", np.int64),  # n
        ("capacity", np.int64),  # keys that `table` and `order` have room for
        ("lines", np.int64),  # lines of a head
        ("line_capacity", np.int64),  # keys that a line has room for
        ("rank", np.int64),  # r, components of a key in the sketch
        ("exact_keys", np.int64),  # T, the first places, whose logits are computed from `exact`
        ("replicates", np.int64),  # R
        ("draws", np.int64),  # S
        ("seed", np.int64),
        ("scale", np.float64),
        ("defensive", np.float64),  # epsilon
        ("adaptive", np.int64),  # 1 where S is the most that a row draws
        ("grouped", np.int64),  # 1 where the rows of a position draw the same keys
        ("half", np.int64),  # 1 where `table` is bfloat16
        # Addresses of contiguous arrays.
        ("sequences_at", np.int64),  # int64, (N / groups,): names of the sequences
        ("queries_at", np.int64),  # float32, (N, M, E)
        ("table_at", np.int64),  # (N, capacity, E + Ev): keys and values in the order of arrival
        ("order_at", np.int64),  # int64, (N, capacity): the token at each place
        ("lines_at", np.int64),  # int8 or uint8, (N, lines, line_capacity), as many lines as the kind has
        ("weight_at", np.int64),  # float32, (N, E, r): takes queries to components
        ("exact_at", np.int64),  # float32, (N, T, E): centred keys
        ("indices_at", np.int64),  # int64, (N, M, R S), written
        ("weights_at", np.int64),  # float32, (N, M, R S), written
        ("proposed_at", np.int64),  # float32, (N, M, R S), written: q of the drawn keys
        ("inclusion_at", np.int64),  # float32, (N, M, R S), written: pi
        ("rate_at", np.int64),  # float32, (N, M), written: draws a unit of q
        ("output_at", np.int64),  # float32, (N, M, Ev), written
        ("effective_at", np.int64),  # float32, (N, M), written: Kish's effective number of draws
    ]
)
"""What a call is about. Threads share one task, whose `next_unit` they count up."""

CHUNK = 8192
"""Keys whose scores are summed up together: few enough to stay in a core's caches, yet long runs to read."""
BLOCK = 64
"""Keys of a block of the inversion: whole blocks are passed by until the one that holds a point."""
TILE = 8
"""Rows of a head that read a chunk of the sketch together."""
AHEAD = 16
"""Draws whose keys and values are requested in advance."""
STRETCH, NEXT = 128, 1024
"""Keys of a component between two requests for memory, and how far ahead that memory is, in bytes."""
TERMS = 8
"""Components that are added to the scores together."""
GROUP = 16
"""Components whose 4-bit levels, times weights of 8 bits, are summed in 16 bits: 16 * 15 * 127 < 2^15."""
QUAD_GROUP = 64
"""The same of 2-bit levels: 64 * 3 * 127 < 2^15."""
SUMS = {"contract", "reassoc", "nsz"}
"""What sums may do to be vectorised: change their order, but not overlook infinities."""

zero: Any = np.float32(0)
one: Any = np.float32(1)
typed_intrinsic: Any = intrinsic  # mypy counts the typing context as an argument of the call


@typed_intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """An address as what `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@typed_intrinsic
def _fetch_and_increment(typing: Any, address: Any) -> Any:
    """The whole number at an address, which is one more afterwards; atomic among threads."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        at = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", at, number(1), "monotonic")

    return types.int64(types.int64), generate


@typed_intrinsic
def _prefetch(typing: Any, address: Any) -> Any:
    """Request the cache line at an address, to read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@typed_intrinsic
def _number(typing: Any, x: Any) -> Any:
    """The float32 of a number of the table: a float32, or a bfloat16, which numba knows as a uint16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x == types.float32:
            return args[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(args[0], word), word(16)), ir.FloatType())

    return types.float32(x), generate


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


# --- Random numbers: `qtx_lab.streams`, bit by bit ---------------------------------------------

WORD, HALF_WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
POINTS, SEQUENCE = int(Purpose.POINTS), int(Purpose.SEQUENCE)


@njit
def philox(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> Any:
    """Four random words of 32 bits for a key of 64 bits and a counter: `streams.philox`."""
    k0, k1 = np.uint64(key) & WORD, np.uint64(key) >> HALF_WORD
    c0, c1 = np.uint64(c0) & WORD, np.uint64(c1) & WORD
    c2, c3 = np.uint64(c2) & WORD, np.uint64(c3) & WORD
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> HALF_WORD) ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> HALF_WORD) ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & WORD, (k1 + np.uint64(0xBB67AE85)) & WORD
    return c0, c1, c2, c3


@njit
def sequence_key(seed: Any, name: Any) -> Any:
    """The key of a sequence: `streams.sequence_keys`."""
    name = np.uint64(name)
    low, high, _, _ = philox(seed, name, name >> HALF_WORD, np.uint64(0), np.uint64(SEQUENCE))
    return low | (high << HALF_WORD)


@njit
def row_offset(key: Any, position: Any, group: Any, replicate: Any) -> Any:
    """Where the points of a row start: the first of the `Stream.uniform` numbers of a row and replicate."""
    purpose = np.uint64(replicate) << np.uint64(8) | np.uint64(POINTS)
    high, low, _, _ = philox(key, np.uint64(0), position, group, purpose)
    whole = (high >> np.uint64(5)) * np.uint64(1 << 26) + (low >> np.uint64(6))
    return np.float64(whole) * 2.0**-53


# --- Scores -----------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _dot(x: Any, y: Any) -> Any:
    total = zero
    for i in range(x.shape[0]):
        total += x[i] * _number(y[i])
    return total


@njit(fastmath={"contract"})
def _multiply(x: Any, matrix: Any, out: Any) -> None:
    """x (E,) times a matrix (E, r)."""
    out[: matrix.shape[1]] = zero
    for e in range(x.shape[0]):
        for c in range(matrix.shape[1]):
            out[c] += x[e] * matrix[e, c]


@njit
def _request(a: Any, b: Any, c: Any, d: Any, ahead: Any, length: Any) -> None:
    """Request `length` bytes of each array, `ahead` of where it starts."""
    for byte in range(ahead, ahead + length, 64):
        _prefetch(a.ctypes.data + byte)
        _prefetch(b.ctypes.data + byte)
        _prefetch(c.ctypes.data + byte)
        _prefetch(d.ctypes.data + byte)


@njit(fastmath={"contract"})
def _add_bytes(out: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, w: Any) -> None:
    """Add eight components of 8 bits, times their weights."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for first in range(0, out.shape[0], STRETCH):
        end = first + STRETCH
        part, a_, b_, c_, d_ = out[first:end], a[first:end], b[first:end], c[first:end], d[first:end]
        e_, f_, g_, h_ = e[first:end], f[first:end], g[first:end], h[first:end]
        _request(a_, b_, c_, d_, NEXT, part.shape[0])
        _request(e_, f_, g_, h_, NEXT, part.shape[0])
        for j in range(part.shape[0]):
            ab = w0 * np.float32(a_[j]) + w1 * np.float32(b_[j])
            cd = w2 * np.float32(c_[j]) + w3 * np.float32(d_[j])
            ef = w4 * np.float32(e_[j]) + w5 * np.float32(f_[j])
            gh = w6 * np.float32(g_[j]) + w7 * np.float32(h_[j])
            part[j] += (ab + cd) + (ef + gh)


@njit
def _int8_scores(out: Any, lines: Any, begin: Any, component: Any) -> None:
    """Scores of keys from `begin` on, by components `lines` (r, capacity) of 8 bits and the query's own."""
    out[:] = zero
    end, last = begin + out.shape[0], lines.shape[0] - 1
    for t in range(0, component.shape[0], TERMS):
        _add_bytes(
            out,
            lines[min(t, last), begin:end],
            lines[min(t + 1, last), begin:end],
            lines[min(t + 2, last), begin:end],
            lines[min(t + 3, last), begin:end],
            lines[min(t + 4, last), begin:end],
            lines[min(t + 5, last), begin:end],
            lines[min(t + 6, last), begin:end],
            lines[min(t + 7, last), begin:end],
            component[t : t + TERMS],
        )


@njit
def _pair(byte: Any, low: Any, high: Any) -> Any:
    """The two levels of a byte times their weights, in 16 bits, which numba's own products leave."""
    byte = np.int16(byte)
    return np.int16(np.int16(np.int16(byte & 15) * low) + np.int16(np.int16(byte >> 4) * high))


@njit
def _add_levels(out: Any, a: Any, b: Any, c: Any, d: Any, w: Any, ahead: Any) -> None:
    """Add eight components' levels, two a byte, times their weights; the next are `ahead` bytes away."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for first in range(0, out.shape[0], 2 * STRETCH):
        end = first + 2 * STRETCH
        part, e, f, g, h = out[first:end], a[first:end], b[first:end], c[first:end], d[first:end]
        _request(a, b, c, d, first + ahead, part.shape[0])
        for j in range(part.shape[0]):
            ef = np.int16(_pair(e[j], w0, w1) + _pair(f[j], w2, w3))
            gh = np.int16(_pair(g[j], w4, w5) + _pair(h[j], w6, w7))
            part[j] = np.int16(part[j] + np.int16(ef + gh))


@njit(fastmath={"contract"})
def _add_scaled(out: Any, x: Any, scale: Any) -> None:
    for j in range(out.shape[0]):
        out[j] += scale * np.float32(x[j])


@njit
def _int4_scores(out: Any, lines: Any, begin: Any, level: Any, scale: Any, sums: Any) -> None:
    """Scores of keys from `begin` on, by pairs of components `lines` (r / 2, capacity) of 4 bits.

    `level` and `scale` are the query's, by groups (`_in_levels`); `sums` is room for 16-bit sums.
    """
    out[:] = scale[-1]
    sums = sums[: out.shape[0]]
    end, last, capacity = begin + out.shape[0], lines.shape[0] - 1, lines.shape[1]
    for group in range(level.shape[0] // GROUP):
        sums[:] = np.int16(0)
        for t in range(group * GROUP, min((group + 1) * GROUP, 2 * lines.shape[0]), 8):
            pair = t // 2
            _add_levels(
                sums,
                lines[min(pair, last), begin:end],
                lines[min(pair + 1, last), begin:end],
                lines[min(pair + 2, last), begin:end],
                lines[min(pair + 3, last), begin:end],
                level[t : t + 8],
                4 * capacity,
            )
        _add_scaled(out, sums, scale[group])


@njit
def _in_levels(component: Any, rank: Any, level: Any, scale: Any) -> None:
    """A query's components in levels of 8 bits, with a scale for each group of them.

    They are put in the order of the nibbles: component i beside component ceil(r / 2) + i. The last scale
    is what levels that are stored as level + 8 add too much.
    """
    half = (rank + 1) // 2
    for group in range(level.shape[0] // GROUP):
        unit = np.float32(1e-30)
        for pair in range(group * GROUP // 2, min((group + 1) * GROUP // 2, half)):
            unit = max(unit, np.abs(component[pair]))
            if half + pair < rank:
                unit = max(unit, np.abs(component[half + pair]))
        unit /= np.float32(127)
        scale[group] = unit
        for pair in range(group * GROUP // 2, min((group + 1) * GROUP // 2, half)):
            level[2 * pair] = np.int16(np.rint(component[pair] / unit))
            if half + pair < rank:
                level[2 * pair + 1] = np.int16(np.rint(component[half + pair] / unit))
            both = np.float32(level[2 * pair]) + np.float32(level[2 * pair + 1])
            scale[-1] -= np.float32(8) * unit * both


@njit
def _quad(byte: Any, w0: Any, w1: Any, w2: Any, w3: Any) -> Any:
    """The four levels of a byte times their weights, in 16 bits."""
    byte = np.int16(byte)
    low = np.int16(np.int16(np.int16(byte & 3) * w0) + np.int16(np.int16(byte >> 2 & 3) * w1))
    high = np.int16(np.int16(np.int16(byte >> 4 & 3) * w2) + np.int16(np.int16(byte >> 6) * w3))
    return np.int16(low + high)


@njit
def _add_quads(out: Any, a: Any, b: Any, c: Any, d: Any, w: Any, ahead: Any) -> None:
    """Add sixteen components' levels, four a byte, times their weights; the next are `ahead` bytes away."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    w8, w9, w10, w11, w12, w13, w14, w15 = w[8], w[9], w[10], w[11], w[12], w[13], w[14], w[15]
    for first in range(0, out.shape[0], 2 * STRETCH):
        end = first + 2 * STRETCH
        part, e, f, g, h = out[first:end], a[first:end], b[first:end], c[first:end], d[first:end]
        _request(a, b, c, d, first + ahead, part.shape[0])
        for j in range(part.shape[0]):
            ef = np.int16(_quad(e[j], w0, w1, w2, w3) + _quad(f[j], w4, w5, w6, w7))
            gh = np.int16(_quad(g[j], w8, w9, w10, w11) + _quad(h[j], w12, w13, w14, w15))
            part[j] = np.int16(part[j] + np.int16(ef + gh))


@njit
def _add_int2_scores(out: Any, lines: Any, begin: Any, level: Any, scale: Any, sums: Any) -> None:
    """Add scores of keys from `begin` on, by fours of components `lines` (ceil(r / 4), capacity) of 2 bits.

    `level` and `scale` are the query's, by groups (`_in_quad_levels`).
    """
    sums = sums[: out.shape[0]]
    end, last, capacity = begin + out.shape[0], lines.shape[0] - 1, lines.shape[1]
    for j in range(out.shape[0]):
        out[j] += scale[-1]
    for group in range(level.shape[0] // QUAD_GROUP):
        sums[:] = np.int16(0)
        for t in range(group * QUAD_GROUP, min((group + 1) * QUAD_GROUP, 4 * lines.shape[0]), 16):
            quad = t // 4
            _add_quads(
                sums,
                lines[min(quad, last), begin:end],
                lines[min(quad + 1, last), begin:end],
                lines[min(quad + 2, last), begin:end],
                lines[min(quad + 3, last), begin:end],
                level[t : t + 16],
                4 * capacity,
            )
        _add_scaled(out, sums, scale[group])


@njit
def _in_quad_levels(component: Any, level: Any, scale: Any) -> None:
    """A query's components (r,) in levels of 8 bits, in the order of the bits of lines of four.

    Components i, q + i, 2 q + i and 3 q + i share a byte, q = ceil(r / 4). What is stored as 0, 1, 2, 3
    means -3, -1, 1, 3: the last scale is what is missing.
    """
    rank = component.shape[0]
    quarter = (rank + 3) // 4
    level[:], scale[:] = np.int16(0), zero
    for group in range(level.shape[0] // QUAD_GROUP):
        lines = range(group * QUAD_GROUP // 4, min((group + 1) * QUAD_GROUP // 4, quarter))
        unit = np.float32(1e-30)
        for line in lines:
            for c in range(line, rank, quarter):
                unit = max(unit, np.abs(component[c]))
        unit /= np.float32(127)
        scale[group] = np.float32(2) * unit
        for line in lines:
            for i in range(4):
                c = line + i * quarter
                if c < rank:
                    level[4 * line + i] = np.int16(np.rint(component[c] / unit))
                    scale[-1] -= np.float32(3) * unit * np.float32(level[4 * line + i])


@njit
def _scores_of_keys(out: Any, x: Any, table: Any, order: Any) -> None:
    """Exact scores (rows, n) of rows x (rows, E), in the order of the places."""
    features, (rows, keys) = x.shape[1], out.shape
    by_token = np.empty((rows, keys), np.float32)
    for j in range(keys):  # as they lie in memory
        for i in range(rows):
            by_token[i, j] = _dot(x[i], table[j, :features])
    for i in range(rows):
        for place in range(keys):
            out[i, place] = by_token[i, order[place]]


@njit
def _scores_of_sketch(
    out: Any, x: Any, kind: Any, lines_at: Any, capacity: Any, weight: Any, exact: Any
) -> None:
    """Scores (rows, n) of rows x (rows, E) by a head's components at `lines_at`, in lines of this capacity.

    The first places, which `exact` (T, E) has centred keys for, get exact scores. All lack the same
    shift, that of the centre.
    """
    rows, keys, rank = x.shape[0], out.shape[1], weight.shape[1]
    upper = (rank + 2) // 3 if kind == MIXED else rank  # components of 4 bits, where there are some
    pairs, quads = (upper + 1) // 2, (rank - upper + 3) // 4
    component = np.zeros((rows, (rank + GROUP - 1) // GROUP * GROUP), np.float32)
    groups, quad_groups = (upper + GROUP - 1) // GROUP, (rank - upper + QUAD_GROUP - 1) // QUAD_GROUP
    level, scale = np.zeros((rows, groups * GROUP), np.int16), np.zeros((rows, groups + 1), np.float32)
    quad_level = np.zeros((rows, quad_groups * QUAD_GROUP), np.int16)
    quad_scale = np.zeros((rows, quad_groups + 1), np.float32)
    sums = np.empty(CHUNK, np.int16)
    for i in range(rows):
        _multiply(x[i], weight, component[i])
        if kind != INT8:
            _in_levels(component[i], upper, level[i], scale[i])
            _in_quad_levels(component[i, upper:rank], quad_level[i], quad_scale[i])
    terms = (rank + TERMS - 1) // TERMS * TERMS
    of_bytes = carray(_pointer(lines_at), (rank, capacity), np.int8)
    of_pairs = carray(_pointer(lines_at), (pairs, capacity), np.uint8)
    of_quads = carray(_pointer(lines_at + pairs * capacity), (quads, capacity), np.uint8)
    for begin in range(0, keys, CHUNK):
        for i in range(rows):
            part = out[i, begin : min(begin + CHUNK, keys)]
            if kind == INT8:
                _int8_scores(part, of_bytes, begin, component[i, :terms])
            else:
                _int4_scores(part, of_pairs, begin, level[i], scale[i], sums)
                if quads:
                    _add_int2_scores(part, of_quads, begin, quad_level[i], quad_scale[i], sums)
    for j in range(min(exact.shape[0], keys)):
        for i in range(rows):
            out[i, j] = _dot(x[i], exact[j])


@njit
def score_rows(out: Any, head: Any, x: Any, t: Any) -> None:
    """Scores (rows, n) of scaled queries x (rows, E) of a head of task t, in the order of the places."""
    if t.kind == EXACT:
        shape = (t.heads, t.capacity, t.features + t.width)
        order = carray(_pointer(t.order_at), (t.heads, t.capacity), np.int64)[head]
        if t.half:
            _scores_of_keys(out, x, carray(_pointer(t.table_at), shape, np.uint16)[head], order)
        else:
            _scores_of_keys(out, x, carray(_pointer(t.table_at), shape, np.float32)[head], order)
        return
    lines_at = t.lines_at + head * t.lines * t.line_capacity
    weight = carray(_pointer(t.weight_at), (t.heads, t.features, t.rank), np.float32)[head]
    exact = carray(_pointer(t.exact_at), (t.heads, t.exact_keys, t.features), np.float32)[head]
    _scores_of_sketch(out, x, t.kind, lines_at, t.line_capacity, weight, exact)


# --- Draws ------------------------------------------------------------------------------------


@njit(fastmath=SUMS)
def _top(x: Any) -> Any:
    """The largest, or NaN if any is not finite; in lanes, because a maximum is not vectorised otherwise."""
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
def _sure_mass(mass: Any, total: Any, t: Any) -> Any:
    """The mass from which a key is drawn surely, and the total: `reference.sure_mass`; raises `mass`."""
    keys, draws, uniform = mass.shape[0], t.draws, t.defensive / (1 - t.defensive)
    if keys <= draws:
        mass += np.float32(total * uniform / keys)
        return np.float32(LEAST_MASS), total * (1 + uniform)
    most = total / draws
    limit = most if t.adaptive else most / FIRST_RATE
    for step in range(NEWTON_STEPS + 1):
        sure, light = _above(mass, np.float32(limit))
        left = np.float64(draws - sure)
        if t.adaptive:
            left = min(left, max(light / most, np.float64(FEWEST_LIGHT)))
        limit = min(max(light / left, LEAST_MASS), most) if sure < draws else most
        if step == NEWTON_STEPS - 1:
            raised = max(light * uniform, keys * LEAST_MASS / 2)
            mass += np.float32(raised / keys)
            total += raised
    return np.float32(limit), total


@njit(error_model="numpy")
def _place(mass: Any, limit: Any, offset: Any, cdf: Any, last: Any, place: Any) -> Any:
    """Write the places (S,) of the points (s + offset) / S of the masses cut at `limit`.

    Returns how many of the points lie within the masses.
    """
    n, draws = mass.shape[0], place.shape[0]
    total = cdf[-1]
    below, within, block, at, sum_ = np.nextafter(total, 0.0), 0, -1, 0, 0.0
    for s in range(draws):
        point = (s + offset) / draws * last
        if point < total:
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
    x: Any, table: Any, tokens: Any, within: Any, pi: Any, weights: Any, output: Any, share: Any
) -> None:
    """Weigh the draws (S,) by their exact logits; `output` gets `share` of their average value."""
    draws, features, width = tokens.shape[0], x.shape[0], table.shape[1]
    address, size = table.ctypes.data, np.int64(table.itemsize * width)
    top = np.float32(-np.inf)
    for s in range(-AHEAD, draws):
        if s + AHEAD < draws:
            line = address + tokens[s + AHEAD] * size
            for byte in range(0, size, 512):  # the processor goes on by itself
                _prefetch(line + byte)
        if s < 0:
            continue
        if s >= within or (
            s and tokens[s] == tokens[s - 1]
        ):  # past the last key, or a sure one's second point
            weights[s] = -np.inf
        else:
            weights[s] = _dot(x, table[tokens[s], :features]) - np.log(pi[s])
            top = max(top, weights[s])
    total = zero
    for s in range(draws):
        weights[s] = zero if weights[s] == -np.inf else _exp(weights[s] - top)
        total += weights[s]
    for s in range(draws):
        weights[s] *= share / total
        if weights[s] > zero:
            value, w = table[tokens[s], features:], weights[s]
            for i in range(output.shape[0]):
                output[i] += w * _number(value[i])


@njit(error_model="numpy")
def _masses(x: Any, mass: Any) -> Any:
    """Let the scores `mass` (n,) of row x become masses; their total, or NaN if the row is not finite."""
    top = _top(mass)
    return _exponentials(mass, top) if _finite(x) and top == top else np.nan


@njit
def _mean_masses(masses: Any, totals: Any, out: Any) -> None:
    """Let the masses of rows (G, n) sum to 1, and `out` (n,) be their mean."""
    share = np.float32(1 / masses.shape[0])
    out[:] = zero
    for i in range(masses.shape[0]):
        masses[i] *= np.float32(1 / totals[i])
        _add_scaled(out, masses[i], share)


@njit(error_model="numpy")
def _cumulate(mass: Any, limit: Any, cdf: Any) -> None:
    """Write the masses, cut at the limit, of all blocks up to each."""
    cumulative = 0.0
    for block in range(cdf.shape[0]):
        cumulative += _clipped_sum(mass[block * BLOCK : (block + 1) * BLOCK], limit)
        cdf[block] = cumulative


@njit(error_model="numpy")
def _attend_row(
    t: Any, head: Any, m: Any, x: Any, own: Any, mass: Any, plan: Any, place: Any, cdf: Any
) -> None:
    """Draw by the masses `mass` (n,), weigh the draws for row m, and write the results.

    `own` are the row's own masses, which sum to 1, where `mass` are those of a group. `plan` is the mass from
    which a key is sure, and the total.
    """
    limit, total = plan
    replicates, draws = t.replicates, t.draws
    shape = (t.heads, t.capacity, t.features + t.width)
    table = carray(_pointer(t.table_at), shape, np.float32)[head]
    half_table = carray(_pointer(t.table_at), shape, np.uint16)[head]
    order = carray(_pointer(t.order_at), (t.heads, t.capacity), np.int64)[head]
    sequences = carray(_pointer(t.sequences_at), t.heads // t.groups, np.int64)
    drawn = (t.heads, t.rows, replicates * draws)
    tokens = carray(_pointer(t.indices_at), drawn, np.int64)[head, m]
    weights = carray(_pointer(t.weights_at), drawn, np.float32)[head, m]
    proposed = carray(_pointer(t.proposed_at), drawn, np.float32)[head, m]
    pi = carray(_pointer(t.inclusion_at), drawn, np.float32)[head, m]
    output = carray(_pointer(t.output_at), (t.heads, t.rows, t.width), np.float32)[head, m]
    output[:] = zero
    key = sequence_key(t.seed, sequences[head // t.groups])
    of_own = 1 / total if not t.grouped else 1.0
    for r in range(replicates):
        offset = row_offset(key, t.first_position + m % t.positions, head % t.groups, r)
        within = _place(mass, limit, offset, cdf, draws * np.float64(limit), place)
        part = slice(r * draws, (r + 1) * draws)
        of_draws, of_tokens = pi[part], tokens[part]
        for s in range(draws):
            of_tokens[s] = order[place[s]]
            proposed[r * draws + s] = own[place[s]] * of_own
            of_draws[s] = min(mass[place[s]] / limit, one)
        share = one / np.float32(replicates)
        if t.half:
            _weigh(x, half_table, of_tokens, within, of_draws, weights[part], output, share)
        else:
            _weigh(x, table, of_tokens, within, of_draws, weights[part], output, share)
    carray(_pointer(t.rate_at), (t.heads, t.rows), np.float32)[head, m] = total / limit
    carray(_pointer(t.effective_at), (t.heads, t.rows), np.float32)[head, m] = one / _dot(weights, weights)


def attend_task(address: Any) -> None:
    """Take tiles of rows of the task at this address until none is left.

    Any number of threads may do so at once. A tile is some rows of a head, or those of one position where
    they draw the same keys. `launch.compiled` compiles this.
    """
    t = carray(_pointer(address), 1, TASK)[0]
    queries = carray(_pointer(t.queries_at), (t.heads, t.rows, t.features), np.float32)
    tiles, scale = t.units // max(1, t.heads), np.float32(t.scale)
    x, scores = np.empty((t.tile, t.features), np.float32), np.empty((t.tile, t.keys), np.float32)
    place, cdf = np.empty(t.draws, np.int64), np.empty((t.keys + BLOCK - 1) // BLOCK, np.float64)
    of_group, totals = np.empty(t.keys if t.grouped else 0, np.float32), np.empty(t.tile, np.float64)
    while True:
        unit = _fetch_and_increment(address)  # of `next_unit`, the first field
        if unit >= t.units:
            return
        head, tile = unit // tiles, unit % tiles
        # The rows of a position lie `positions` apart.
        begin, step = (tile, t.positions) if t.grouped else (tile * t.tile, 1)
        count = min(t.tile, (t.rows - begin + step - 1) // step)
        for i in range(count):
            x[i] = queries[head, begin + i * step] * scale
        score_rows(scores[:count], head, x[:count], t)
        for i in range(count):
            totals[i] = _masses(x[i], scores[i])
            if np.isnan(totals[i]):
                t.not_finite = 1
                return
        if t.grouped:
            _mean_masses(scores[:count], totals, of_group)
            plan = _sure_mass(of_group, 1.0, t)
            _cumulate(of_group, plan[0], cdf)
        for i in range(count):
            mass = of_group
            if not t.grouped:
                mass = scores[i]
                plan = _sure_mass(mass, totals[i], t)
                _cumulate(mass, plan[0], cdf)
            _attend_row(t, head, begin + i * step, x[i], scores[i], mass, plan, place, cdf)
