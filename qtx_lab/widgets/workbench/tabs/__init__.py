"""The eight tabs of the workbench, a file each, in the order of the work."""

from __future__ import annotations

from .calibrate import CalibrateTab
from .circuit import CircuitTab, spread_rows
from .hardware import HardwareTab
from .mitigate import MitigateTab
from .runs import RunsTab
from .sample import SampleTab, SourceSpec
from .sweep import SweepTab
from .train import TrainTab

__all__ = [
    "CalibrateTab",
    "CircuitTab",
    "HardwareTab",
    "MitigateTab",
    "RunsTab",
    "SampleTab",
    "SourceSpec",
    "SweepTab",
    "TrainTab",
    "spread_rows",
]
