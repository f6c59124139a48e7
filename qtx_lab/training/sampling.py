"""How a model attends while it is trained: exactly, or by draws whose number and noise the trainer sets."""

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
from ..samplers import ExactSampler, Sampler, StreamSampler, make_sampler
from ..specs import read_heads
from ..streams import Stream

DEFAULT_NUM_SAMPLES = 64
"""Draws of a row where neither the spec nor the model's own modules say how many."""


class NoisySampler(StreamSampler):
    """A sampler on rows as a noisy device has them: (1 - noise) p + noise * uniform over the visible keys.

    That is what depolarising noise does to a row. Draws, and gradients through them, are those of such rows,
    as from a device whose noise nobody corrects: biased by O(noise).
    """

    unbiased = False

    def __init__(self, sampler: Sampler, noise: float):
        self.sampler, self.noise = sampler, noise
        self.name = sampler.name
        self.independent = sampler.independent
        self.joint = sampler.joint

    def draw_from(
        self,
        stream: Stream,
        logits: Tensor,
        num_samples: int,
        *,
        values: Tensor | None = None,
        replicates: int = 1,
    ) -> Draws:
        """Draw keys from the noisy rows: see `Sampler.draw_from`."""
        visible = logits > -torch.inf
        uniform = visible / visible.sum(-1, keepdim=True).clamp_min(1)
        p = logits.softmax(-1).nan_to_num(0.0)  # a row without visible keys has no probabilities
        mixed = ((1 - self.noise) * p + self.noise * uniform).log()
        return self.sampler.draw_from(stream, mixed, num_samples, values=values, replicates=replicates)


class Attention:
    """The attention of a model in training: the `attention=` of its forward, or the settings of its modules.

    One object serves a whole training; `drawing` sets how much is drawn in the forward passes inside it.

    Parameters
    ----------
    model : nn.Module
        A model whose forward takes `attention=` (see `qtx_lab.models.base.AttentionFn`), or that holds
        `torch.nn.MultiheadAttention` or `QuantumMultiheadAttention` modules; any other attends in its own
        way. Modules of torch's become `QuantumMultiheadAttention`, until `undo`.
    sampler : Sampler, optional
        Where None: what the model's own `QuantumMultiheadAttention` modules say, "systematic" for other
        attention.
    num_samples : int, optional
        Draws of a row; where None, those of the model's own modules, else `DEFAULT_NUM_SAMPLES`.
    control_variate : str, optional
        As for `sampled_attention`.
    drawn_heads : str, optional
        Layers and heads that draw, as `qtx_lab.specs.read_heads` takes them; the rest attends exactly. All
        where None.

    Attributes
    ----------
    draws : int
        Draws of a row with which training begins; 0 where nothing is drawn.
    how : str
        One sentence that says how the model attends.

    Raises
    ------
    ArgumentError
        If a sampler that draws is given and the model has no attention that could draw; if it has no such
        layers, or its modules are to draw some of their heads only.
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler | None = None,
        num_samples: int | None = None,
        control_variate: str | None = None,
        drawn_heads: str | None = None,
    ):
        self.drawn_heads = None if drawn_heads is None else read_heads(drawn_heads)
        self._num_layers = 0  # that forward passes have had
        self.takes_attention = "attention" in inspect.signature(model.forward).parameters
        self.settings: dict[str, Any] = {}
        """Arguments of `sampled_attention`, where the model's forward takes `attention=`."""
        self.layers: list[QuantumMultiheadAttention] = []
        self.layer_settings: list[dict[str, Any]] = []
        """What each of the layers draws with while it is trained."""
        self._undo: list[Any] = []
        own = [m for m in model.modules() if isinstance(m, QuantumMultiheadAttention)]
        of_torch = any(type(m) is nn.MultiheadAttention for m in model.modules())
        if sampler is None and (self.takes_attention or of_torch):
            sampler = make_sampler("systematic")
        self.sampler = sampler
        if self.takes_attention:
            self.settings = {"sampler": sampler, "control_variate": control_variate}
            exact = type(sampler) is ExactSampler
            self.how = (
                "attention is exact" if sampler is None or exact else f"attention draws by {sampler.name}"
            )
        elif own or of_torch:
            self._replace_settings(model, own, of_torch, control_variate)
            exact = all(type(settings["sampler"]) is ExactSampler for settings in self.layer_settings)
            if num_samples is None:  # the first module's number counts for all
                num_samples = self.layer_settings[0]["num_samples"]
        else:
            if sampler is not None and type(sampler) is not ExactSampler:
                raise ArgumentError(
                    f"sampler={sampler.name!r}: a {type(model).__name__} has no attention that could draw: "
                    "its forward takes no `attention`, and it has no torch.nn.MultiheadAttention. Leave "
                    "sampler out."
                )
            exact, self.how = True, "the model attends in its own way"
        if drawn_heads is not None and not exact:
            self._check_heads(drawn_heads)
            self.how += f", in {drawn_heads} only"
        self.draws = 0 if exact else num_samples or DEFAULT_NUM_SAMPLES

    def _replace_settings(
        self,
        model: nn.Module,
        own: list[QuantumMultiheadAttention],
        of_torch: bool,
        control_variate: str | None,
    ) -> None:
        """Note what the model's attention modules draw with, and how to give them back what they had."""
        for module in own:
            self._undo.append(partial(setattr, module, "settings", module.settings))
        if of_torch:
            self._undo.append(replace_attention(model, sampler=self.sampler).undo)
        self.layers = [m for m in model.modules() if isinstance(m, QuantumMultiheadAttention)]
        changes: dict[str, Any] = {} if self.sampler is None else {"sampler": self.sampler}
        if control_variate is not None:
            changes["control_variate"] = control_variate
        self.layer_settings = [{**layer.settings, **changes} for layer in self.layers]
        names = dict.fromkeys(settings["sampler"].name for settings in self.layer_settings)
        self.how = f"{len(self.layers)} attention modules draw by {', '.join(names)}"

    def _check_heads(self, text: str) -> None:
        """Refuse heads that modules cannot draw by themselves; the model's forward refuses others."""
        assert self.drawn_heads is not None
        if self.takes_attention:
            return
        parts = [layer for layer, heads in self.drawn_heads.items() if heads is not None]
        if parts or max(self.drawn_heads) >= len(self.layers):
            raise ArgumentError(
                f"drawn_heads={text!r} is not allowed: this model has the layers 0 to "
                f"{len(self.layers) - 1}, modules of which each draws all of its heads or none."
            )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = None if self.drawn_heads is None else self.drawn_heads.get(layer, frozenset())
        self._num_layers = max(self._num_layers, layer + 1)
        if heads and max(heads) >= q.shape[-3]:
            raise ArgumentError(
                f"drawn_heads names head {max(heads)} of layer {layer}, which has the heads 0 to "
                f"{q.shape[-3] - 1}."
            )
        if not self.settings.get("num_samples") or (heads is not None and not heads):
            return causal_sdpa(layer, q, k, v)
        device = q.device.type
        if torch.is_autocast_enabled(device):  # as autocast does for SDPA: rotated q and k are float32 there
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        drawn = sampled_attention(q, k, v, is_causal=True, enable_gqa=True, **self.settings).output
        if heads is None:
            return drawn
        is_drawn = torch.zeros(q.shape[-3], dtype=torch.bool, device=q.device)  # (H,)
        is_drawn[sorted(heads)] = True
        return torch.where(is_drawn[:, None, None], drawn, causal_sdpa(layer, q, k, v))

    def check_layers(self) -> None:
        """Refuse heads to be drawn of layers that no forward pass has had so far.

        Raises
        ------
        ArgumentError
            If there are some.
        """
        last = max(self.drawn_heads or (0,))
        if self.takes_attention and last >= self._num_layers > 0:
            raise ArgumentError(
                f"drawn_heads names layer {last}; the model has the layers 0 to {self._num_layers - 1}."
            )

    def undo(self) -> None:
        """Give the model's modules back what they had."""
        for restore in self._undo:
            restore()

    @contextmanager
    def drawing(
        self, draws: int, noise: float = 0.0, generator: torch.Generator | None = None
    ) -> Iterator[None]:
        """Let forward passes in the block draw so many keys a row from this generator; 0: attend exactly."""
        self._set(draws, noise, generator)
        try:
            yield
        finally:
            self._set(0, 0.0, None)

    def _set(self, draws: int, noise: float, generator: torch.Generator | None) -> None:
        if self.takes_attention and self.sampler is not None:
            sampler = NoisySampler(self.sampler, noise) if noise and draws else self.sampler
            self.settings |= {"sampler": sampler, "num_samples": draws, "generator": generator}
        for i, (layer, settings) in enumerate(zip(self.layers, self.layer_settings, strict=True)):
            if draws == 0 or (self.drawn_heads is not None and i not in self.drawn_heads):
                exactly = {"sampler": ExactSampler(), "num_samples": 1, "control_variate": None}
                layer.settings = {**settings, **exactly}
            else:
                sampler = NoisySampler(settings["sampler"], noise) if noise else settings["sampler"]
                drawn = {"sampler": sampler, "num_samples": draws, "generator": generator}
                layer.settings = {**settings, **drawn}

    def forward(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T), of the model itself or of its wrapper."""
        output = module(tokens, attention=self) if self.takes_attention else module(tokens)
        return getattr(output, "logits", output)  # models of transformers return an object
