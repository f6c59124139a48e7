"""Attention computed from draws instead of in full."""

from .dispatch import sampled_attention
from .gradients import same_draws
from .kernel_paths import gpu_quantum_attention
from .multihead import QuantumMultiheadAttention, ReplacedAttention, replace_attention

__all__ = [
    "QuantumMultiheadAttention",
    "ReplacedAttention",
    "gpu_quantum_attention",
    "replace_attention",
    "same_draws",
    "sampled_attention",
]
