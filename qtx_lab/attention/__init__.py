"""Attention computed from draws instead of in full."""

from .dispatch import sampled_attention
from .gradients import same_draws
from .multihead import QuantumMultiheadAttention, ReplacedAttention, replace_attention

__all__ = [
    "QuantumMultiheadAttention",
    "ReplacedAttention",
    "replace_attention",
    "same_draws",
    "sampled_attention",
]
