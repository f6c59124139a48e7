"""`SampledKVCache`: keys and values of a sequence, attended to by draws from a sketch of the keys."""

from .kv_cache import SampledKVCache

__all__ = ["SampledKVCache"]
