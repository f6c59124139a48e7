"""The reference language model, and training that scales from one process to a cluster."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster as Cluster
    from .cluster import open_cluster as open_cluster
    from .trainer import QuantumTrainer as QuantumTrainer
    from .trainer import TrainingResult as TrainingResult

# Loaded when first used: the reference model needs neither Dask nor torch.distributed.
_HOME = {
    "Cluster": "cluster",
    "QuantumTrainer": "trainer",
    "TrainingResult": "trainer",
    "open_cluster": "cluster",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qtx_lab.training' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
