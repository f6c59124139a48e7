"""Triton kernels for sampled attention, each beside its plain-torch reference; triton is loaded when a kernel runs."""

from .attention import gpu_quantum_attention

__all__ = ["gpu_quantum_attention"]
