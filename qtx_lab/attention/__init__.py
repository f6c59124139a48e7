"""Attention computed from draws instead of in full."""

from .sampled import sampled_attention

__all__ = ["sampled_attention"]
