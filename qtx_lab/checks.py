"""Checks of arguments that every room shares: each refuses with one sentence that names the argument."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .errors import ArgumentError, DtypeError, ShapeError, TransformError

MAX_COUNT = 1 << 31
"""No count of draws, replicates, keys or steps may be larger."""


def check_count(argument: str, given: Any) -> None:
    """Refuse a count that is not a whole number from 1 to `MAX_COUNT`; NumPy's whole numbers will do."""
    whole = hasattr(given, "__index__") and not isinstance(
        given, bool | type
    )  # SupportsIndex takes 10 µs to ask
    count = operator.index(given) if whole else 0
    if not 1 <= count <= MAX_COUNT or isinstance(given, Tensor):
        raise ArgumentError(
            f"{argument}={given!r} is not allowed: it must be a whole number from 1 to {MAX_COUNT}."
        )


def check_generator(generator: object) -> None:
    """Refuse what is neither a generator nor None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise DtypeError(f"generator is a {type(generator).__name__}; it must be a torch.Generator.")


def check_scale(scale: Any, argument: str = "scale") -> None:
    """Refuse what is not one finite number, such as a factor of the logits."""
    if scale is None:
        return
    if isinstance(scale, bool | str) or not hasattr(scale, "__float__"):
        raise DtypeError(f"{argument}={scale!r} is not allowed: it must be a number.")
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise ArgumentError(f"{argument} requires a gradient, which is not given: give its value (float).")
    try:
        finite = math.isfinite(scale)
    except OverflowError:
        finite = False
    except (TypeError, ValueError):
        raise DtypeError(f"{argument}={scale!r} is not allowed: it must be a single number.") from None
    if not finite:
        raise ArgumentError(f"{argument}={scale} is not allowed: it must be a finite number.")


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
    """Refuse what is no dense tensor (..., length, features) of a dtype that is attended to, or unlike the
    first.
    """
    check_transforms()
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; it must be a torch.Tensor.")
        if x.layout != torch.strided or x.is_meta or x.is_nested:
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


def check_softcap(softcap: float) -> None:
    """Refuse what logits cannot be capped at."""
    check_scale(softcap, "softcap")
    if not softcap > 0:
        raise ArgumentError(f"softcap={softcap} is not allowed: it must be above 0, or None for no capping.")
    if not 1e-30 <= softcap <= 1e30:  # the quotient of a logit and the cap is a float32
        raise ArgumentError(f"softcap={softcap} is not allowed: it must be from 1e-30 to 1e30, or None.")
