"""Tokens that are read where they lie, and the order in which training goes through them: a function of the seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, TextError
from ..models.reference import reference_text

BYTES = 256
"""Vocabulary of a text that is read as bytes."""
HEAD_BYTES = 1 << 20
"""How much of each end of the tokens `Tokens.digest` reads."""


@dataclass(frozen=True)
class Tokens:
    """Tokens to train on and to validate with, 1-D and indexable; of a file only what is used is read.

    Parameters
    ----------
    training, held_out : array (T,) of whole numbers
    vocab_size : int
        One more than the largest token.
    bytes : bool
        Whether a token is a byte of text, so that a loss can be said in bits per byte.
    """

    training: np.ndarray
    held_out: np.ndarray
    vocab_size: int
    bytes: bool

    @property
    def digest(self) -> str:
        """Of the lengths and of both ends of both parts: another text is noticed, without reading all of it."""
        seen = hashlib.sha256()
        for part in (self.training, self.held_out):
            ends = HEAD_BYTES // part.itemsize
            seen.update(str((len(part), part.dtype)).encode())
            seen.update(np.ascontiguousarray(part[:ends]).data)
            seen.update(np.ascontiguousarray(part[-ends:]).data)
        return seen.hexdigest()[:16]


def open_tokens(text: str | Path | Tensor | np.ndarray, num_tokens: int) -> Tokens:
    """The tokens of a text: "reference", a UTF-8 file, a `.npy` file of whole numbers, or a 1-D tensor of them.

    The reference text is Python's own manual without the shipped held-out part, which it is validated with. Of every
    other text the last tenth is held out.

    Parameters
    ----------
    text : str, path, Tensor or array
    num_tokens : int
        Length of a sequence: both parts need one token more.

    Raises
    ------
    TextError
        If a file cannot be read.
    ArgumentError
        If it holds no whole numbers from 0, or too few of them.
    """
    if isinstance(text, str) and text == "reference":
        tokens = Tokens(*_reference(), BYTES, True)
    else:
        whole, is_bytes = _read(text)
        cut = len(whole) - max(len(whole) // 10, min(num_tokens + 1, len(whole)))
        size = BYTES if is_bytes else int(whole.max()) + 1 if len(whole) else 0
        tokens = Tokens(whole[:cut], whole[cut:], size, is_bytes)
    if min(len(tokens.training), len(tokens.held_out)) <= num_tokens:
        total = len(tokens.training) + len(tokens.held_out)
        raise ArgumentError(
            f"text has {total} tokens; sequences of num_tokens={num_tokens} need {2 * num_tokens + 2}, half of them held out."
        )
    return tokens


@cache
def _reference() -> tuple[np.ndarray, np.ndarray]:
    """The held-out part is the shipped one, whatever this Python's manual is: what it has too is cut."""
    from .reference_training import split_topics, without_shared

    parts = without_shared(split_topics()[0], reference_text()), reference_text()
    return tuple(np.frombuffer(part.encode(), dtype=np.uint8) for part in parts)  # type: ignore[return-value]


def _read(text: str | Path | Tensor | np.ndarray) -> tuple[np.ndarray, bool]:
    if isinstance(text, str | Path):
        path, is_bytes = Path(text), Path(text).suffix != ".npy"
        try:
            whole = np.memmap(path, np.uint8, "r") if is_bytes else np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:  # an empty file cannot be mapped
            raise TextError(f"text={str(text)!r} cannot be read: {error}.") from error
        if is_bytes:
            _check_utf8(path, whole)
    else:
        whole, is_bytes = (text.cpu().numpy() if isinstance(text, Tensor) else np.asarray(text)), False
    if whole.ndim != 1 or whole.dtype.kind not in "iu" or (len(whole) and whole.min() < 0):
        raise ArgumentError(
            f"text holds {whole.dtype} of shape {whole.shape}; it must hold whole numbers from 0, in one dimension."
        )
    return whole, is_bytes


def _check_utf8(path: Path, whole: np.ndarray) -> None:
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(whole), 1 << 24):
            decoder.decode(whole[start : start + (1 << 24)].tobytes(), final=start + (1 << 24) >= len(whole))
    except UnicodeDecodeError as error:
        raise TextError(f"text={str(path)!r} is not UTF-8 ({error.reason}): save it as UTF-8 text.") from None


def stream_seed(*path: int) -> int:
    """A seed of 63 bits for the stream of random numbers at `path`: (run's seed, what for, step, shard, ...).

    Streams of different paths are independent (`numpy.random.SeedSequence`).
    """
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


class SequenceOrder:
    """Which sequences come when: every window of an epoch once, in random order, windows shifted from epoch to epoch.

    It holds no position: sequence number i is a function of the seed and i alone, whoever asks, so that training is
    resumed by a number, and shared among any number of ranks.

    Parameters
    ----------
    tokens : array (T,)
    num_tokens : int
        Length of a sequence; the targets are one token further.
    seed : int

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
        self.windows = max(1, (len(tokens) - num_tokens) // num_tokens)  # of an epoch, whatever its shift
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}

    def sequences(self, numbers: range | list[int]) -> Tensor:
        """Sequences by number, int64 (len(numbers), num_tokens + 1)."""
        found = np.empty((len(numbers), self.num_tokens + 1), dtype=np.int64)
        for row, number in enumerate(numbers):
            epoch, place = divmod(number, self.windows)
            shift, order = self._epoch(epoch)
            start = shift + int(order[place]) * self.num_tokens
            found[row] = self.tokens[start : start + self.num_tokens + 1]
        return torch.from_numpy(found)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        if epoch not in self._epochs:
            random = np.random.default_rng([self.seed, epoch])
            room = len(self.tokens) - self.num_tokens * self.windows  # at least 1
            self._epochs = {epoch: (int(random.integers(room)), random.permutation(self.windows))}
        return self._epochs[epoch]


def held_out_windows(tokens: np.ndarray, num_tokens: int, count: int) -> Tensor:
    """The first `count` windows of the held-out tokens, or as many as there are, int64 (W, num_tokens + 1)."""
    count = min(count, (len(tokens) - 1) // num_tokens)
    starts = np.arange(count)[:, None] * num_tokens
    return torch.from_numpy(tokens[starts + np.arange(num_tokens + 1)].astype(np.int64))
