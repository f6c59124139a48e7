"""Control variates correct an estimate by something whose mean is known: one file per control."""

from __future__ import annotations

from .base import Control, Prepared
from .exact import ExactControl
from .linformer import LinformerControl
from .mixture import RowVariance, mix_controls, row_weights, value_spread
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
    "RowVariance",
    "TopKControl",
    "make_control",
    "mix_controls",
    "regress",
    "row_weights",
    "value_spread",
]
