"""Which public names are stable and which are experimental; the documentation says what that promises."""

from __future__ import annotations

_STABLE = """
__version__
sampled_attention gpu_quantum_attention QuantumMultiheadAttention replace_attention same_draws
AttentionEstimate Draws SampledKVCache
Sampler make_sampler register_sampler ExactSampler MonteCarloSampler StratifiedSampler SystematicSampler
QuasiMonteCarloSampler HeadTailSampler LearnedImportanceSampler CircuitSampler MultilevelControlVariate
QiskitQuantumBackend RowCounts ParametricNoise HybridPolicy device_errors fake_devices find_jobs
Loader make_loader DynamicLoader MpsLoader TreeLoader UnaryLoader
CircuitMitigation ZeroNoiseExtrapolation fold project_to_simplex
AttentionInputs attention_inputs bits_per_byte encode read_text reference_text generate huggingface
language_models load_language_model load_reference_model
SamplerSpec ControlSpec CircuitSpec MitigationSpec ClusterSpec TrainSpec ExperimentSpec
QuantumTrainer TrainingResult Cluster open_cluster
Run runs run_notebook sweep write_report
Workbench AttentionLens CircuitView MetricStream JobTable SpecForm
QtxError ArgumentError ShapeError DtypeError NumberError SpecError TransformError TextError StorageError
RunFailed MissingPackage BackendUnavailable ModelUnavailable CostError JobTimeout StoppedBySignal
FallbackWarning CalibrationWarning
"""

STABLE = frozenset(_STABLE.split())
"""Names that are kept, with their arguments and what they mean, and warn for a release before they change."""

_ESTIMATION = "Amplitude estimation is new here: what a plan and an estimate hold may still change."
_SOFTMAX = "The circuit that computes a softmax is research: its arguments follow what is learned about it."
_MITIGATION = "Which methods are worth their shots is still being measured: options come and go."
_CALIBRATION = (
    "The search for settings is young: how a bound is given, and what is returned, may still change."
)
_REPLAY = "What two runs are compared by is still growing."
_TASKS = "The tasks that measure a model are still being chosen."

EXPERIMENTAL = {
    "AmplitudeEstimate": _ESTIMATION,
    "AmplitudeEstimator": _ESTIMATION,
    "SoftmaxCircuitSampler": _SOFTMAX,
    "SoftmaxLoader": _SOFTMAX,
    "MitigationPlanner": _MITIGATION,
    "ProbabilisticErrorCancellation": _MITIGATION,
    "SharedDecay": _MITIGATION,
    "TwoCopyLoader": _MITIGATION,
    "find_mitigated_calls": _MITIGATION,
    "Calibration": _CALIBRATION,
    "calibrate": _CALIBRATION,
    "RunComparison": _REPLAY,
    "compare_runs": _REPLAY,
    "replay": _REPLAY,
    "make_task": _TASKS,
}
"""Names that may change in any release, which the changelog says, and why."""
