"""`qtx-lab bench guarantee`: how often a cache misses its tolerance, and how many keys it reads for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from ..cache import SampledKVCache
from ..cache.policies import make_policy
from ..models.language_model import load_language_model
from ..models.reference import load_reference_model
from ..models.text import encode, reference_text
from .base import BenchRow
from .llm_rows import text_rows

PROMISES = tuple((tolerance, risk) for tolerance in (0.05, 0.1) for risk in (0.05, 0.01))
"""(epsilon, delta)."""

ROWS = 54
"""Queries of a head: the last ones of a text."""

COUNT = 100_000
"""Rows of a kind and promise, at least, repetitions with other random numbers among them."""

FOR_OUTPUTS = "vAttention, outputs"
"""The method of `vattention_for_outputs` in the table."""

FALSE_ALARM = 1e-3
"""Probability with which a promise that is just kept fails the check, by chance."""

FITTED_QUERIES = 64
"""Queries before those of the rows, to which sketches are fitted."""

PEER_ROWS = 6
"""Queries of a head with which the keys that vAttention reads are counted."""

PEER_BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
"""Least shares of the keys that vAttention may read: see `vattention`."""

OUTPUT_BUDGETS, OUTPUT_SHARES = (0.05, 0.1, 0.2, 0.4), (1 / 4, 1 / 8)
"""Least shares of the keys, and shares of epsilon that vAttention is given: see `vattention_for_outputs`."""

RARE_SHARE = 0.13
"""Of the keys in `rare_errors`: so many that a row misses epsilon = .05 where few of them are drawn."""

KEYS, FEATURES, WIDTH = 1024, 32, 32
"""The size of the adversarial rows."""


@dataclass(frozen=True)
class RowKind:
    """Rows that attend to all keys of a cache.

    Parameters
    ----------
    name : str
    layers : tuple of (Tensor, Tensor, Tensor, Tensor)
        Of each layer q (H, L, E), k (Hkv, n, E), v (Hkv, n, Ev), and the queries that a sketch is fitted to.
    scale : float or None
    """

    name: str
    layers: tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]
    scale: float | None = None

    @property
    def rows(self) -> int:
        """Rows of all layers."""
        return sum(q.shape[:2].numel() for q, *_ in self.layers)


@dataclass(frozen=True)
class KeptPromise:
    """How rows of a kind fared.

    Parameters
    ----------
    misses, rows : int
    errors : Tensor, float64, (rows,)
        |o_hat - o| / |o|.
    keys_read : Tensor, float64, (rows,)
    keys_of_heads : list of float
        The mean share of the keys that the rows of a head read, for each head of all layers.
    bytes : float
        Bytes of sketches, and of the keys and values that the heads of a group read, in half precision, over
        those of all keys and values.
    without_draws, exact : float
        Shares of the rows.
    seconds : float
        CPU time.
    """

    misses: int
    rows: int
    errors: Tensor
    keys_read: Tensor
    keys_of_heads: list[float]
    bytes: float
    without_draws: float
    exact: float
    seconds: float


def bench_guarantee(quick: bool, copy_bandwidth: float) -> list[BenchRow]:
    """Misses of P(|o_hat - o| > epsilon |o|) <= delta by `SampledKVCache.attend`, and the keys that are read.

    Rows are those of SmolLM2-135M over documentation text (all layers; where quick, two), those of the
    reference model, and adversarial ones (`ADVERSARIAL`): at least 100,000 (2,000) of each of these three,
    for each promise, repetitions with other random numbers among them. A query sees all keys of its cache.

    `error` is the share of rows that miss, `seconds` the CPU time of all, `ratio` the keys that vAttention
    reads at the same epsilon and delta over the keys that a row reads: the median over heads of the means of
    their rows. vAttention (`cache.policies`) is told the exact heaviest keys, which counts in its bytes and
    not in its keys. It has that of several least budgets with which it reads fewest keys and keeps its own
    promise, of the denominator, which is weaker than that of the output; `vAttention, outputs` has an epsilon
    and a budget with which its outputs miss the tolerance no more often than delta. Further details:

    - `tolerance`, `risk`, `rows`, `misses`; `miss low`, `miss high`: the Clopper-Pearson interval of the
      share, 95 %; for the adversarial rows also `of each case`: misses and rows by case;
    - `keys read`: a row, the median; `share of keys`: the median over heads of the mean share;
    - `bytes`: of sketches, keys and values, as a share of what exact attention reads in half precision;
    - `without draws`, `exact`: shares of the rows that were sure, and that were computed exactly;
    - `ratio for outputs`: the keys of `vAttention, outputs` over those that a row reads;
    - of vAttention, `budget`, the `epsilon` that it is given, `misses` of the output, of which it promises
      nothing, and `own misses`, of the denominator.

    A promise fails where so many misses would have a probability below 0.1 % if each had the one allowed.
    """
    del copy_bandwidth
    kinds = [(kind,) for kind in model_rows(quick)] + [tuple(make() for make in ADVERSARIAL.values())]
    count = 2000 if quick else COUNT
    rows: list[BenchRow] = []
    peers = PEER_BUDGETS[2:4] if quick else PEER_BUDGETS
    output_peers = ((0.2,), (1 / 4,)) if quick else (OUTPUT_BUDGETS, OUTPUT_SHARES)
    runs = [(kind, promise) for kind in kinds for promise in (PROMISES[1:3] if quick else PROMISES)]
    for kind, (tolerance, risk) in tqdm(runs, desc="guarantee", leave=False):
        promises = [keep(one, tolerance, risk, -(-count // len(kind))) for one in kind]
        peer = for_outputs = None
        if len(kind) == 1:
            peer = vattention(kind[0], tolerance, risk, peers)
            rows.append(_peer_row(kind[0].name, "vAttention", tolerance, risk, peer))
            for_outputs = vattention_for_outputs(kind[0], tolerance, risk, *output_peers)
            if for_outputs is not None:
                rows.append(_peer_row(kind[0].name, FOR_OUTPUTS, tolerance, risk, for_outputs))
        name = kind[0].name if len(kind) == 1 else "adversarial"
        rows.append(_row(name, [one.name for one in kind], tolerance, risk, promises, peer, for_outputs))
    print_table(rows)
    return rows


def keep(kind: RowKind, tolerance: float, risk: float, count: int) -> KeptPromise:
    """Attend by at least `count` rows of a kind, within the tolerance."""
    errors, reads, without_draws, exact_rows = [], [], 0, 0
    heads: list[float] = []
    of_bytes: list[float] = []
    start = time.process_time()
    for number, (q, k, v, fitted) in enumerate(kind.layers):
        cache = SampledKVCache.build(k, v, "int8", queries=fitted)
        expected = exact(q, k, v, kind.scale)
        generator = torch.Generator().manual_seed(number)
        of_layer = []
        for _ in range(-(-count // kind.rows)):
            est = cache.attend(
                q, tolerance=tolerance, confidence=1 - risk, scale=kind.scale, generator=generator
            )
            read, about = est.info.draws_per_row, est.info.cache
            assert isinstance(read, Tensor)
            assert about is not None
            of_layer.append(read.double())
            errors.append(((est.output - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten())
            without_draws += about["rows_without_draws"]
            exact_rows += about["rows_exact"]
            size = 2 * (k.shape[-1] + v.shape[-1])  # of a token, in half precision
            union = est.keys_touched().double().mean() * k.shape[0]
            sketches = about["sketch_bytes"]
            of_bytes.append(float((sketches + union * size) / (k.shape[0] * k.shape[1] * size)))
        mean = torch.stack(of_layer)
        reads.append(mean.flatten())
        heads += (mean.mean((0, 2)) / k.shape[1]).tolist()
    error = torch.cat(errors)
    rows = error.numel()
    return KeptPromise(
        misses=int((error > tolerance).sum()),
        rows=rows,
        errors=error,
        keys_read=torch.cat(reads),
        keys_of_heads=heads,
        bytes=sum(of_bytes) / len(of_bytes),
        without_draws=without_draws / rows,
        exact=exact_rows / rows,
        seconds=time.process_time() - start,
    )


@dataclass(frozen=True)
class PeerReads:
    """What vAttention read, with `budget` as its least share of the keys: see `KeptPromise`.

    `misses` are those of the output, `own_misses` of the denominator, on either side, for the `epsilon` that
    it was given.
    """

    budget: float
    epsilon: float
    keys_of_heads: list[float]
    misses: int
    own_misses: int
    rows: int
    bytes: float
    seconds: float


def vattention(kind: RowKind, tolerance: float, risk: float, budgets: Sequence[float]) -> PeerReads:
    """The fewest keys that vAttention reads with a budget that keeps its own promise.

    That is of the denominator, with the risk delta on either side. Where no budget keeps it, that with the
    fewest misses of it.
    """
    reads = [_vattention(kind, tolerance, risk, budget) for budget in budgets]
    keeping = [x for x in reads if x.own_misses <= 2 * risk * x.rows]
    if keeping:
        return min(keeping, key=lambda x: median(x.keys_of_heads))
    return min(reads, key=lambda x: x.own_misses)


def vattention_for_outputs(
    kind: RowKind, tolerance: float, risk: float, budgets: Sequence[float], shares: Sequence[float]
) -> PeerReads | None:
    """The fewest keys that vAttention reads where its *outputs* miss the tolerance no more often than delta.

    It promises nothing of outputs, so that its epsilon has to be smaller than the tolerance. Here that and
    its budget are chosen in hindsight, by the misses of these very rows, which is in its favour. None where
    no choice keeps it.
    """
    reads = [_vattention(kind, tolerance, risk, b, tolerance * share) for b in budgets for share in shares]
    keeping = [x for x in reads if x.misses <= risk * x.rows]
    return min(keeping, key=lambda x: median(x.keys_of_heads)) if keeping else None


def _vattention(
    kind: RowKind, tolerance: float, risk: float, budget: float, epsilon: float | None = None
) -> PeerReads:
    epsilon = tolerance if epsilon is None else epsilon
    policy = make_policy("vattention", budget=budget, epsilon=epsilon, delta=risk)
    heads: list[float] = []
    misses = own_misses = rows = 0
    of_bytes: list[float] = []
    start = time.process_time()
    for number, (q, k, v, _) in enumerate(kind.layers):
        group = q.shape[0] // k.shape[0]
        every = q[:, -PEER_ROWS:].double()
        expected = exact(every, k, v, kind.scale)
        scale = 1 / math.sqrt(q.shape[-1]) if kind.scale is None else kind.scale
        for head in range(q.shape[0]):  # a head at a time, whose keys no other head shares
            keys, values = (x[head // group].double()[None, None] for x in (k, v))
            of_head = []
            for i in range(every.shape[1]):
                x = every[head, i][None, None, None]
                # With the feature exp(-l_j), the numerator is n, and the output tells the denominator.
                logits = scale * x @ keys.mT
                logits = logits - logits.amax()
                marked = torch.cat((values, logits.neg().exp().mT), -1)
                layer = (number * q.shape[0] + head) * PEER_ROWS + i  # random numbers of its own
                cache = policy.start(layer, *2 * (keys[:, :, :-1],), marked[:, :, :-1], scale=kind.scale)
                cache.append(keys[:, :, -1:], marked[:, :, -1:])
                output, o = cache.attend(x)[0, 0, 0], expected[head, i]
                misses += int((output[:-1] - o).norm() > tolerance * o.norm())
                denominator = keys.shape[-2] / output[-1] / logits.exp().sum()
                own_misses += int((denominator - 1).abs() > epsilon)
                of_head.append(cache.reads.values)
                size = k.shape[-1] + v.shape[-1]  # of every key and the values that were read
                of_bytes.append((k.shape[-1] + cache.reads.values * v.shape[-1]) / size)
            heads.append(sum(of_head) / len(of_head))
            rows += len(of_head)
    seconds = time.process_time() - start
    return PeerReads(budget, epsilon, heads, misses, own_misses, rows, sum(of_bytes) / len(of_bytes), seconds)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Exact attention of q (H, L, E) to all keys, in float64."""
    group = q.shape[0] // k.shape[0]
    q, k, v = q.double(), k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (q @ k.mT * scale).softmax(-1) @ v


# --- Rows ---------------------------------------------------------------------------------------


def model_rows(quick: bool) -> list[RowKind]:
    """Rows of SmolLM2-135M (2,048 tokens; quick: two layers and 1,024), and of the reference model."""
    model = load_language_model("smollm2-135m")
    layers = (3, 15) if quick else tuple(range(model.config.layers))
    kinds = [
        RowKind(
            "SmolLM2-135M",
            tuple(_last(x.q[0], x.k[0], x.v[0]) for x in text_rows(model, 1024 if quick else 2048, layers)),
        )
    ]
    reference = load_reference_model()
    tokens = encode(reference_text())[None, : reference.config.context]
    inputs = reference.attention_inputs(tokens)
    kinds.append(RowKind("reference model", tuple(_last(*(y[0] for y in x)) for x in inputs)))
    return kinds


def _last(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q[:, -ROWS:], k, v, q[:, -ROWS - FITTED_QUERIES : -ROWS]


def _tokens(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.3, FEATURES)
    k = torch.randn(2, KEYS, FEATURES, generator=g) * spread
    k[..., 0] += 6
    v = torch.randn(2, KEYS, WIDTH, generator=g) + 0.3
    q, fitted = (torch.randn(4, rows, FEATURES, generator=g) for rows in (ROWS, FITTED_QUERIES))
    return q, k, v, fitted


def _missed() -> RowKind:
    """Keys far out, of one of which the value is heavy, which appended tokens hide from the fitted steps."""
    q, k, v, fitted = _tokens(1)
    k[:, 100], k[:, 200] = 0, 0
    k[:, 100, 3], k[:, 200, 3] = 400, -400
    v[:, 100] *= 100
    return RowKind("keys that the sketch misses", ((q, k, v, fitted),))


def _heavy() -> RowKind:
    q, k, v, fitted = _tokens(2)
    v = v.sign() * (1.5 * v.abs()).exp()
    v[:, 300] *= 1000
    return RowKind("heavy values", ((q, k, v, fitted),))


def _nearly_nothing() -> RowKind:
    q, k, v, fitted = _tokens(3)
    k[:, 1::2], v[:, 1::2] = k[:, ::2], -v[:, ::2]
    v += 0.02 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    return RowKind("outputs near zero", ((q, k, v, fitted),))


def _sink() -> RowKind:
    q, k, v, fitted = _tokens(4)
    k[:, 0] *= 5
    v[:, 0] *= 0.02
    return RowKind("a sink", ((q, k, v, fitted),))


def _alternating() -> RowKind:
    q, k, v, fitted = _tokens(5)
    v[:, ::2], v[:, 1::2] = 1.0, -0.9
    return RowKind("values that alternate", ((q, k, v, fitted),))


def rare_errors(share: float = RARE_SHARE) -> RowKind:
    """Rows whose sketch is exact but for a few keys, which are as wrong as its bounds allow, all in one way.

    Keys have two components on a grid of the sketch's own steps, one unit each. Every key is nearly half a
    step off the grid in the second component, to which queries are blind, and a share of them in the first.
    As the bounds of all keys are alike, only draws can tell these keys from the others, and where none of
    them is drawn, the row misses its tolerance.
    """
    n, off = 8192, 0.48
    few = 25 * round(share * n / 25)  # the sum of so many `off` is whole
    first = (torch.arange(n) * 5 % 7 - 3).float()
    first[:40] = -128.0  # these have no weight, and make the steps
    rare = torch.zeros(n, dtype=torch.bool)
    rare[1000 : 1000 + few] = True
    first[rare] += off
    surplus = int((first.sum() + n).round())  # of a mean of -1, which is on the grid
    first[4500 : 4500 + abs(surplus)] -= math.copysign(1, surplus)
    second = (torch.arange(n) // 2 % 40).float() + off
    second[40:60] = 127.0
    second[1::2] *= -1
    others = (~rare).nonzero()[:, 0]
    negative = (0.35 * n - few) / len(others)  # 35 % of all values, those of the wrong keys among them
    turn = torch.arange(len(others) + 1, dtype=torch.float64) * negative
    v = -torch.ones(n, 1)
    v[others] = 1 - 2 * turn.floor().diff()[:, None].float()
    q = torch.zeros(1, ROWS, 2)
    q[..., 0] = 0.2
    fitted = torch.eye(2).repeat(8, 1)
    k = torch.stack((first, second), -1)
    return RowKind("rare errors, all alike", ((q, k[None], v[None], fitted[None]),), scale=1.0)


ADVERSARIAL: dict[str, Callable[[], RowKind]] = {
    "keys that the sketch misses": _missed,
    "heavy values": _heavy,
    "outputs near zero": _nearly_nothing,
    "a sink": _sink,
    "values that alternate": _alternating,
    "rare errors, all alike": rare_errors,
}


# --- The table ----------------------------------------------------------------------------------


def _row(
    name: str,
    cases: list[str],
    tolerance: float,
    risk: float,
    promises: list[KeptPromise],
    peer: PeerReads | None,
    for_outputs: PeerReads | None = None,
) -> BenchRow:
    misses, rows = sum(x.misses for x in promises), sum(x.rows for x in promises)
    interval = stats.binomtest(misses, rows).proportion_ci(0.95)
    heads = [share for x in promises for share in x.keys_of_heads]
    # Every case has to keep the promise by itself.
    broken = [
        f"{case}: {x.misses / x.rows:.2%} of {x.rows:,} miss"
        for case, x in zip(cases, promises, strict=True)
        if stats.binom.sf(x.misses - 1, x.rows, risk) < FALSE_ALARM
    ]
    ratio = None if peer is None or broken else median(peer.keys_of_heads) / median(heads)
    details: dict[str, Any] = {
        "tolerance": tolerance,
        "risk": risk,
        "rows": rows,
        "misses": misses,
        "miss low": float(interval.low),
        "miss high": float(interval.high),
        "keys read": float(torch.cat([x.keys_read for x in promises]).median()),
        "share of keys": median(heads),
        "bytes": sum(x.bytes * x.rows for x in promises) / rows,
        "without draws": sum(x.without_draws * x.rows for x in promises) / rows,
        "exact": sum(x.exact * x.rows for x in promises) / rows,
        "median error": float(torch.cat([x.errors for x in promises]).median()),
    }
    if for_outputs is not None:
        details["ratio for outputs"] = median(for_outputs.keys_of_heads) / median(heads)
    if len(cases) > 1:
        details["of each case"] = {case: (x.misses, x.rows) for case, x in zip(cases, promises, strict=True)}
    return BenchRow(
        _case(name, tolerance, risk),
        "int8 cache",
        sum(x.seconds for x in promises),
        "" if peer is None else "vAttention",
        ratio,
        misses / rows,
        "pass" if not broken else "; ".join(broken),
        details=details,
    )


def _peer_row(name: str, method: str, tolerance: float, risk: float, peer: PeerReads) -> BenchRow:
    interval = stats.binomtest(peer.misses, peer.rows).proportion_ci(0.95)
    return BenchRow(
        _case(name, tolerance, risk),
        method,
        peer.seconds,
        "",
        None,
        peer.misses / peer.rows,
        "pass",  # it promises nothing of the output
        details={
            "tolerance": tolerance,
            "risk": risk,
            "rows": peer.rows,
            "misses": peer.misses,
            "miss low": float(interval.low),
            "miss high": float(interval.high),
            "share of keys": median(peer.keys_of_heads),
            "bytes": peer.bytes,
            "budget": peer.budget,
            "epsilon": peer.epsilon,
            "own misses": peer.own_misses,
        },
    )


def _case(name: str, tolerance: float, risk: float) -> str:
    return f"{name}, ε = {tolerance:g}, δ = {risk:g}"


def print_table(rows: Sequence[BenchRow]) -> None:
    """Print the rows."""
    print(
        f"\n  {'case':<38}{'method':<20}{'rows':>9}{'misses':>8}{'(95 % interval)':>20}{'keys':>7}"
        f"{'× fewer':>9}{'bytes':>7}{'sure':>6}{'exact':>7}  check"
    )
    for row in rows:
        d = row.details
        interval = f"({d['miss low']:.3%}–{d['miss high']:.3%})"
        more = [f"{d[name]:.0%}" if name in d else "–" for name in ("without draws", "exact")]
        ratio = "–" if row.ratio is None else f"{row.ratio:.1f}"
        print(
            f"  {row.case:<38}{row.method:<20}{d['rows']:>9,}{d['misses']:>8,}{interval:>20}"
            f"{d['share of keys']:>7.2%}{ratio:>9}{d['bytes']:>7.0%}{more[0]:>6}{more[1]:>7}  {row.check}"
        )
    print(
        "  keys: share of the keys that a row reads, median over heads; × fewer: vAttention's over it,\n"
        "  where that keeps its own promise, of the denominator; outputs: where its outputs keep ours;\n"
        "  bytes: with sketches, of exact attention in half precision; sure: rows without draws;\n"
        "  exact: rows that read all keys."
    )
