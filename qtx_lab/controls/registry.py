"""Every control by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, quoted, unknown_name
from .base import Control, Prepared
from .exact import ExactControl
from .linformer import LinformerControl
from .performer import PerformerControl
from .topk import TopKControl

CONTROLS: dict[str, Callable[[], Control]] = {
    "exact": ExactControl,
    "linformer": LinformerControl,
    "performer": PerformerControl,
    "topk": TopKControl,
}
"""Every control that a name alone can make."""


def make_control(control: object) -> Control:
    """The control of that name, or the control itself; other objects that can prepare are wrapped as one.

    Raises
    ------
    ArgumentError, DtypeError
        If no control has that name; if the object cannot be prepared.

    Examples
    --------
    >>> make_control("performer").features
    128
    """
    if isinstance(control, Control):
        return control
    if not isinstance(control, str):
        return ForeignControl(control)
    if control not in CONTROLS:
        raise unknown_name("control", control, CONTROLS)
    return CONTROLS[control]()


class ForeignControl(Control):
    """An object with `name` and `prepare` as a `Control`; with `oracle` too, where it has one.

    Raises
    ------
    DtypeError
        If it has no name or no prepare method.
    """

    def __init__(self, wrapped: Any):
        missing = [name for name in ("name", "prepare") if not hasattr(wrapped, name)]
        if missing or isinstance(wrapped, type):
            what = "a class, not an object" if isinstance(wrapped, type) else f"without {', '.join(missing)}"
            raise DtypeError(
                f"control={quoted(wrapped)} is {what}: it must be a control's name or an object with a name "
                "and a prepare method."
            )
        self.wrapped, self.name = wrapped, wrapped.name
        self.oracle = bool(getattr(wrapped, "oracle", False))

    def prepare(
        self,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: bool,
        q: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Prepared:
        """Prepare the object: see `Control.prepare`."""
        return self.wrapped.prepare(k, v, scale=scale, causal=causal, q=q, generator=generator)
