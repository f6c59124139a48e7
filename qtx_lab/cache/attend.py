"""Attending to a cache, by the compiled pass, by a Triton kernel or in plain torch, with standard errors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_finite
from ..errors import ArgumentError
from ..estimates import AttentionEstimate, Draws, EstimateInfo, KernelUse, rounding_variance
from ..kernels.choice import choose, choose_cpu, slower_decode, triton_considered
from ..kernels.cpu_decode.reference import DrawnRows, DrawRule, draw_rows, rows_at
from ..kernels.inputs import MAX_DECODE_ROWS, Inputs
from ..kernels.memory import out_of_memory_explained
from ..problem import blocks
from ..streams import Stream
from .error_bars import RowErrors, ValueMoments, row_errors
from .sketches import ComponentSketch
from .store import TokenStore

BLOCK_ELEMENTS = 1 << 24
"""Size of a block in plain torch: its rows times the keys, or the draws times features, if more."""

FEWEST_DRAWS_FOR_TRITON = 16
"""Draws below which the Triton kernel's error bars, which know of the keys drawn alone, say too little."""

ABOVE_ONE = 1 - 2**-53
"""The largest point of a row's distribution."""


@dataclass(frozen=True)
class Call:
    """What a call of `attend` asks for.

    Parameters
    ----------
    q : Tensor, (..., H, L, E)
        As the caller has it.
    rows : Tensor, (N, M, E), M = (H / Hkv) L
        The same, in the cache's precision, the query heads of a key head together.
    rule : DrawRule
    scale : float
    seed : Tensor, int64, ()
    sequences : Tensor, int64, (B,)
        The names of the sequences, N / B key heads of each.
    sinks : Tensor, (N, M), or None
    softcap : float or None
        As in an `AttentionProblem`.
    """

    q: Tensor
    rows: Tensor
    rule: DrawRule
    scale: float
    seed: Tensor
    sequences: Tensor
    sinks: Tensor | None = None
    softcap: float | None = None

    @property
    def positions(self) -> int:
        """L."""
        return self.q.shape[-2]

    @property
    def group(self) -> int:
        """H / Hkv, the query heads that share a key head."""
        return self.rows.shape[1] // self.positions if self.positions else 1

    def stream(self, store: TokenStore) -> Stream:
        """The random numbers of the rows, the last of them at the last token's position."""
        groups = store.heads // max(1, len(self.sequences))
        return Stream.of(
            self.seed,
            self.sequences,
            groups,
            self.positions,
            store.length - self.positions,
            self.q.device,
        )

    @property
    def draws(self) -> int:
        """R S, all draws of a row."""
        return self.rule.num_samples * self.rule.replicates


def attend(store: TokenStore, sketch: ComponentSketch | None, call: Call) -> AttentionEstimate:
    """The estimate of attention over all tokens of the store.

    Raises
    ------
    ArgumentError
        If q, or a score, is not finite.
    """
    if triton_considered(call.q):
        reason = _not_for_triton(sketch, call)
        if reason is None:
            choice = choose((call.rows, store.keys(), store.values()))
            if choice.path == "triton":
                check_finite("q", call.q)
                assert sketch is not None
                return _attend_by_triton(
                    store,
                    sketch,
                    call,
                    KernelUse(
                        "triton",
                        choice.reason,
                        "sketch_decode",
                        slower_decode("triton", store.keys().nbytes + store.values().nbytes),
                    ),
                )
            reason, fallbacks = choice.reason, choice.fallbacks
        else:
            fallbacks = ()
        kernel = KernelUse("torch", reason)
    else:
        choice = choose_cpu((call.rows, store.table))
        fallbacks = choice.fallbacks
        if choice.path == "cpu":
            return _attend_compiled(store, sketch, call, KernelUse("cpu", choice.reason, "cpu_decode"))
        kernel = KernelUse("torch", choice.reason)
    check_finite("q", call.q)
    drawn = _draw_by_torch(store, sketch, call)
    return _estimate(store, call, drawn, _info(store, sketch, call, kernel, fallbacks))


# --- The compiled pass and plain torch ----------------------------------------------------------


@functools.cache
def _compiled_pass() -> ModuleType:
    """What calls the compiled pass: numba takes a second to import."""
    from ..kernels.cpu_decode import launch

    return launch


def _attend_compiled(
    store: TokenStore, sketch: ComponentSketch | None, call: Call, kernel: KernelUse
) -> AttentionEstimate:
    launch = _compiled_pass()
    names = launch.RowNames(int(call.seed), call.sequences, call.positions, store.length - call.positions)
    table = (store.length, store.table, store.order)
    if sketch is None:
        scanned = launch.Scanned(*table)
    else:
        scanned = launch.Scanned(*table, sketch.storage, sketch.weight, sketch.exact_keys, sketch.mixed)
    drawn = launch.draw_rows(call.rows, call.scale, scanned, names, call.rule)
    if drawn is None:
        check_finite("q", call.q)
        raise ArgumentError("logits holds NaN or +inf; only finite numbers and -inf are allowed.")
    return _estimate(store, call, drawn, _info(store, sketch, call, kernel))


def scores_by_place(
    store: TokenStore, sketch: ComponentSketch | None, x: Tensor, heads: slice = slice(None)
) -> Tensor:
    """The logits by which keys are proposed to scaled queries (heads, M, E): (heads, M, n).

    They are up to a shift of each row, and in the order of the places.
    """
    if sketch is not None:
        return sketch.score(x, heads)
    logits = torch.bmm(x, store.keys(heads).to(x.dtype).mT)
    return logits.gather(-1, store.places(heads)[:, None].expand_as(logits))


def _draw_by_torch(store: TokenStore, sketch: ComponentSketch | None, call: Call) -> DrawnRows:
    (n, m), x = call.rows.shape[:2], call.rows * call.scale
    offset = call.stream(store).uniform(call.rule.replicates, 1)  # [N, L, R, 1]
    comb = torch.arange(call.rule.num_samples, device=x.device, dtype=torch.float64)
    points = ((comb + offset) / call.rule.num_samples).clamp_max(ABOVE_ONE).flatten(-2)
    points = points.repeat(1, call.group, 1)  # [N, M, R S]
    step = BLOCK_ELEMENTS // max(store.length, call.draws * store.table.shape[-1])
    if call.rule.grouped and m:  # the rows of a position at a time
        heads_at_once = max(1, step // call.group)
        parts = [
            (slice(head, head + heads_at_once), slice(position, None, call.positions))
            for position in range(call.positions)
            for head in range(0, n, heads_at_once)
        ]
    else:
        parts = list(blocks((n, m), step))
    columns: dict[str, Tensor] = {}
    for heads, part in parts:
        drawn = draw_rows(
            x[heads, part],
            scores_by_place(store, sketch, x[heads, part], heads),
            points[heads, part],
            store.table[heads],
            store.order[heads],
            call.rule,
        )
        if len(parts) == 1:
            return drawn
        for name, column in vars(drawn).items():
            if name not in columns:
                columns[name] = column.new_empty(n, m, *column.shape[2:])
            columns[name][heads, part] = column
    return DrawnRows(**columns)


def _estimate(store: TokenStore, call: Call, drawn: DrawnRows, info: EstimateInfo) -> AttentionEstimate:
    """The estimate of draws; `info` says all of them but how many each row's weights are worth."""
    row_shape = call.q.shape[:-1]
    if call.sinks is not None or call.softcap is not None:
        drawn = _weighed_again(store, call, drawn)
    draws = Draws(drawn.indices, drawn.weights, None, call.rule.replicates)
    later = _computed_later(store, call, drawn)
    return AttentionEstimate(
        output=drawn.output.view(*row_shape, store.width).to(store.table.dtype),
        num_keys=store.length,
        degrees_of_freedom=math.inf,
        make_draws=lambda: draws.view(row_shape),
        make_std_error=later.std_error,
        make_reliability=later.reliability,
        group=call.group,
        info=replace(info, effective_sample_size=drawn.effective_sample_size.view(row_shape)),
        make_log_sum_exp=later.log_sum_exp,
    )


class ComputedLater(NamedTuple):
    """What an estimate computes when it is first read, of the tokens that there were at the call."""

    std_error: Callable[[], Tensor]
    reliability: Callable[[], Tensor]
    log_sum_exp: Callable[[], Tensor]


def _computed_later(store: TokenStore, call: Call, drawn: DrawnRows) -> ComputedLater:
    row_shape, device = call.q.shape[:-1], call.q.device
    length, sums, table = store.length, store.value_sums, store.table  # tokens may come later
    refuse_cropped = refuse_after_crop(store)

    def errors(with_hidden: bool) -> RowErrors:
        refuse_cropped("std_error")
        moments = _value_moments(store, length, sums, with_radius=with_hidden)
        return row_errors(table, store.features, drawn, moments, call.rule.replicates)

    def std_error() -> Tensor:
        with plain_mode(device):
            # Squares of large values are numbers in float64 only.
            size, output, computed = (sums[1] / length).sqrt(), drawn.output.double(), drawn.output.dtype
            rounding = rounding_variance(output, size, call.draws, table.dtype, computed)
            error = (errors(False).variance + rounding).sqrt().to(store.dtype)
            return error.view(*row_shape, store.width)

    def reliability() -> Tensor:
        with plain_mode(device):
            return errors(True).reliability().to(store.dtype).view(row_shape)

    def log_sum_exp() -> Tensor:
        refuse_cropped("log_sum_exp")
        with plain_mode(device):
            return _log_sum_exp(store, call, drawn).view(row_shape)

    return ComputedLater(std_error, reliability, log_sum_exp)


def refuse_after_crop(store: TokenStore) -> Callable[[str], None]:
    """Gives what raises ArgumentError for a name once tokens were forgotten since this call."""
    crops = store.crops

    def check(name: str) -> None:
        if store.crops != crops:
            raise ArgumentError(
                f"{name} is not known any more, as tokens may be gone: ask for it before a crop of the cache."
            )

    return check


def _logits(call: Call, x: Tensor, keys: Tensor) -> Tensor:
    """The logits of rows x (h, r, E) at keys (h, r, T, E): (h, r, T)."""
    products = torch.einsum("hre,hrte->hrt", x * call.scale, keys)
    return products if call.softcap is None else call.softcap * torch.tanh(products / call.softcap)


def _weighed_again(store: TokenStore, call: Call, drawn: DrawnRows) -> DrawnRows:
    """The same keys, weighed by capped logits, beside a sink in the sum that the weights are divided by.

    They were proposed by what their logits are without a cap.
    """
    weights, output = torch.empty_like(drawn.weights), torch.empty_like(drawn.output)
    step = BLOCK_ELEMENTS // max(1, call.draws * store.table.shape[-1])
    for block in blocks((call.rows.shape[0], call.rows.shape[1]), step):
        rows = rows_at(store.table[block[0]], drawn.indices[block]).to(store.dtype)  # [h, r, T, E + Ev]
        keys, values = rows[..., : store.features], rows[..., store.features :]
        logits = _logits(call, call.rows[block], keys)
        logits = logits.masked_fill(drawn.weights[block] == 0, -torch.inf)
        # Without the largest logit, next to which the logarithms of pi and of sums are lost to rounding.
        largest = logits.amax(-1, keepdim=True)
        log_w = (logits - largest - drawn.inclusion[block].log()).unflatten(-1, (call.rule.replicates, -1))
        total = log_w.logsumexp(-1, keepdim=True)  # [h, r, R, 1]
        if call.sinks is not None:
            total = torch.logaddexp(total, (call.sinks[block][..., None] - largest)[..., None])
        w = ((log_w - total).exp() / call.rule.replicates).flatten(-2)
        weights[block], output[block] = w, torch.einsum("hrt,hrtd->hrd", w, values)
    square = weights.square().sum(-1).clamp_min(torch.finfo(weights.dtype).tiny)
    effective = weights.sum(-1).square() / square
    return replace(drawn, weights=weights, output=output, effective_sample_size=effective)


def _log_sum_exp(store: TokenStore, call: Call, drawn: DrawnRows) -> Tensor:
    """The estimated log-sum-exp of rows, (N, M): of the mean over replicates.

    In a replicate it is l_j - log(pi_j w_j) of any key drawn, w_j its weight: here of the heaviest.
    """
    by_replicate = drawn.weights.unflatten(-1, (call.rule.replicates, -1))
    w, place = by_replicate.max(-1)  # [N, M, R]
    place = place + torch.arange(call.rule.replicates, device=place.device) * by_replicate.shape[-1]
    keys = rows_at(store.table, drawn.indices.gather(-1, place)).to(store.dtype)[..., : store.features]
    log_w = _logits(call, call.rows, keys) - drawn.inclusion.gather(-1, place).log()
    return (log_w - (w * call.rule.replicates).log()).logsumexp(-1) - math.log(call.rule.replicates)


def _info(
    store: TokenStore,
    sketch: ComponentSketch | None,
    call: Call,
    kernel: KernelUse,
    fallbacks: tuple[str, ...] = (),
) -> EstimateInfo:
    proposal = "exact" if sketch is None else sketch.proposal
    about: dict[str, Any] = {"proposal": proposal, "tokens": store.length}
    if sketch is not None:
        about |= {
            "components": sketch.rank,
            "levels": sketch.levels,
            "exact_keys": sketch.exact_keys.shape[1],
        }
    about |= {"adaptive": call.rule.adaptive, "share_keys": call.rule.grouped}
    return EstimateInfo(
        sampler=f"cache, {proposal}",
        unbiased=False,
        num_samples=call.rule.num_samples,
        replicates=call.rule.replicates,
        draws_per_row=call.draws,
        fallbacks=fallbacks,
        kernel=kernel,
        cache=about,
        log_sum_exp="estimated",
    )


def _value_moments(store: TokenStore, length: int, sums: Tensor, *, with_radius: bool) -> ValueMoments:
    """The moments of the first `length` tokens, from these sums; only the radius needs all values."""
    mean, square = sums / length  # [N, 1, d]
    if not with_radius:
        return ValueMoments(mean, square)
    values = store.table[:, :length, store.features :]
    distance = torch.stack(
        [(v.double() - m).norm(dim=-1).amax(-1) for v, m in zip(values, mean, strict=True)]
    )
    return ValueMoments(mean, square, distance[:, None])


# --- The Triton kernel --------------------------------------------------------------------------


def _not_for_triton(sketch: ComponentSketch | None, call: Call) -> str | None:
    """Why the kernel does not take this call, on whatever machine; None where it does."""
    heads, rows, _ = call.rows.shape
    if call.rule.adaptive:
        return "adaptive draws are not in the kernel"
    if sketch is None:
        return "it takes sketches; sampled_attention has one for exact keys"
    if sketch.mixed:
        return "sketches of components of 4 and 2 bits are not in the kernel"
    if call.rule.num_samples < FEWEST_DRAWS_FOR_TRITON:
        return f"it takes {FEWEST_DRAWS_FOR_TRITON} draws or more"
    if rows > MAX_DECODE_ROWS:
        return f"the kernel takes up to {MAX_DECODE_ROWS} rows a key head, not {rows}"
    return "there is nothing to do" if 0 in (heads, rows) else None


def _attend_by_triton(
    store: TokenStore, sketch: ComponentSketch, call: Call, kernel: KernelUse
) -> AttentionEstimate:
    from ..kernels.sketch_decode.launch import sketch_decode

    row_shape, device, dtype = call.q.shape[:-1], call.q.device, store.table.dtype
    with out_of_memory_explained():
        x = Inputs(
            call.rows.contiguous(),
            store.keys()[None],
            store.values()[None],
            None,
            call.positions,
            call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        result = sketch_decode(
            x,
            sketch.scanned(store.places()),
            # The query heads of a key head share the keys of all of their draws.
            call.rule.num_samples * (1 if call.rule.grouped else call.group),
            call.rule.replicates,
            call.stream(store),
            defensive=call.rule.defensive,
        )
    draws = Draws(result.indices, result.weights(), None, call.rule.replicates).view(row_shape)
    draws_per_row = result.indices.shape[-1]
    length, sums = store.length, store.value_sums  # tokens may come later
    refuse_cropped = refuse_after_crop(store)

    def make_std_error() -> Tensor:
        refuse_cropped("std_error")
        with plain_mode(device):  # the kernel's errors are those of draws; rounding comes on top
            size, output = (sums[1] / length).sqrt(), result.output.double()  # [N, 1, Ev], [N, M, Ev]
            rounding = rounding_variance(output, size, draws_per_row, dtype, torch.float32)
            error = (result.std_error(x).double().square() + rounding).sqrt()
            return error.to(torch.float32).view(*row_shape, store.width)

    def make_log_sum_exp() -> Tensor:
        with plain_mode(device):
            return result.log_sum_exp.view(row_shape)

    return AttentionEstimate(
        output=result.output.view(*row_shape, store.width),
        num_keys=store.length,
        degrees_of_freedom=math.inf,
        make_draws=lambda: draws,
        make_std_error=make_std_error,
        group=call.group,
        info=replace(
            _info(store, sketch, call, kernel),
            effective_sample_size=draws.effective_sample_size(),
            draws_per_row=draws_per_row,
        ),
        make_log_sum_exp=make_log_sum_exp,
    )


def plain_mode(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Leave autocast, gradients and inference mode, whichever of them the caller is in.

    Tensors that are made in inference mode could not be changed outside it.
    """
    if not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(device.type):
        return torch.no_grad()  # a tenth of the time of all three
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    return stack
