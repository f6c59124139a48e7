"""qtx_lab: a research workbench for sampled attention.

Every public name is importable from here and loaded when first used, so that `import qtx_lab` costs
nothing and a notebook that draws no circuit never loads qiskit.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "attention": [
        "QuantumMultiheadAttention",
        "SampledKVCache",
        "replace_attention",
        "same_draws",
        "sampled_attention",
    ],
    "backends.jobs": ["find_jobs"],
    "backends": [
        "CircuitSampler",
        "HybridPolicy",
        "ParametricNoise",
        "QiskitQuantumBackend",
        "RowCounts",
        "fake_devices",
    ],
    "circuits": ["DynamicLoader", "Loader", "MpsLoader", "TreeLoader", "UnaryLoader", "make_loader"],
    "controls": ["MultilevelControlVariate"],
    "errors": [
        "ArgumentError",
        "BackendUnavailable",
        "DtypeError",
        "FallbackWarning",
        "JobTimeout",
        "QtxError",
        "RunFailed",
        "ShapeError",
        "SpecError",
        "StorageError",
        "TextError",
    ],
    "estimates": ["AttentionEstimate", "Draws"],
    "experiments.notebooks": ["run_notebook"],
    "experiments.report": ["write_report"],
    "experiments.runs": ["Run", "runs"],
    "experiments.spec": [
        "CircuitSpec",
        "ClusterSpec",
        "ControlSpec",
        "ExperimentSpec",
        "MitigationSpec",
        "SamplerSpec",
        "TrainSpec",
    ],
    "experiments.sweeps": ["sweep"],
    "kernels": ["gpu_quantum_attention"],
    "mitigation": [
        "CircuitMitigation",
        "MitigationPlanner",
        "ProbabilisticErrorCancellation",
        "SharedDecay",
        "TwoCopyLoader",
        "ZeroNoiseExtrapolation",
        "fold",
        "project_to_simplex",
    ],
    "samplers": [
        "ExactSampler",
        "HeadTailSampler",
        "LearnedImportanceSampler",
        "MonteCarloSampler",
        "QuasiMonteCarloSampler",
        "Sampler",
        "StratifiedSampler",
        "SystematicSampler",
        "make_sampler",
    ],
    "training": ["Cluster", "QuantumTrainer", "TrainingResult", "open_cluster"],
    "training.reference": [
        "bits_per_byte",
        "encode",
        "load_reference_model",
        "read_text",
        "reference_text",
    ],
    "widgets.circuit_view": ["CircuitView"],
    "widgets.forms": ["SpecForm"],
    "widgets.job_table": ["JobTable"],
    "widgets.lens": ["AttentionLens"],
    "widgets.stream": ["MetricStream"],
    "widgets.workbench": ["Workbench"],
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'qtx_lab' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
