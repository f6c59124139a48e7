"""Which path a call takes, kernel or plain torch, and why."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util

import torch
from torch import Tensor

from ..errors import BackendUnavailable, FallbackWarning, unknown_name

VARIABLE = "QTX_LAB_KERNELS"
WIDEST = 256
"""Features of a head, at the most."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The path of a call.

    Parameters
    ----------
    path : {"triton", "cpu", "reference"}
    reason : str
    fell_back : bool
        Whether a kernel is there for this device and was not taken for a reason that nobody asked for.
    """

    path: str
    reason: str
    fell_back: bool = False

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """For a result's `diagnostics["fallbacks"]`."""
        return (f"The plain-torch reference ran, not the kernel: {self.reason}.",) if self.fell_back else ()


def choose(tensors: Sequence[Tensor], *, chained: bool = False) -> Choice:
    """The kernel for tensors on CUDA, plain torch elsewhere; QTX_LAB_KERNELS=triton or reference overrides.

    Parameters
    ----------
    tensors : Tensors, (..., features)
        Queries, keys and values.
    chained : bool
        Whether the kernel feeds one product of matrices into another.

    Raises
    ------
    ArgumentError
        If QTX_LAB_KERNELS is something else.
    BackendUnavailable
        If it is `triton` and the kernel cannot run here.

    >>> choose([torch.zeros(2, 4)])
    Choice(path='reference', reason='the tensors are on the CPU', fell_back=False)
    """
    asked = os.environ.get(VARIABLE) or None
    if asked not in (None, "triton", "reference"):
        raise unknown_name(VARIABLE, asked, ("triton", "reference"))
    if asked == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    on_cpu = tensors[0].device.type == "cpu"
    if asked is None and on_cpu:
        return Choice("reference", "the tensors are on the CPU")
    if trouble := _trouble(tensors, chained):
        if asked == "triton":
            raise BackendUnavailable(f"{VARIABLE}=triton cannot be had: {trouble}.")
        choice = Choice("reference", trouble, fell_back=True)
        warnings.warn(choice.fallbacks[0], FallbackWarning, stacklevel=3)
        return choice
    reason = f"{VARIABLE}=triton" if asked else "the tensors are on CUDA"
    return Choice("triton", f"{reason}, in Triton's interpreter" if on_cpu else reason)


def choose_cpu(tensors: Sequence[Tensor]) -> Choice:
    """The kernel that numba compiles for float32 on the CPU, or plain torch; QTX_LAB_KERNELS=reference overrides.

    Raises
    ------
    ArgumentError
        If QTX_LAB_KERNELS is something else than `triton` or `reference`.
    """
    asked = os.environ.get(VARIABLE) or None
    if asked not in (None, "triton", "reference"):
        raise unknown_name(VARIABLE, asked, ("triton", "reference"))
    if asked:
        return Choice("reference", f"{VARIABLE}={asked}")
    for x in tensors:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return Choice("reference", f"the kernel for the CPU takes float32, not {x.dtype} on {x.device}")
        if not x.numel():
            return Choice("reference", "there is nothing to do")
    if trouble := _compiler_trouble():
        choice = Choice("reference", trouble, fell_back=True)
        warnings.warn(choice.fallbacks[0], FallbackWarning, stacklevel=3)
        return choice
    return Choice("cpu", "the tensors are on the CPU")


def wanted(q: Tensor) -> bool:
    """Whether kernels come into question for these queries, so that their choice has to be told."""
    return q.is_cuda or os.environ.get(VARIABLE) == "triton"


@functools.cache
def _compiler_trouble() -> str | None:
    """Why numba cannot compile the kernel, if so; the first call does."""
    try:
        from .cpu_decode import compiled

        compiled()
    except Exception as error:  # whatever a compiler may say
        return f"numba cannot compile it: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _trouble(tensors: Sequence[Tensor], chained: bool) -> str | None:
    """Why the kernels cannot run on these tensors, if so."""
    device = tensors[0].device
    if util.find_spec("triton") is None:
        return "triton is not installed (the extra `gpu` has it)"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {x.dtype}"
        if x.shape[-1] > WIDEST:
            return f"it takes up to {WIDEST} features a head, not {x.shape[-1]}"
    if device.type == "cpu":
        from .philox import INTERPRETED

        return (
            None if INTERPRETED else "the tensors are on the CPU and TRITON_INTERPRET=1 was not set in time"
        )
    if device.type != "cuda" or torch.version.hip:
        return f"it was made for NVIDIA's GPUs, not {device.type}{' (ROCm)' if torch.version.hip else ''}"
    return device_trouble(torch.cuda.get_device_capability(device), triton_version(), chained)


def device_trouble(capability: tuple[int, int], version: tuple[int, ...], chained: bool) -> str | None:
    """Why a GPU of this compute capability, with this triton, cannot run a kernel, if so.

    >>> device_trouble((7, 5), (3, 7, 1), chained=False)
    'it needs a GPU of compute capability 8.0 or newer, this one has 7.5'
    """
    if capability < (8, 0):
        return (
            f"it needs a GPU of compute capability 8.0 or newer, this one has {capability[0]}.{capability[1]}"
        )
    if chained and capability[0] == 9 and (3, 4) <= version < (3, 7, 1):
        # The kernels transpose no product, which is where it was seen; a wrong gradient would go unnoticed.
        return (
            f"triton {'.'.join(map(str, version))} can silently corrupt products fed into products on Hopper GPUs "
            "(3.4.0 to 3.7.0; flash-linear-attention issue 640): install 3.7.1 or newer"
        )
    return None


@functools.cache
def triton_version() -> tuple[int, ...]:
    """As numbers: (3, 7, 1)."""
    return tuple(int(part) for part in metadata.version("triton").split("+")[0].split(".")[:3])
