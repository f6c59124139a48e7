"""The tasks of the workbench's workers, which take plain parameters and return arrays and values.

A worker imports this module at its start, and all that its tasks need with it.
"""

from __future__ import annotations

from .calibration import calibrate
from .circuits import measure, mitigate, submit
from .inputs import load_inputs
from .outputs import estimate
from .runs import list_runs, sweep
from .sampling import sample
from .training import train

__all__ = [
    "calibrate",
    "estimate",
    "list_runs",
    "load_inputs",
    "measure",
    "mitigate",
    "sample",
    "submit",
    "sweep",
    "train",
]
