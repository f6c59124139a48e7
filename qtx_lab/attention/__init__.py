"""Attention computed from draws instead of in full."""

from .gradients import same_draws
from .kv_cache import SampledKVCache
from .multihead import QuantumMultiheadAttention, ReplacedAttention, replace_attention
from .sampled import sampled_attention

__all__ = [
    "QuantumMultiheadAttention",
    "ReplacedAttention",
    "SampledKVCache",
    "replace_attention",
    "same_draws",
    "sampled_attention",
]
