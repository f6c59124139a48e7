"""How a model that is trained attends: by draws whose number, noise and stream the trainer sets, or exactly."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import QuantumMultiheadAttention, replace_attention, sampled_attention
from ..errors import ArgumentError
from ..estimates import Draws
from ..models.reference import causal_sdpa
from ..samplers import ExactSampler, Sampler, make_sampler
from .recipe import Recipe


class NoisySampler:
    """A sampler on rows as a noisy device has them: p' = (1 - noise) p + noise * uniform over the visible keys.

    That is what depolarising noise does to a row. Draws, and the gradients made of them, are those of p', as they
    would be from a device that nobody corrects: biased by O(noise).
    """

    unbiased = False

    def __init__(self, sampler: Sampler, noise: float):
        self.sampler, self.noise = sampler, noise
        self.name = sampler.name
        self.independent = sampler.independent
        self.joint = getattr(sampler, "joint", False)

    def draw(self, logits: Tensor, num_samples: int, **options: Any) -> Draws:
        visible = logits > -torch.inf
        uniform = visible / visible.sum(-1, keepdim=True).clamp_min(1)
        p = logits.softmax(-1).nan_to_num(0.0)  # a row without visible keys has none
        mixed = ((1 - self.noise) * p + self.noise * uniform).log()
        return self.sampler.draw(mixed, num_samples, **options)


class Attention:
    """What `model(tokens, attention=...)` or a model's attention modules draw with; one object for a whole training.

    Parameters
    ----------
    model : nn.Module
        Whose forward takes `attention=` (see `qtx_lab.models.reference.AttentionFn`), or that holds
        `torch.nn.MultiheadAttention` or `QuantumMultiheadAttention` modules; else it attends in its own way.
        Modules of torch's become the latter, until `undo`.
    recipe : Recipe

    Attributes
    ----------
    draws : int
        Draws a row with which training begins; 0 where nothing is drawn.
    how : str
        One sentence.

    Raises
    ------
    ArgumentError
        If the recipe asks for draws and the model has no attention that could draw.
    """

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.takes = "attention" in inspect.signature(model.forward).parameters
        own = [m for m in model.modules() if isinstance(m, QuantumMultiheadAttention)]
        torchs = any(type(m) is nn.MultiheadAttention for m in model.modules())
        self.sampler: Sampler | None = None
        self.settings: dict[str, Any] = {}
        self.layers: list[QuantumMultiheadAttention] = []
        self._undo: list[Any] = []
        if recipe.sampler is not None or self.takes or torchs:
            self.sampler = make_sampler("systematic" if recipe.sampler is None else recipe.sampler)
        asked = recipe.num_samples
        if not self.takes and (torchs or own):
            for module in own:
                self._undo.append(partial(setattr, module, "settings", module.settings))
            if torchs:
                self._undo.append(replace_attention(model, sampler=self.sampler).undo)
            self.layers = [m for m in model.modules() if isinstance(m, QuantumMultiheadAttention)]
            if self.sampler is None:  # each as it is; the trainer counts by the first
                self.kept = [dict(m.settings) for m in self.layers]
            else:
                self.kept = [{**m.settings, "sampler": self.sampler} for m in self.layers]
            asked = self.kept[0]["num_samples"] if asked is None else asked
            if recipe.control_variate is not None:
                self.kept = [{**s, "control_variate": recipe.control_variate} for s in self.kept]
            names = dict.fromkeys(s["sampler"].name for s in self.kept)
            self.how = f"{len(self.layers)} attention modules draw by {', '.join(names)}"
            exact = all(type(s["sampler"]) is ExactSampler for s in self.kept)
        elif self.takes:
            assert self.sampler is not None
            self.settings = {"sampler": self.sampler, "control_variate": recipe.control_variate}
            exact = type(self.sampler) is ExactSampler
            self.how = "attention is exact" if exact else f"attention draws by {self.sampler.name}"
        else:
            if self.sampler is not None and type(self.sampler) is not ExactSampler:
                raise ArgumentError(
                    f"sampler={self.sampler.name!r}: a {type(model).__name__} has no attention that could draw: its "
                    "forward takes no `attention`, and it has no torch.nn.MultiheadAttention. Leave sampler out."
                )
            exact, self.how = True, "the model attends in its own way"
        self.draws = 0 if exact else asked or 64

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.settings.get("num_samples"):
            return causal_sdpa(layer, q, k, v)
        if torch.is_autocast_enabled(
            q.device.type
        ):  # as autocast does for SDPA: rotated q and k are float32 there
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        return sampled_attention(q, k, v, is_causal=True, enable_gqa=True, **self.settings).output

    def undo(self) -> None:
        """Give the model's modules back what they had."""
        for restore in self._undo:
            restore()

    @contextmanager
    def drawing(
        self, draws: int, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """Forward passes inside draw so many keys a row, from this generator; 0 attends exactly."""
        self._set(draws, noise, generator)
        try:
            yield
        finally:
            self._set(0, 0.0, None)

    def _set(self, draws: int, noise: float, generator: torch.Generator | None) -> None:
        if self.takes and self.sampler is not None:
            sampler = NoisySampler(self.sampler, noise) if noise and draws else self.sampler
            self.settings |= {"sampler": sampler, "num_samples": draws, "generator": generator}
        for layer, kept in zip(self.layers, self.kept if self.layers else (), strict=True):
            if draws == 0:
                layer.settings = {
                    **kept,
                    "sampler": ExactSampler(),
                    "num_samples": 1,
                    "control_variate": None,
                }
                continue
            sampler = NoisySampler(kept["sampler"], noise) if noise else kept["sampler"]
            layer.settings = {**kept, "sampler": sampler, "num_samples": draws, "generator": generator}

    def forward(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), of the model itself or of what wraps it."""
        output = module(tokens, attention=self) if self.takes else module(tokens)
        return getattr(output, "logits", output)
