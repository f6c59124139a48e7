"""What every call of the kernels needs, whichever room it comes from: a seed, and a plain word when memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import BackendUnavailable

FEW_ROWS = 64
"""Rows of a key head up to which masses are kept between two passes (`decode`); more are drawn in blocks (`prefill`)."""


def make_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed for the kernels, int64, (), on the device; without waiting for it."""
    source = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (), generator=generator, device=source).to(device, non_blocking=True)


@contextlib.contextmanager
def memory_named() -> Iterator[None]:
    """Say in the lab's words that CUDA ran out of memory, and what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendUnavailable(
            "CUDA ran out of memory. Decoding keeps about three bytes a key and query besides its inputs (five from 4,097 draws on), "
            f"many queries little more than their output: take fewer rows at a time. {str(error).splitlines()[0]}"
        ) from error
