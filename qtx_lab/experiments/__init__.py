"""Specs say what to do, runs keep what was done, and reports show it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .notebooks import notebook_path as notebook_path
    from .notebooks import notebooks_folder as notebooks_folder
    from .notebooks import run_notebook as run_notebook
    from .report import write_report as write_report
    from .runs import Run as Run
    from .runs import find_run as find_run
    from .spec import CircuitSpec as CircuitSpec
    from .spec import ClusterSpec as ClusterSpec
    from .spec import ControlSpec as ControlSpec
    from .spec import ExperimentSpec as ExperimentSpec
    from .spec import MitigationSpec as MitigationSpec
    from .spec import NotebookSpec as NotebookSpec
    from .spec import SamplerSpec as SamplerSpec
    from .spec import Spec as Spec
    from .spec import SweepSpec as SweepSpec
    from .spec import TrainSpec as TrainSpec
    from .sweeps import sweep as sweep

# Loaded when first used: a listing of runs (`runs.runs`) needs neither torch nor papermill.
_ROOMS = {
    "notebooks": ("notebook_path", "notebooks_folder", "run_notebook"),
    "report": ("write_report",),
    "runs": ("Run", "find_run"),
    "spec": (
        "CircuitSpec",
        "ClusterSpec",
        "ControlSpec",
        "ExperimentSpec",
        "MitigationSpec",
        "NotebookSpec",
        "SamplerSpec",
        "Spec",
        "SweepSpec",
        "TrainSpec",
    ),
    "sweeps": ("sweep",),
}
_HOME = {name: module for module, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
