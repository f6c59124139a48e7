"""What a user reads when CUDA runs out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import BackendUnavailable


@contextlib.contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn torch's error into one that says what takes less memory.

    Raises
    ------
    BackendUnavailable
        If CUDA runs out of memory within the block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BackendUnavailable(
            "CUDA ran out of memory. Besides its inputs, decoding holds about three bytes for each key and "
            "query (five for more than 4,096 draws), and attention of many queries little more than its "
            f"output: take fewer rows at a time. {str(error).splitlines()[0]}"
        ) from error
