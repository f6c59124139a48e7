"""Specs say what the rooms below are to do; they travel as YAML, notebook parameters, forms and flags."""

from .base import Spec
from .circuit import CircuitSpec
from .cluster import ClusterSpec
from .control import ControlSpec
from .experiment import ExperimentSpec
from .fields import MAX_SEED, ControlName, Count, DrawingName, Real, SamplerName, Switch, Whole, field
from .heads import DrawnHeads, heads_text, places_of, read_heads
from .mitigation import MitigationSpec
from .notebook import NotebookSpec
from .problems import nearest
from .sampler import SamplerSpec
from .sweep import SearchSpec, SweepSpec
from .training import TrainSpec
from .words import (
    Word,
    fitted,
    listed_word,
    read_words,
    read_yaml,
    split_words,
    value_of,
    word_of,
    write_yaml,
)

SPECS: dict[str, type[Spec]] = {
    "experiment": ExperimentSpec,
    "sampler": SamplerSpec,
    "control": ControlSpec,
    "circuit": CircuitSpec,
    "mitigation": MitigationSpec,
    "train": TrainSpec,
    "cluster": ClusterSpec,
    "notebook": NotebookSpec,
    "sweep": SweepSpec,
    "search": SearchSpec,
}
"""Every kind of spec by its name, as `qtx-lab spec NAME` and a notebook's metadata use it."""

__all__ = [
    "MAX_SEED",
    "SPECS",
    "CircuitSpec",
    "ClusterSpec",
    "ControlName",
    "ControlSpec",
    "Count",
    "DrawingName",
    "DrawnHeads",
    "ExperimentSpec",
    "MitigationSpec",
    "NotebookSpec",
    "Real",
    "SamplerName",
    "SamplerSpec",
    "SearchSpec",
    "Spec",
    "SweepSpec",
    "Switch",
    "TrainSpec",
    "Whole",
    "Word",
    "field",
    "fitted",
    "heads_text",
    "listed_word",
    "nearest",
    "places_of",
    "read_heads",
    "read_words",
    "read_yaml",
    "split_words",
    "value_of",
    "word_of",
    "write_yaml",
]
