"""Triton kernels for sampled attention, each beside its plain-torch reference; triton is loaded when a kernel runs."""
