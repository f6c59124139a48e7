"""The tokens that a model is trained on, read from their file as needed, and the order of the sequences."""

from __future__ import annotations

import codecs
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, TextError
from ..models.text import reference_text

BYTE_VOCABULARY = 256
"""Size of the vocabulary of a text that is read as bytes."""
DIGEST_BYTES = 1 << 20
"""How much of each end of the tokens `Tokens.digest` reads."""
UTF8_CHECK_BYTES = 1 << 24
"""How much of a text is decoded at a time to check that it is UTF-8."""


@dataclass(frozen=True)
class Tokens:
    """Tokens to train on and to validate with; of a file only what is used is read.

    Parameters
    ----------
    training, held_out : array (T,) of whole numbers
        The two parts.
    vocab_size : int
        One more than the largest token.
    bytes : bool
        Whether a token is a byte of text, so that a loss has a value in bits per byte.
    """

    training: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    bytes: bool

    @property
    def digest(self) -> str:
        """Hash of the lengths and of both ends of both parts: it differs for another text, and is quick."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            end = DIGEST_BYTES // part.itemsize
            digest.update(str((len(part), part.dtype)).encode())
            digest.update(np.ascontiguousarray(part[:end]).data)
            digest.update(np.ascontiguousarray(part[-end:]).data)
        return digest.hexdigest()[:16]


def open_tokens(text: str | Path | Tensor | np.ndarray, num_tokens: int) -> Tokens:
    """The tokens of a text: "reference", a UTF-8 file, a `.npy` file of whole numbers, or a tensor of them.

    The reference text is Python's own manual, without the held-out part that is shipped with the package and
    that validation uses. Of every other text the last tenth is held out.

    Parameters
    ----------
    text : str, path, Tensor or array
    num_tokens : int
        Length of a sequence: both parts need at least one token more.

    Raises
    ------
    TextError
        If a file cannot be read.
    ArgumentError
        If the text holds anything but whole numbers from 0, or too few of them.
    """
    if isinstance(text, str) and text == "reference":
        tokens = Tokens(*_reference(), BYTE_VOCABULARY, True)
    else:
        every, is_bytes = _read(text)
        cut = len(every) - max(len(every) // 10, min(num_tokens + 1, len(every)))
        vocab_size = BYTE_VOCABULARY if is_bytes else int(every.max()) + 1 if len(every) else 0
        tokens = Tokens(every[:cut], every[cut:], vocab_size, is_bytes)
    if min(len(tokens.training), len(tokens.held_out)) <= num_tokens:
        total = len(tokens.training) + len(tokens.held_out)
        raise ArgumentError(
            f"text has {total} tokens; sequences of num_tokens={num_tokens} need {2 * num_tokens + 2}, half "
            "of them held out."
        )
    return tokens


@cache
def _reference() -> tuple[np.ndarray, np.ndarray]:
    """The training and held-out parts of the reference text.

    The held-out part is the shipped one whatever this Python's manual says; what the two share is cut from
    the training part.
    """
    from .reference_training import split_topics, without_shared

    parts = without_shared(split_topics()[0], reference_text()), reference_text()
    return tuple(np.frombuffer(part.encode(), dtype=np.uint8) for part in parts)  # type: ignore[return-value]


def _read(text: str | Path | Tensor | np.ndarray) -> tuple[np.ndarray, bool]:
    """All tokens of a text, and whether they are its bytes."""
    if isinstance(text, str | Path):
        path = Path(os.path.expanduser(text))
        is_bytes = path.suffix != ".npy"
        try:
            tokens = np.memmap(path, np.uint8, "r") if is_bytes else np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:  # an empty file cannot be mapped
            raise TextError(f"text={str(text)!r} cannot be read: {error}.") from error
        if is_bytes:
            _check_utf8(path, tokens)
    else:
        tokens, is_bytes = (text.cpu().numpy() if isinstance(text, Tensor) else np.asarray(text)), False
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (len(tokens) and tokens.min() < 0):
        raise ArgumentError(
            f"text holds {tokens.dtype} of shape {tokens.shape}; it must hold whole numbers from 0, in one "
            "dimension."
        )
    return tokens, is_bytes


def _check_utf8(path: Path, content: np.ndarray) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(content), UTF8_CHECK_BYTES):
            end = start + UTF8_CHECK_BYTES
            decoder.decode(content[start:end].tobytes(), final=end >= len(content))
    except UnicodeDecodeError as error:
        raise TextError(f"text={str(path)!r} is not UTF-8 ({error.reason}): save it as UTF-8 text.") from None


def stream_seed(*path: int) -> int:
    """A seed of 63 bits for one stream of random numbers.

    Parameters
    ----------
    *path : int
        Names the stream: the seed of the training, what the numbers are for, step, shard, ... Streams of
        different paths are independent (`numpy.random.SeedSequence`).
    """
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


class SequenceOrder:
    """The order of the sequences: each epoch has every window once, in random order, at a shift of its own.

    It holds no position: sequence number i is a function of the seed and of i alone, so that a training is
    resumed by a number, and shared among any number of ranks.

    Parameters
    ----------
    tokens : array (T,)
        The tokens that the windows are cut from.
    num_tokens : int
        Length of a sequence; with its targets it has one token more.
    seed : int
        Decides the shifts and the order.

    Examples
    --------
    >>> order = SequenceOrder(np.arange(10), 3, seed=0)
    >>> order.sequences(range(4)).shape
    torch.Size([4, 4])
    >>> bool((order.sequences([5]) == order.sequences(range(8))[5]).all())
    True
    """

    def __init__(self, tokens: np.ndarray, num_tokens: int, seed: int):
        self.tokens, self.num_tokens, self.seed = tokens, num_tokens, seed
        self.windows = max(1, (len(tokens) - num_tokens) // num_tokens)  # in every epoch, whatever its shift
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def sequences(self, numbers: range | list[int]) -> Tensor:
        """Sequences by number, int64 (len(numbers), num_tokens + 1)."""
        sequences = np.empty((len(numbers), self.num_tokens + 1), dtype=np.int64)
        for row, number in enumerate(numbers):
            epoch, place = divmod(number, self.windows)
            shift, order = self._epoch(epoch)
            start = shift + int(order[place]) * self.num_tokens
            sequences[row] = self.tokens[start : start + self.num_tokens + 1]
        return torch.from_numpy(sequences)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """The shift of an epoch's windows, tokens, and their order; the last epoch is remembered."""
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed, epoch])
            room = len(self.tokens) - self.num_tokens * self.windows  # at least 1
            self._epochs = {epoch: (int(random.integers(room)), random.permutation(self.windows))}
        return self._epochs[epoch]


def held_out_windows(tokens: np.ndarray, num_tokens: int, count: int) -> Tensor:
    """The first `count` windows of held-out tokens, or as many as there are, int64 (W, num_tokens + 1)."""
    count = min(count, (len(tokens) - 1) // num_tokens)
    starts = np.arange(count)[:, None] * num_tokens
    return torch.from_numpy(tokens[starts + np.arange(num_tokens + 1)].astype(np.int64))
