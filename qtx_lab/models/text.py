"""Texts for the reference model, and their bytes as tokens."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError, DtypeError, TextError

ASSETS = Path(__file__).parent / "assets"
"""Where the shipped weights, the held-out text and the model card are."""


def reference_text() -> str:
    """The held-out text: the last tenth of Python 3.11's `pydoc_data.topics`, which the model never saw.

    Examples
    --------
    >>> len(encode(reference_text())) > 512  # bytes
    True
    """
    return (ASSETS / "heldout.txt").read_text(encoding="utf-8")


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file.

    Raises
    ------
    TextError
        If it cannot be read, is not UTF-8, or is empty.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "mine.txt")
    ...     _ = path.write_text("Attention is a mean.", encoding="utf-8")
    ...     read_text(path)
    'Attention is a mean.'
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise TextError(f"text={str(path)!r} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"text={str(path)!r} is not UTF-8 (byte {error.start}): save it as UTF-8 text."
        ) from error
    if not text.strip():
        raise TextError(f"text={str(path)!r} is empty: the model needs at least some bytes.")
    return text


def encode(text: str) -> Tensor:
    """The bytes of a text as int64 tokens, (number of bytes,).

    Examples
    --------
    >>> encode("né")
    tensor([110, 195, 169])
    """
    if not isinstance(text, str):
        raise DtypeError(f"text is a {type(text).__name__}; it must be a str.")
    try:
        return torch.tensor(bytearray(text.encode()), dtype=torch.uint8).long()
    except UnicodeEncodeError as error:  # halves of a character, which broken files and escapes leave
        raise ArgumentError(
            f"text holds {text[error.start]!r} at {error.start}, which UTF-8 does not have."
        ) from error
