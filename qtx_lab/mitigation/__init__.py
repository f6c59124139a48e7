"""From noisy results to better estimates: what scales noise, what infers its absence, and what to do with a budget of shots."""

from __future__ import annotations

from .circuit import CircuitMitigation
from .decay import SharedDecay
from .distillation import TwoCopyLoader
from .pec import ProbabilisticErrorCancellation
from .planner import MitigationPlanner, Plan
from .readout import readout_errors, undo_readout
from .scaling import FOLDINGS, fold, scale_noise
from .symmetry import project_to_simplex
from .zne import METHODS, ZeroNoiseEstimate, ZeroNoiseExtrapolation

__all__ = [
    "FOLDINGS",
    "METHODS",
    "CircuitMitigation",
    "MitigationPlanner",
    "Plan",
    "ProbabilisticErrorCancellation",
    "SharedDecay",
    "TwoCopyLoader",
    "ZeroNoiseEstimate",
    "ZeroNoiseExtrapolation",
    "fold",
    "project_to_simplex",
    "readout_errors",
    "scale_noise",
    "undo_readout",
]
