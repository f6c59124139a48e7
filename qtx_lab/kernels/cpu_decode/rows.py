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
from numba.core import cgutils
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

BLOCK = 64
"""Keys of a block, whose sum and largest mass are known: most passes over masses look at few keys."""
FIRST_CACHE = 1 << 14
"""Bytes of a sketch that are put in order at a time for all rows of a tile: a core's own cache holds them."""
TILE = 8
"""Rows of a head that read the sketch together."""
AHEAD = 8
"""Draws whose keys and values are requested in advance."""
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
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(2), word(1)])
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


# --- Components on vectors: numba itself makes no instructions that multiply and add bytes ---------

LANES, COLUMNS = 16, 4
"""Keys of a vector, and the vectors of a `BLOCK` of keys."""
WHOLE, NUMBER = ir.IntType(64), ir.IntType(32)
BYTES, NUMBERS = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(NUMBER, LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _load(builder: Any, at: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(at, kind.as_pointer()), align=1)


def _store(builder: Any, x: Any, at: Any) -> None:
    builder.store(x, builder.inttoptr(at, x.type.as_pointer()), align=1)


def _shuffle(builder: Any, x: Any, y: Any, places: Any) -> Any:
    places = list(places)
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(NUMBER, len(places)), places))


def _splat(builder: Any, x: Any) -> Any:
    kind = ir.VectorType(x.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), x, NUMBER(0))
    return _shuffle(builder, first, first, [0] * LANES)


def _interleave(builder: Any, x: Any, y: Any, half: int) -> Any:
    """The lower (0) or upper (1) half of the numbers of each 16 bytes of x, each followed by y's."""
    count = x.type.count
    each = count // 4  # numbers of 16 bytes
    first = range(half * each // 2, (half + 1) * each // 2)
    return _shuffle(
        builder,
        x,
        y,
        [z for part in range(4) for j in first for z in (each * part + j, count + each * part + j)],
    )


@typed_intrinsic
def _fours(typing: Any, out: Any, a: Any, b: Any, c: Any, d: Any, flip: Any) -> Any:
    """Write the bytes of a block of keys at a, b, c and d beside each other, each changed by `flip`.

    The four bytes of key 16 i + 4 j + k of the block (j, k < 4) become the number 4 i + k of vector j.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, *lines, change = args
        pairs = ir.VectorType(ir.IntType(16), 2 * LANES)
        changes = builder.bitcast(_splat(builder, change), BYTES)
        w, x, y, z = (builder.xor(_load(builder, at, BYTES), changes) for at in lines)
        for upper in (0, 1):
            one, other = (
                builder.bitcast(_interleave(builder, *both, upper), pairs) for both in ((w, x), (y, z))
            )
            for half in (0, 1):
                place = WHOLE(4 * LANES * (2 * upper + half))
                _store(builder, _interleave(builder, one, other, half), builder.add(to, place))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, types.int32), generate


def _scoring(bits: int) -> Any:
    """A function that scores components of 8, 4 or 2 bits."""

    def add_products(context: Any, builder: Any, sums: Any, data: Any, level: Any) -> Any:
        """Add the bytes of `data`, times eight levels: bytes of 128 units, then bytes of units."""
        features = context.codegen().magic_tuple()[2]
        if "+avx512vnni" in features:
            kind, name = ir.FunctionType(NUMBERS, [NUMBERS] * 3), "llvm.x86.avx512.vpdpbusd.512"
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            return [
                builder.call(function, [total, data, _splat(builder, x)])
                for total, x in zip(sums, level, strict=True)
            ]
        total = sums[1]
        for i in range(4):
            high, low = (builder.ashr(builder.shl(x, NUMBER(24 - 8 * i)), NUMBER(24)) for x in level)
            both = builder.add(builder.shl(high, NUMBER(7)), low)
            byte = builder.and_(builder.lshr(data, ir.Constant(NUMBERS, [8 * i] * LANES)), mask(255))
            total = builder.add(total, builder.mul(byte, _splat(builder, both)))
        return [sums[0], total]

    def mask(number: int) -> Any:
        return ir.Constant(NUMBERS, [number] * LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, fours, stride, levels, count, keys, unit, base, add = args
        totals = [[cgutils.alloca_once(builder, NUMBERS) for _ in range(2)] for _ in range(COLUMNS)]
        scale, bases = _splat(builder, unit), _splat(builder, base)
        added = builder.icmp_signed("!=", add, WHOLE(0))
        with cgutils.for_range_slice(builder, WHOLE(0), keys, WHOLE(BLOCK), WHOLE) as (key, _):
            for total in totals:
                for plane in total:
                    builder.store(ir.Constant(NUMBERS, None), plane)
            here = builder.add(fours, builder.mul(key, WHOLE(4)))
            with cgutils.for_range(builder, count, intp=WHOLE) as loop:
                line = builder.add(here, builder.mul(loop.index, stride))
                for part in range(8 // bits):
                    at = builder.add(builder.mul(loop.index, WHOLE(64 // bits)), WHOLE(8 * part))
                    level = [
                        _load(builder, builder.add(levels, builder.add(at, WHOLE(4 * i))), NUMBER)
                        for i in (0, 1)
                    ]
                    for i, total in enumerate(totals):
                        data = _load(builder, builder.add(line, WHOLE(4 * LANES * i)), NUMBERS)
                        if bits < 8:
                            data = builder.lshr(data, mask(bits * part))
                            data = builder.and_(data, mask(((1 << bits) - 1) * 0x01010101))
                        sums = [builder.load(plane) for plane in total]
                        sums = add_products(context, builder, sums, data, level)
                        for x, plane in zip(sums, total, strict=True):
                            builder.store(x, plane)
            columns = []
            for total in totals:
                high, low = (builder.load(plane) for plane in total)
                both = builder.add(builder.shl(high, mask(7)), low)
                columns.append(builder.fmul(builder.sitofp(both, FLOATS), scale))
            for i in range(COLUMNS):  # in the order of the keys again
                four = (*range(4 * i, 4 * i + 4), *range(16 + 4 * i, 20 + 4 * i))
                first, last = (_shuffle(builder, x, y, four) for x, y in (columns[:2], columns[2:]))
                at = builder.add(out, builder.mul(builder.add(key, WHOLE(LANES * i)), WHOLE(4)))
                before = builder.select(added, _load(builder, at, FLOATS), ir.Constant(FLOATS, None))
                scores = builder.fadd(_shuffle(builder, first, last, range(LANES)), bases)
                scores = builder.fadd(scores, before)
                _store(builder, scores, at)
        return context.get_dummy_value()

    def score_fours(
        typing: Any,
        out: Any,
        fours: Any,
        stride: Any,
        levels: Any,
        count: Any,
        keys: Any,
        unit: Any,
        base: Any,
        add: Any,
    ) -> Any:
        """Let the float32 at `out` be unit * (components . levels) + base, of keys in whole blocks.

        Or add it to them, where `add` is not 0. The bytes are at `fours`, as `_fours` writes them, four more
        lines of them `stride` bytes further, `count` times. The levels are at `levels`: for each four lines,
        and for each component of a byte from the lowest bits on, four bytes that count 128 and four that
        count 1.
        """
        return types.void(*[types.int64] * 6, types.float32, types.float32, types.int64), generate

    return typed_intrinsic(score_fours)


_score_bytes, _score_nibbles, _score_quarters = (_scoring(bits) for bits in (8, 4, 2))


@njit(fastmath={"contract"})  # in this order, or the reduction of x loses its last digits
def _exp(x: Any) -> Any:
    """e^x, x <= 0, to 3e-7 + 6e-8 |x|: 2^n times the polynomial of the least relative error."""
    x = x * np.float32(1.44269504088896341)
    x = np.float32(-125) if x < np.float32(-125) else x
    n = np.floor(x + np.float32(0.5))
    x = x - n
    y = np.float32(1.3276471291e-3)
    y = y * x + np.float32(9.6755409613e-3)
    y = y * x + np.float32(5.5507130921e-2)
    y = y * x + np.float32(2.4022120237e-1)
    y = y * x + np.float32(6.9314694405e-1)
    y = y * x + one
    return np.int32(np.float32(y).view(np.int32) + (np.int32(n) << np.int32(23))).view(np.float32)


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


@njit(fastmath={"contract"})
def _add_scaled(out: Any, x: Any, scale: Any) -> None:
    for j in range(out.shape[0]):
        out[j] += scale * x[j]


@njit
def _four_lines(
    to: Any, stride: Any, lines_at: Any, capacity: Any, lines: Any, begin: Any, end: Any, flip: Any
) -> None:
    """Put each four lines of components beside each other, of keys `begin` to `end`, `stride` bytes apart.

    Lines that are missing to four are the last one.
    """
    edge = np.zeros((4, BLOCK), np.uint8)
    for four in range((lines + 3) // 4):
        a, b = lines_at + 4 * four * capacity, lines_at + min(4 * four + 1, lines - 1) * capacity
        c = lines_at + min(4 * four + 2, lines - 1) * capacity
        d = lines_at + min(4 * four + 3, lines - 1) * capacity
        for key in range(begin, end, BLOCK):
            at = to + four * stride + 4 * (key - begin)
            if key + BLOCK <= end:
                _fours(at, a + key, b + key, c + key, d + key, flip)
                for line in (a, b, c, d):
                    _prefetch(line + key + end - begin)
                continue
            for i, line in enumerate((a, b, c, d)):  # nothing is read behind the last key
                edge[i, : end - key] = carray(_pointer(line + key), end - key, np.uint8)
            first = edge.ctypes.data
            _fours(at, first, first + BLOCK, first + 2 * BLOCK, first + 3 * BLOCK, flip)


@njit
def _in_levels(component: Any, bits: Any, first: Any, rank: Any, level: Any) -> Any:
    """Write a query's components in levels (fours, 8 / bits, 2, 4) for lines of so many bits a component.

    The lines hold `rank` components from `first` on. Returns the unit of the levels, and the score of a
    key of which 0 is stored.
    """
    parts = level.shape[1]
    lines = (rank + parts - 1) // parts
    step, middle = np.float32(2 if bits == 2 else 1), np.float32(1.5 if bits == 2 else 1 << (bits - 1))
    unit, score = np.float32(1e-30), zero
    for i in range(first, first + rank):
        unit = max(unit, np.abs(component[i]) * step)
    unit /= np.float32(min(127 * 128, (1 << 23) // max(1, rank) - 1))  # sums of 255 times them fit 32 bits
    level[:] = np.int8(0)
    for i in range(rank):
        number = np.int32(np.rint(component[first + i] * step / unit))
        line, part = i % lines, i // lines
        high = (number + 64) >> 7
        level[line // 4, part, 0, line % 4] = np.int8(high)
        level[line // 4, part, 1, line % 4] = np.int8(number - (high << 7))
        score -= unit * middle * np.float32(number)
    return unit, score


@njit
def _scores_of_keys(out: Any, x: Any, table: Any, order: Any, keys: Any) -> None:
    """Exact scores (rows, n) of rows x (rows, E), in the order of the places."""
    features, rows = x.shape[1], x.shape[0]
    by_token = np.empty((rows, keys), np.float32)
    for j in range(keys):  # as they lie in memory
        for i in range(rows):
            by_token[i, j] = _dot(x[i], table[j, :features])
    for i in range(rows):
        for place in range(keys):
            out[i, place] = by_token[i, order[place]]


@njit
def _scores_of_sketch(out: Any, x: Any, t: Any, lines_at: Any, weight: Any, exact: Any) -> None:
    """Scores (rows, n) of rows x (rows, E) by a head's components at `lines_at`.

    The first places, which `exact` (T, E) has centred keys for, get exact scores. All lack the same
    shift, that of the centre.
    """
    upper = (t.rank + 2) // 3 if t.kind == MIXED else t.rank  # components of more than 2 bits
    bits = 8 if t.kind == INT8 else 4
    lines = upper if bits == 8 else (upper + 1) // 2
    component = np.empty((x.shape[0], t.rank), np.float32)
    for i in range(x.shape[0]):
        _multiply(x[i], weight, component[i])
    _add_lines(out, t.keys, component, 0, upper, bits, lines_at, t.line_capacity, lines)
    if t.lines > lines:
        at = lines_at + lines * t.line_capacity
        _add_lines(out, t.keys, component, upper, t.rank - upper, 2, at, t.line_capacity, t.lines - lines)
    for j in range(min(exact.shape[0], t.keys)):
        for i in range(x.shape[0]):
            out[i, j] = _dot(x[i], exact[j])


@njit
def _add_lines(
    out: Any,
    keys: Any,
    component: Any,
    first: Any,
    rank: Any,
    bits: Any,
    lines_at: Any,
    capacity: Any,
    lines: Any,
) -> None:
    """Add the scores of some lines at `lines_at`, of `rank` components from `first` on of so many bits.

    The first lines' scores are what the others' are added to.
    """
    rows, fours = component.shape[0], (lines + 3) // 4
    level = np.empty((rows, fours, 8 // bits, 2, 4), np.int8)
    unit, base = np.empty(rows, np.float32), np.empty(rows, np.float32)
    for i in range(rows):
        unit[i], base[i] = _in_levels(component[i], bits, first, rank, level[i])
    chunk = max(1, FIRST_CACHE // (4 * fours * BLOCK)) * BLOCK
    near = np.empty(4 * chunk * fours + BLOCK, np.uint8)
    add = int(first > 0)
    flip = np.int32(-0x7F7F7F80 if bits == 8 else 0)  # signed bytes become bytes that are 128 more
    for begin in range(0, keys, chunk):
        # In one cache line each. It is asked for in the loop, as numba frees an array after its last use.
        at, end = (near.ctypes.data + BLOCK - 1) // BLOCK * BLOCK, min(begin + chunk, keys)
        _four_lines(at, 4 * chunk, lines_at, capacity, lines, begin, end, flip)
        for i in range(rows):
            to, levels = out[i, begin:].ctypes.data, level[i].ctypes.data
            if bits == 8:
                _score_bytes(to, at, 4 * chunk, levels, fours, end - begin, unit[i], base[i], add)
            elif bits == 4:
                _score_nibbles(to, at, 4 * chunk, levels, fours, end - begin, unit[i], base[i], add)
            else:
                _score_quarters(to, at, 4 * chunk, levels, fours, end - begin, unit[i], base[i], add)


@njit
def score_rows(out: Any, head: Any, x: Any, t: Any) -> None:
    """Scores (rows, n) of scaled queries x (rows, E) of a head of task t, in the order of the places.

    `out` is (rows, n rounded up to a whole `BLOCK`), of which the last columns are overwritten.
    """
    if t.kind == EXACT:
        shape = (t.heads, t.capacity, t.features + t.width)
        order = carray(_pointer(t.order_at), (t.heads, t.capacity), np.int64)[head]
        if t.half:
            _scores_of_keys(out, x, carray(_pointer(t.table_at), shape, np.uint16)[head], order, t.keys)
        else:
            _scores_of_keys(out, x, carray(_pointer(t.table_at), shape, np.float32)[head], order, t.keys)
        return
    lines_at = t.lines_at + head * t.lines * t.line_capacity
    weight = carray(_pointer(t.weight_at), (t.heads, t.features, t.rank), np.float32)[head]
    exact = carray(_pointer(t.exact_at), (t.heads, t.exact_keys, t.features), np.float32)[head]
    _scores_of_sketch(out, x, t, lines_at, weight, exact)


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
def _exponentials(x: Any, top: Any, sums: Any, peaks: Any) -> Any:
    """Let x become exp(x - top); write each block's sum and largest, and return the sum of all."""
    total = 0.0
    for block in range(sums.shape[0]):
        part, some = x[block * BLOCK : (block + 1) * BLOCK], zero
        peak: Any = np.int32(0)  # bits of positive numbers are in their order
        for j in range(part.shape[0]):
            part[j] = _exp(part[j] - top)
            some += part[j]
            peak = max(peak, np.float32(part[j]).view(np.int32))
        sums[block], peaks[block] = some, np.int32(peak).view(np.float32)
        total += np.float64(some)
    return total


@njit(fastmath=SUMS)
def _survey(x: Any, sums: Any, peaks: Any) -> None:
    """Write the sum and the largest of each block of masses."""
    for block in range(sums.shape[0]):
        part, some = x[block * BLOCK : (block + 1) * BLOCK], zero
        peak: Any = np.int32(0)
        for j in range(part.shape[0]):
            some += part[j]
            peak = max(peak, np.float32(part[j]).view(np.int32))
        sums[block], peaks[block] = some, np.int32(peak).view(np.float32)


@njit(fastmath=SUMS)
def _above(x: Any, sums: Any, peaks: Any, limit: Any) -> Any:
    """How many are at least `limit`, and the sum of the others."""
    count, total = 0, 0.0
    for block in range(sums.shape[0]):
        if peaks[block] < limit:
            total += np.float64(sums[block])
            continue
        part, some = x[block * BLOCK : (block + 1) * BLOCK], zero
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


@njit
def _raise(mass: Any, sums: Any, peaks: Any, by: Any) -> None:
    """Add to all masses."""
    mass += by
    peaks += by
    for block in range(sums.shape[0]):
        sums[block] += by * np.float32(min(BLOCK, mass.shape[0] - block * BLOCK))


@njit(error_model="numpy")
def _sure_mass(mass: Any, sums: Any, peaks: Any, total: Any, t: Any) -> Any:
    """The mass from which a key is drawn surely, and the total: `reference.sure_mass`; raises `mass`.

    `sums` and `peaks` are those of the blocks of `mass`.
    """
    keys, draws, uniform = mass.shape[0], t.draws, t.defensive / (1 - t.defensive)
    if keys <= draws:
        _raise(mass, sums, peaks, np.float32(total * uniform / keys))
        return np.float32(LEAST_MASS), total * (1 + uniform)
    most = total / draws
    limit = most if t.adaptive else most / FIRST_RATE
    for step in range(NEWTON_STEPS + 1):
        sure, light = _above(mass, sums, peaks, np.float32(limit))
        left = np.float64(draws - sure)
        if t.adaptive:
            left = min(left, max(light / most, np.float64(FEWEST_LIGHT)))
        limit = min(max(light / left, LEAST_MASS), most) if sure < draws else most
        if step == NEWTON_STEPS - 1:
            raised = max(light * uniform, keys * LEAST_MASS / 2)
            _raise(mass, sums, peaks, np.float32(raised / keys))
            total += raised
    return np.float32(limit), total


@njit
def _clipped_eight(x: Any, at: Any, limit: Any) -> Any:
    """The sum of eight masses, cut at the limit, without waiting for one addition after the other."""
    a, b, c, d = min(x[at], limit), min(x[at + 1], limit), min(x[at + 2], limit), min(x[at + 3], limit)
    e, f, g, h = min(x[at + 4], limit), min(x[at + 5], limit), min(x[at + 6], limit), min(x[at + 7], limit)
    return np.float64(((a + b) + (c + d)) + ((e + f) + (g + h)))


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
        while sum_ <= point and at + 8 <= end:
            eight = _clipped_eight(mass, at + 1, limit)
            if sum_ + eight > point:
                break
            at, sum_ = at + 8, sum_ + eight
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
            for byte in range(0, size, 64):
                _prefetch(line + byte)
        if s < 0:
            continue
        if s >= within or (
            s and tokens[s] == tokens[s - 1]
        ):  # past the last key, or a sure one's second point
            weights[s] = -np.inf
        else:
            weights[s] = _dot(x, table[tokens[s], :features])
            top = max(top, weights[s])
    total = zero
    for s in range(draws):
        weights[s] = zero if weights[s] == -np.inf else _exp(weights[s] - top) / pi[s]
        total += weights[s]
    for s in range(draws):
        weights[s] *= share / total
        if weights[s] > zero:
            value, w = table[tokens[s], features:], weights[s]
            for i in range(output.shape[0]):
                output[i] += w * _number(value[i])


@njit(error_model="numpy")
def _masses(x: Any, mass: Any, sums: Any, peaks: Any) -> Any:
    """Let the scores `mass` (n,) of row x become masses; their total, or NaN if the row is not finite."""
    top = _top(mass)
    return _exponentials(mass, top, sums, peaks) if _finite(x) and top == top else np.nan


@njit
def _add_mean(out: Any, mass: Any, total: Any, rows: Any) -> None:
    """Let the masses (n,) of one of `rows` rows sum to 1, and add their share to the mean `out` (n,)."""
    mass *= np.float32(1 / total)
    _add_scaled(out, mass, np.float32(1 / rows))


@njit(error_model="numpy")
def _cumulate(mass: Any, sums: Any, peaks: Any, limit: Any, cdf: Any) -> None:
    """Write the masses, cut at the limit, of all blocks up to each."""
    cumulative = 0.0
    for block in range(cdf.shape[0]):
        if peaks[block] <= limit:
            cumulative += np.float64(sums[block])
        else:
            cumulative += np.float64(_clipped_sum(mass[block * BLOCK : (block + 1) * BLOCK], limit))
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
    blocks = (t.keys + BLOCK - 1) // BLOCK
    x, scores = np.empty((t.tile, t.features), np.float32), np.empty((t.tile, blocks * BLOCK), np.float32)
    place, cdf = np.empty(t.draws, np.int64), np.empty(blocks, np.float64)
    sums, peaks = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    of_group = np.empty(t.keys if t.grouped else 0, np.float32)
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
        score_rows(scores, head, x[:count], t)
        of_group[:] = zero
        for i in range(count):
            mass = scores[i, : t.keys]
            total = _masses(x[i], mass, sums, peaks)
            if np.isnan(total):
                t.not_finite = 1
                return
            if t.grouped:
                _add_mean(of_group, mass, total, count)
            else:
                plan = _sure_mass(mass, sums, peaks, total, t)
                _cumulate(mass, sums, peaks, plan[0], cdf)
                _attend_row(t, head, begin + i, x[i], mass, mass, plan, place, cdf)
        if t.grouped:
            _survey(of_group, sums, peaks)
            plan = _sure_mass(of_group, sums, peaks, 1.0, t)
            _cumulate(of_group, sums, peaks, plan[0], cdf)
            for i in range(count):
                row = begin + i * step
                _attend_row(t, head, row, x[i], scores[i, : t.keys], of_group, plan, place, cdf)
