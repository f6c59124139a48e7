"""Kernels for sampled attention, each beside its plain-torch reference; triton is loaded when a kernel runs.

They take and give tensors. `qtx_lab.attention` and `qtx_lab.cache` make estimates of what they return.
"""
