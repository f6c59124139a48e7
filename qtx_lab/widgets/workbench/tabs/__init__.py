"""The seven tabs of the workbench, a file each, in the order of the work."""

from __future__ import annotations

from .circuit import CircuitTab
from .hardware import HardwareTab
from .mitigate import MitigateTab
from .runs import RunsTab
from .sample import SampleTab, SourceSpec
from .sweep import SweepTab
from .train import TrainTab

__all__ = [
    "CircuitTab",
    "HardwareTab",
    "MitigateTab",
    "RunsTab",
    "SampleTab",
    "SourceSpec",
    "SweepTab",
    "TrainTab",
]
