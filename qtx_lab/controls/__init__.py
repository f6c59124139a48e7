"""Control variates correct an estimate by something whose mean is known: one file per control."""

from __future__ import annotations

from .base import Control, Prepared, control_noise
from .exact import ExactControl
from .linformer import LinformerControl
from .multilevel import LevelDraws, MultilevelControlVariate
from .performer import PerformerControl
from .registry import CONTROLS, make_control
from .regression import Folds, Regression, regress
from .topk import TopKControl

__all__ = [
    "CONTROLS",
    "Control",
    "ExactControl",
    "Folds",
    "LevelDraws",
    "LinformerControl",
    "MultilevelControlVariate",
    "PerformerControl",
    "Prepared",
    "Regression",
    "TopKControl",
    "control_noise",
    "make_control",
    "regress",
]
