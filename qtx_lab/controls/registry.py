"""Every control by name."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DtypeError, unknown_name
from .base import Control
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


def make_control(control: str | Control) -> Control:
    """The control of that name, or the control itself.

    Raises
    ------
    ArgumentError, DtypeError
        If no control has that name; if the object cannot be prepared.

    Examples
    --------
    >>> make_control("performer").features
    128
    """
    if not isinstance(control, str):
        if not callable(getattr(control, "prepare", None)):
            raise DtypeError(
                f"control={control!r} is neither a control's name nor an object with a prepare method."
            )
        return control
    if control not in CONTROLS:
        raise unknown_name("control", control, CONTROLS)
    return CONTROLS[control]()
