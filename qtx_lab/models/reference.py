"""The reference model: a small causal byte-level transformer that was trained on Python's own manual.

It exists so that every figure of the lab is about attention that a model has learned, on a machine without a
network. The shipped weights and the held-out text are in `assets/`, with a model card beside them.
`qtx_lab.training.reference_training` made them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count
from ..errors import ArgumentError
from ..storage import read_tensors
from .base import AttentionFn, causal_sdpa, record_inputs
from .generation import TextStream, stream
from .text import ASSETS, encode


@dataclass(frozen=True)
class ReferenceConfig:
    """Shape of the reference model; the defaults are the shipped one's."""

    vocab_size: int = 256
    context: int = 1024
    layers: int = 6
    width: int = 128
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    mlp_width: int = 384
    rope_base: float = 10_000.0
    dropout: float = 0.0


class Block(nn.Module):
    """Pre-norm attention with rotary positions and grouped-query heads, then a SwiGLU."""

    def __init__(self, config: ReferenceConfig):
        super().__init__()
        c = self.config = config
        self.attention_norm = nn.RMSNorm(c.width)
        self.query = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.key = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.value = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.mlp_norm = nn.RMSNorm(c.width)
        self.gate_up = nn.Linear(c.width, 2 * c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, width) -> q (B, H, L, E), k and v (B, Hkv, L, E), rotary positions applied."""
        h = self.attention_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        return rotate(q, rotation).to(x.dtype), rotate(k, rotation).to(x.dtype), v  # angles are float32

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Callable[..., Tensor]) -> Tensor:
        o = attend(*self.project(x, rotation)).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(o), self.config.dropout, self.training)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), self.config.dropout, self.training)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021, eq. 34) of x (..., L, E), halves paired."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class ReferenceModel(nn.Module):
    """A causal byte-level transformer whose attention can be replaced at every call.

    `model(tokens)` gives next-byte logits (B, L, 256) for int64 tokens (B, L), L <= context.
    `model(tokens, attention=fn)` computes each layer's attention with `fn(layer, q, k, v)` instead.
    `model(tokens, fn, first_position)` continues a text: the first of the tokens stands at that position,
    counted from 0, and `fn` attends to the keys of the earlier tokens, too.
    """

    def __init__(self, config: ReferenceConfig | None = None):
        super().__init__()
        self.name = "reference"
        self.stop_tokens: frozenset[int] = frozenset()
        c = self.config = config or ReferenceConfig()
        self.embedding = nn.Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for name, p in block.named_parameters():
                if p.ndim == 2:
                    residual = name in ("out.weight", "down.weight")
                    nn.init.normal_(p, std=0.02 / (math.sqrt(2 * c.layers) if residual else 1))

    def rotation(self, length: int, device: torch.device, first_position: int = 0) -> tuple[Tensor, Tensor]:
        half = self.config.head_dim // 2
        exponent = torch.arange(half, device=device, dtype=torch.float32) / half
        frequency = self.config.rope_base**-exponent  # [E/2], radians per position
        positions = torch.arange(first_position, first_position + length, device=device, dtype=torch.float32)
        angle = torch.outer(positions, frequency)
        return angle.cos(), angle.sin()

    def forward(
        self,
        tokens: Tensor,
        attention: AttentionFn = causal_sdpa,
        first_position: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        rotation = self.rotation(tokens.shape[-1], tokens.device, first_position)
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, lambda q, k, v, i=layer: attention(i, q, k, v))
        return F.linear(self.norm(x[:, -logits_to_keep:]), self.embedding.weight)

    def attention_inputs(
        self, tokens: Tensor, layers: Collection[int] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(q, k, v) of every layer, or of `layers`, for tokens (B, L), rotated: see `record_inputs`."""
        return record_inputs(self, tokens, layers)

    def encode(self, text: str) -> Tensor:
        """The bytes of a text as int64 tokens, (number of bytes,)."""
        return encode(text)

    def decode(self, tokens: Tensor) -> str:
        """The text of bytes; what is no UTF-8 becomes the replacement character."""
        return bytes(tokens.tolist()).decode(errors="replace")

    def pieces(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes that tokens are, one at a time."""
        return (bytes([token]) for token in tokens)

    def chat(self, message: str) -> str:
        """The message itself: the model only continues texts."""
        return message

    def generate(self, prompt: str | Tensor, max_new_tokens: int = 256, **settings: Any) -> TextStream:
        """Continue a text, yielding bytes as they come; each layer decodes with a `SampledKVCache`.

        Parameters
        ----------
        prompt : str or Tensor, int64, (L,)
            Attended to exactly. With the new bytes it must fit in the context.
        max_new_tokens : int
        **settings
            Those of `GenerationSettings`.

        Yields
        ------
        bytes
            One at a time: not always whole characters.

        Raises
        ------
        ArgumentError, DtypeError
            On the call, before any byte.

        Examples
        --------
        >>> model = load_reference_model()
        >>> b"".join(model.generate("The import statement", 12)).decode()[:5]
        ' is a'
        """
        return stream(self, prompt, max_new_tokens, **settings)


def load_reference_model(path: str | Path | None = None) -> ReferenceModel:
    """The shipped model (or one that `qtx-lab train` wrote to `path`), in evaluation mode, float32.

    Raises
    ------
    ArgumentError
        If the file is missing or is no reference model.

    Examples
    --------
    >>> load_reference_model().config.layers
    6
    """
    path = ASSETS / "model.safetensors" if path is None else Path(path)
    try:
        weights, about = read_tensors(path)
        config = ReferenceConfig(**json.loads(about["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"path={str(path)!r} does not hold a reference model: {error}") from error
    model = ReferenceModel(config)
    model.load_state_dict({name: x.float() for name, x in weights.items()})
    return model.eval()


def bits_per_byte(
    model: ReferenceModel,
    tokens: Tensor,
    *,
    attention: AttentionFn = causal_sdpa,
    window: int | None = None,
) -> Tensor:
    """Mean cross-entropy of each next byte, in bits, for each window of the tokens.

    Parameters
    ----------
    model : ReferenceModel
    tokens : Tensor, int64, (T,)
        Cut into windows of `window` + 1 bytes that overlap by one; an incomplete last one is left out.
    attention : AttentionFn
        What computes each layer's attention.
    window : int, optional
        Bytes predicted a window, each from those before it in the window; the model's context where None.

    Returns
    -------
    Tensor, float64, (number of windows,)

    Raises
    ------
    ArgumentError
        If window is not in 1..context, or if there are not window + 1 tokens.

    Examples
    --------
    >>> import qtx_lab as qtx
    >>> tokens = qtx.encode(qtx.reference_text())[:257]
    >>> qtx.bits_per_byte(qtx.load_reference_model(), tokens, window=128).shape
    torch.Size([2])
    """
    context = model.config.context
    window = context if window is None else check_count("window", window, most=context)
    if len(tokens) <= window:
        raise ArgumentError(f"tokens has {len(tokens)} bytes; a window of {window} needs {window + 1}.")
    windows = tokens.unfold(0, window + 1, window)  # [W, window + 1]
    with torch.no_grad():
        logits = model(windows[:, :-1], attention=attention)
        nats = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    return nats.double().mean(-1) / math.log(2)
