"""Checks of arguments that every room shares: each refuses with one sentence that names the argument."""

from __future__ import annotations

import math
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .errors import ArgumentError, DtypeError, NumberError, ShapeError, TransformError, quoted

MAX_COUNT = 1 << 31
"""No count of draws, replicates, keys or steps may be larger."""

MAX_SEED = (1 << 63) - 1
"""The largest seed that every generator of random numbers takes."""


def check_count(argument: str, given: Any, least: int = 1, most: float = MAX_COUNT) -> int:
    """Return a count as Python's own whole number.

    Parameters
    ----------
    argument : str
        What error messages call it.
    given : int
        Of Python or NumPy, or a torch tensor of a whole number, without dimensions.
    least, most : int
        Bounds, which are allowed themselves; infinity as the upper one is no bound.

    Raises
    ------
    NumberError
        If it is no whole number: True and 3.0 are none.
    ArgumentError
        If it is out of its bounds.

    Examples
    --------
    >>> check_count("shots", torch.tensor(100))
    100
    """
    count = given if type(given) is int else python_number(given)
    if isinstance(count, int) and least <= count <= most:
        return count
    kind = ArgumentError if isinstance(count, int) else NumberError
    raise kind(
        f"{argument}={quoted(given)} is not allowed: it must be a whole number from {least} to {most}."
    )


def check_number(
    argument: str,
    given: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a finite number as Python's own float.

    Parameters
    ----------
    argument : str
        What error messages call it.
    given : float
        Of Python or NumPy, or a torch tensor of a number, without dimensions.
    least, most : float
        Bounds, which are allowed themselves.
    above, below : float
        Bounds, which are not allowed themselves.

    Raises
    ------
    NumberError
        If it is no number: True and "3" are none.
    ArgumentError
        If it is NaN, infinite or out of its bounds, or if it requires a gradient.

    Examples
    --------
    >>> check_number("defensive", torch.tensor(0.5), above=0, below=1)
    0.5
    >>> check_number("defensive", 1, above=0, below=1)
    Traceback (most recent call last):
    qtx_lab.errors.ArgumentError: defensive=1 is not allowed: it must be a number between 0 and 1.
    """
    number = given if type(given) is float else python_number(given)
    try:
        value = math.nan if number is None else float(number)
    except OverflowError:  # a whole number of more than 308 digits
        value = math.inf
    if not (math.isfinite(value) and least <= value <= most and above < value < below):
        single = not isinstance(given, np.ndarray | Tensor) or given.ndim == 0
        noun = "a finite number" if number is not None and not math.isfinite(value) else "a number"
        noun = noun if single else "a single number"
        kind = NumberError if number is None else ArgumentError
        bounds = _bounds_in_words(least, most, above, below)
        raise kind(f"{argument}={quoted(given)} is not allowed: it must be {noun}{bounds}.")
    if isinstance(given, Tensor) and (given.requires_grad or has_tangent(given)):
        raise ArgumentError(f"{argument} requires a gradient, which is not given: give its value (float).")
    return value


def python_number(given: Any) -> int | float | None:
    """A number of NumPy or torch as Python's own; None for what is no single real number, as True."""
    if isinstance(given, Tensor):
        if given.ndim or given.dtype is torch.bool or given.is_complex() or given.is_meta:
            return None
        return given.item()
    if isinstance(given, np.ndarray | np.generic):
        if given.ndim or given.dtype.kind not in "iuf":
            return None
        return float(given) if given.dtype.kind == "f" else int(given)
    if isinstance(given, bool):
        return None
    if isinstance(given, int | torch.SymInt):
        return int(given)
    return float(given) if isinstance(given, Real | Decimal | torch.SymFloat) else None


def _bounds_in_words(least: float, most: float, above: float, below: float) -> str:
    """What follows "a number" in an error message."""
    if above > -math.inf and below < math.inf:
        return f" between {above:g} and {below:g}"
    if least > -math.inf and most < math.inf:
        return f" from {least:g} to {most:g}"
    low = f" above {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
    high = f" below {below:g}" if below < math.inf else f" <= {most:g}" if most < math.inf else ""
    return low + (" and" if low and high else "") + high


def check_flags(**flags: object) -> None:
    """Refuse arguments that are neither True nor False: a text as "no" would count as True.

    Examples
    --------
    >>> check_flags(readout="no")
    Traceback (most recent call last):
    qtx_lab.errors.DtypeError: readout='no' is not allowed: it must be True or False.
    """
    for argument, given in flags.items():
        if not isinstance(given, bool):
            raise DtypeError(f"{argument}={quoted(given)} is not allowed: it must be True or False.")


def check_functions(**functions: object) -> None:
    """Refuse arguments that are neither None nor can be called.

    Examples
    --------
    >>> check_functions(stop=5)
    Traceback (most recent call last):
    qtx_lab.errors.DtypeError: stop=5 is not allowed: it must be a function, or None.
    """
    for argument, given in functions.items():
        if given is not None and not callable(given):
            raise DtypeError(f"{argument}={quoted(given)} is not allowed: it must be a function, or None.")


def check_progress(progress: object) -> None:
    """Refuse what neither says whether progress is shown, nor is a function that is told of it.

    Examples
    --------
    >>> check_progress("no")
    Traceback (most recent call last):
    qtx_lab.errors.DtypeError: progress='no' is not allowed: it must be True, False or a function.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise DtypeError(f"progress={quoted(progress)} is not allowed: it must be True, False or a function.")


def check_generator(generator: object) -> None:
    """Refuse what is neither a generator nor None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator.")


def check_scale(scale: Any, argument: str = "scale") -> float | None:
    """Return a factor of the logits, or None, which means the default; see `check_number`."""
    return None if scale is None else check_number(argument, scale)


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work. NumPy cannot read the tensors that it wraps."""
    return _functorch.maybe_current_level() is not None


def has_tangent(x: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    return forward_ad.unpack_dual(x).tangent is not None


def check_transforms() -> None:
    """Refuse `torch.func.vmap` and `torch.export`: their tensors hold no numbers to check or to draw by."""
    if transformed() and any(
        x.key() == _functorch.TransformType.Vmap for x in _functorch.get_interpreter_stack() or ()
    ):
        raise TransformError(
            "sampled attention cannot run under torch.func.vmap: it takes batches itself, so give q, k and v "
            "more leading dimensions."
        )
    if torch.compiler.is_exporting():
        raise TransformError(
            "sampled attention draws keys, which torch.export cannot trace: export the model with "
            "torch's attention in its place (undo of replace_attention), or use torch.compile."
        )


def check_tensors(**tensors: Tensor) -> None:
    """Refuse tensors that attention is not computed from, or that are unlike the first one.

    They must be dense, of the shape (..., length, features), and of a dtype that is attended to.
    """
    check_transforms()
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
        if x.is_nested:
            raise DtypeError(f"{name} is a nested tensor; it must be dense: pad it, and hide what was added.")
        if x.layout != torch.strided or x.is_meta:
            raise DtypeError(
                f"{name} is a {x.layout} tensor on {x.device}; it must be dense and hold numbers."
            )
        if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise DtypeError(f"{name} is {x.dtype}; it must be float32, float64, float16 or bfloat16.")
        if x.dtype != like.dtype or x.device != like.device:
            raise DtypeError(
                f"{name} is {x.dtype} on {x.device}, {first} is {like.dtype} on {like.device}; they must "
                "agree."
            )
        if x.ndim < 2:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; it must be (..., length, features).")


def check_finite(name: str, x: Tensor) -> float:
    """Refuse NaN and infinities; the largest size of a number in x."""
    ends = [float(end) for end in x.detach().aminmax()] if x.numel() else [0.0]
    if not all(math.isfinite(end) for end in ends):
        raise ArgumentError(f"{name} holds NaN or infinity; only finite numbers are allowed.")
    return max(abs(end) for end in ends)


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Refuse what is not a finite logit, or -inf, for each query head of q (..., H, L, E)."""
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        given = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise DtypeError(f"sinks is {given}; it must be a floating-point tensor, a logit a query head.")
    if sinks.device != q.device:
        raise DtypeError(f"sinks is on {sinks.device}, q on {q.device}; they must agree.")
    shape = tuple(q.shape[:-2])
    try:
        sinks.expand(shape)
    except RuntimeError:
        raise ShapeError(
            f"sinks has shape {tuple(sinks.shape)}; it must broadcast to {shape}, q's leading dimensions, of "
            "which the last one counts the query heads."
        ) from None
    if not bool((sinks.abs() < 1e38).logical_or(sinks == -torch.inf).all()):
        raise ArgumentError(
            "sinks holds NaN, +inf or a number beyond 1e38; only smaller ones and -inf are allowed."
        )


def check_softcap(softcap: Any) -> float | None:
    """Return what logits are capped at, or None for no capping."""
    if softcap is None:
        return None
    cap = check_number("softcap", softcap)
    if not cap > 0:
        raise ArgumentError(f"softcap={softcap} is not allowed: it must be above 0, or None for no capping.")
    if not 1e-30 <= cap <= 1e30:  # the quotient of a logit and the cap is a float32
        raise ArgumentError(f"softcap={softcap} is not allowed: it must be from 1e-30 to 1e30, or None.")
    return cap


def check_groups(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> int:
    """Return how many query heads share a key head; refuse shapes of q, k and v that do not fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ShapeError(f"q and k must have the same number E >= 1 of features; given {shapes}.")
    if k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(f"k and v must agree in all but their last dimension; given {shapes}.")
    if k.shape[-2] == 0:
        raise ShapeError(f"there must be at least one key (n >= 1); given {shapes}.")
    if v.shape[-1] == 0:
        raise ShapeError(f"v must have at least one feature; given {shapes}.")
    if enable_gqa and min(q.ndim, k.ndim) < 3:
        raise ShapeError(f"enable_gqa=True needs a dimension of heads; given {shapes}.")
    group = 1
    if enable_gqa and k.shape[-3] and q.shape[-3] % k.shape[-3] == 0:
        group = q.shape[-3] // k.shape[-3]
    grouped = (*k.shape[:-3], k.shape[-3] * group) if group > 1 else k.shape[:-2]
    if q.shape[:-2] != torch.Size(grouped):
        hint = "q's heads a multiple of k's" if enable_gqa else "the same (or enable_gqa=True)"
        raise ShapeError(
            f"the leading dimensions of q and k do not fit, they must be {hint}; given {shapes}."
        )
    return group


def check_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor, is_causal: bool) -> None:
    """Refuse what is no mask of rows and keys (..., L, n) = `shape`, or stands beside causality."""
    if is_causal:
        raise ArgumentError(
            "attn_mask and is_causal=True exclude each other, as in SDPA: put both in attn_mask."
        )
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise DtypeError(f"attn_mask is {given}; it must be a boolean or floating-point tensor.")
    if mask.device != q.device:
        raise DtypeError(f"attn_mask is on {mask.device}, q on {q.device}; they must agree.")
    try:
        mask.expand(shape)
    except RuntimeError:
        raise ShapeError(f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to {shape}.") from None
    if mask.is_floating_point() and not bool((mask < 1e38).all()):
        raise ArgumentError(
            "attn_mask holds NaN, +inf or a number above 1e38; only smaller ones and -inf are allowed."
        )


def check_sequences(sequences: Tensor, q: Tensor) -> Tensor:
    """Return names of the sequences of q, on the CPU; refuse what are no whole numbers, one for each."""
    count = q.shape[:-3].numel() if q.ndim > 3 else 1
    if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64:
        given = sequences.dtype if isinstance(sequences, Tensor) else type(sequences).__name__
        raise DtypeError(f"sequences is {given}; it must be an int64 tensor of names, one for each sequence.")
    if sequences.shape != (count,):
        raise ShapeError(
            f"sequences has shape {tuple(sequences.shape)}; it must be ({count},), one name for each "
            "sequence."
        )
    return sequences.cpu()


def check_window(
    window: int | tuple[int | None, int | None] | None,
) -> tuple[int | None, int | None] | None:
    """Return (left, right) of a window, whose sides are whole numbers >= 0 or None; None hides nothing."""
    if window is None:
        return None
    sides = window if isinstance(window, tuple | list) else (window, window)
    try:
        # A position plus the largest distance must stay an int64.
        left, right = (
            None if x is None else min(check_count("window", x, 0, math.inf), 1 << 62) for x in sides
        )
    except ValueError:  # also where there are not two
        raise ArgumentError(
            f"window={quoted(window)} is not allowed: it must be a whole number >= 0, or (left, right) with "
            "two, where None is no limit."
        ) from None
    return None if left is None and right is None else (left, right)
