"""From noisy counts to better estimates: scaling of noise, inference of the zero, readout, the planner."""

from __future__ import annotations

from .boundary import HelpBoundary, rows_boundary, shots_that_extrapolation_needs, zne_boundary
from .calls import MitigatedCall
from .circuit import CircuitMitigation
from .decay import SharedDecay
from .distillation import TwoCopyLoader
from .execution import execute_with_zne
from .flips import RandomFlips
from .inference import ZeroNoiseEstimate, ZeroNoiseInference
from .pec import ProbabilisticErrorCancellation
from .planner import MitigationPlanner, Plan
from .projection import project_to_simplex
from .readout import readout_errors, undo_readout
from .recorded import find_mitigated_calls
from .scaling import FOLDINGS, SCALINGS, fold, scale_noise
from .zne import METHODS, ZeroNoiseExtrapolation

__all__ = [
    "FOLDINGS",
    "METHODS",
    "SCALINGS",
    "CircuitMitigation",
    "HelpBoundary",
    "MitigatedCall",
    "MitigationPlanner",
    "Plan",
    "ProbabilisticErrorCancellation",
    "RandomFlips",
    "SharedDecay",
    "TwoCopyLoader",
    "ZeroNoiseEstimate",
    "ZeroNoiseExtrapolation",
    "ZeroNoiseInference",
    "execute_with_zne",
    "find_mitigated_calls",
    "fold",
    "project_to_simplex",
    "readout_errors",
    "rows_boundary",
    "scale_noise",
    "shots_that_extrapolation_needs",
    "undo_readout",
    "zne_boundary",
]
