"""Which path a call takes, a kernel or plain torch, and why."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util

import torch
from torch import Tensor

from ..errors import BackendUnavailable, DtypeError, FallbackWarning, unknown_name

VARIABLE = "QTX_LAB_KERNELS"
"""The environment variable that overrides the choice."""

SETTINGS = ("triton", "reference")
"""What it may be set to."""

MAX_FEATURES = 256
"""The most features of a head that the Triton kernels take."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that they take."""

CACHE_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of keys and values that the kernels of decoding take, beside queries of 16 bits or more."""


FEWEST_BYTES = 300_000_000
"""Bytes of keys and values up to which exact decoding takes less time on a GPU.

On an H200, with 8 key heads of 128 features in bfloat16, exact attention was faster at 8 sequences of 8,192
keys (268 MB) and at one of 32,768 (134 MB), and draws were at one of 131,072 (537 MB).
"""


@dataclass(frozen=True)
class Choice:
    """The path of a call.

    Parameters
    ----------
    path : {"triton", "cpu", "reference"}
        A Triton kernel, the pass that numba compiles, or plain torch.
    reason : str
        Why this one.
    fell_back : bool
        Whether there is a kernel for this device, which was not taken for a reason that the user did not
        choose.
    """

    path: str
    reason: str
    fell_back: bool = False

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What belongs in `EstimateInfo.fallbacks`."""
        return (f"The plain-torch reference ran, not the kernel: {self.reason}.",) if self.fell_back else ()


def slower_prefill() -> str:
    """Why exact attention of many queries takes less time than their draws do, on any device."""
    return (
        "the draws of many queries read all keys and values, as exact attention does, and compute more: take "
        "them for the noise of draws, as in training, not for speed"
    )


def slower_decode(path: str, num_bytes: int) -> str | None:
    """Why exact attention of few queries takes less time than their draws do, None where it may not.

    Parameters
    ----------
    path : {"triton", "reference"}
    num_bytes : int
        Of the keys and values.

    Examples
    --------
    >>> slower_decode("triton", 1 << 30)
    >>> slower_decode("triton", 1 << 20)
    'exact attention reads 1 MB of keys and values in less time than the kernels of draws take to start'
    """
    if path == "reference":
        return "plain torch computes all logits, as exact attention does, and draws besides"
    if num_bytes <= FEWEST_BYTES:
        return (
            f"exact attention reads {num_bytes / 1e6:,.0f} MB of keys and values in less time than the "
            "kernels of draws take to start"
        )
    return None


def triton_considered(q: Tensor) -> bool:
    """Whether Triton kernels may run for these queries, so that an estimate should say whether they did."""
    return q.is_cuda or os.environ.get(VARIABLE) == "triton"


def choose(tensors: Sequence[Tensor], *, chained: bool = False, obstacle: str | None = None) -> Choice:
    """Choose between a Triton kernel and its plain-torch reference.

    The kernel runs for tensors on CUDA, the reference elsewhere. QTX_LAB_KERNELS=triton or reference
    overrides that.

    Parameters
    ----------
    tensors : Tensors, (..., features)
        Queries, keys and values.
    chained : bool
        Whether the kernel feeds one product of matrices into another.
    obstacle : str, optional
        What of the call the kernel does not know.

    Raises
    ------
    ArgumentError
        If QTX_LAB_KERNELS is set to anything else.
    BackendUnavailable
        If it is `triton` and the kernel cannot run here.

    Examples
    --------
    >>> choose([torch.zeros(2, 4)])
    Choice(path='reference', reason='the tensors are on the CPU', fell_back=False)
    """
    setting = _setting()
    if setting == "reference":
        return Choice("reference", f"{VARIABLE}=reference")
    on_cpu = tensors[0].device.type == "cpu"
    if setting is None and on_cpu:
        return Choice("reference", "the tensors are on the CPU")
    if obstacle := obstacle or _obstacle(tensors, chained):
        if setting == "triton":
            raise BackendUnavailable(f"{VARIABLE}=triton is not possible here: {obstacle}.")
        return _fallback(obstacle)
    reason = f"{VARIABLE}=triton" if setting else "the tensors are on CUDA"
    return Choice("triton", f"{reason}, in Triton's interpreter" if on_cpu else reason)


def choose_cpu(tensors: Sequence[Tensor]) -> Choice:
    """Choose between the pass that numba compiles for the CPU, for float32 and bfloat16, and plain torch.

    QTX_LAB_KERNELS=reference takes plain torch, as does QTX_LAB_KERNELS=triton.

    Raises
    ------
    ArgumentError
        If QTX_LAB_KERNELS is set to anything else.
    """
    if setting := _setting():
        return Choice("reference", f"{VARIABLE}={setting}")
    for x in tensors:
        if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
            given = f"{x.dtype} on {x.device}"
            return Choice("reference", f"the kernel for the CPU takes float32 and bfloat16, not {given}")
        if not x.numel():
            return Choice("reference", "there is nothing to do")
    if obstacle := _compiler_obstacle():
        return _fallback(obstacle)
    return Choice("cpu", "the tensors are on the CPU")


def _setting() -> str | None:
    """The value of QTX_LAB_KERNELS, None where it is not set."""
    setting = os.environ.get(VARIABLE) or None
    if setting not in (None, *SETTINGS):
        raise unknown_name(VARIABLE, setting, SETTINGS)
    return setting


def _fallback(obstacle: str) -> Choice:
    """Plain torch in place of a kernel, with a warning to the caller's caller."""
    choice = Choice("reference", obstacle, fell_back=True)
    warnings.warn(choice.fallbacks[0], FallbackWarning, stacklevel=4)
    return choice


@functools.cache
def _compiler_obstacle() -> str | None:
    """Why numba cannot compile the pass, None if it can. The first call compiles it."""
    try:
        from .cpu_decode.launch import compiled

        compiled()
    except Exception as error:  # a compiler may raise anything
        return f"numba cannot compile it: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def _obstacle(tensors: Sequence[Tensor], chained: bool) -> str | None:
    """Why the Triton kernels cannot run on these tensors, None if they can."""
    device = tensors[0].device
    if util.find_spec("triton") is None:
        return "triton is not installed (the extra `gpu` has it)"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"it takes float32, float16 and bfloat16, not {x.dtype}"
        if x.shape[-1] > MAX_FEATURES:
            return f"it takes up to {MAX_FEATURES} features a head, not {x.shape[-1]}"
    if device.type == "cpu":
        from .philox import INTERPRETED

        return (
            None
            if INTERPRETED
            else "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before triton was loaded"
        )
    if device.type != "cuda" or torch.version.hip:
        return f"it is for NVIDIA's GPUs, not {device.type}{' (ROCm)' if torch.version.hip else ''}"
    return device_obstacle(torch.cuda.get_device_capability(device), triton_version(), chained)


def device_obstacle(capability: tuple[int, int], version: tuple[int, ...], chained: bool) -> str | None:
    """Why a GPU of this compute capability cannot run a kernel with this version of triton, None if it can.

    >>> device_obstacle((7, 5), (3, 7, 1), chained=False)
    'it needs a GPU of compute capability 8.0 or newer, this one has 7.5'
    """
    if capability < (8, 0):
        major, minor = capability
        return f"it needs a GPU of compute capability 8.0 or newer, this one has {major}.{minor}"
    if chained and capability[0] == 9 and (3, 4) <= version < (3, 7, 1):
        # The error was seen where a product is transposed, which the kernels avoid. But nobody would notice a
        # wrong gradient.
        return (
            f"triton {'.'.join(map(str, version))} can silently corrupt products fed into products on Hopper "
            "GPUs (3.4.0 to 3.7.0; flash-linear-attention issue 640): install 3.7.1 or newer"
        )
    return None


def check_readable(**tensors: Tensor) -> None:
    """Refuse keys and values that kernels, or this GPU, cannot read.

    Raises
    ------
    DtypeError
    """
    for name, x in tensors.items():
        if x.dtype not in CACHE_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in CACHE_DTYPES)
            raise DtypeError(f"{name} is {x.dtype}; the kernels take {allowed}.")
        if x.dtype == torch.float8_e4m3fn and x.is_cuda and not torch.version.hip:
            major, minor = torch.cuda.get_device_capability(x.device)
            if (major, minor) < (8, 9):
                raise DtypeError(
                    f"{name} is {x.dtype}, which GPUs of a compute capability below 8.9 do not read; "
                    f"this one has {major}.{minor}: torch.float8_e5m2 is possible."
                )


@functools.cache
def triton_version() -> tuple[int, ...]:
    """The version of the installed triton, such as (3, 7, 1)."""
    return tuple(int(part) for part in metadata.version("triton").split("+")[0].split(".")[:3])
