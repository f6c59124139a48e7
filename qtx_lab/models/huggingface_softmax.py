"""Draws in Hugging Face models that compute attention on their own: a softmax gives the weights of draws."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.dispatch import attend
from ..attention.settings import AttentionSettings
from ..errors import ArgumentError
from ..problem import AttentionProblem
from .huggingface_settings import CACHE_SETTINGS, refuse_cache_settings, refuse_recomputing, settings_of

SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
"""The functions by which models turn logits into weights."""

_STATES: WeakKeyDictionary[nn.Module, ModuleState] = WeakKeyDictionary()
"""The state of each attention module that draws by itself."""


class DrawnSoftmax(TorchFunctionMode):
    """While it is entered, a softmax over the last dimension gives the estimated weights of drawn keys.

    Their mean is the softmax: a product with the values is sampled attention, whatever the model added to the
    logits. It saves no time, and samplers that lay out keys by their values do not see these.

    Parameters
    ----------
    settings : dict
        The arguments of `sampled_attention`, and `generator`.
    """

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.generator = settings["generator"]
        others = ("generator", *CACHE_SETTINGS)
        self.settings = AttentionSettings.of(**{k: x for k, x in settings.items() if k not in others})
        self.has_drawn = False

    def __enter__(self) -> DrawnSoftmax:
        """Compiled code would not ask for a function's meaning when it runs: what follows is not compiled."""
        self._uncompiled = torch.compiler.set_stance("force_eager")
        self._uncompiled.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode, so that softmax is torch's again."""
        super().__exit__(*error)
        self._uncompiled.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any of torch's functions but a softmax over the last dimension is as it was."""
        kwargs = kwargs or {}
        if func not in SOFTMAXES:
            return func(*args, **kwargs)
        logits = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if logits.ndim < 2 or dim not in (-1, logits.ndim - 1):
            return func(*args, **kwargs)
        self.has_drawn = True
        return self.weights(logits).to(kwargs.get("dtype") or logits.dtype)

    def weights(self, logits: Tensor) -> Tensor:
        """The estimated softmax of logits (..., L, n)."""
        n = logits.shape[-1]
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        # The average of unit vectors is that of the weights, and has their gradient.
        v = torch.eye(n, device=logits.device) if needs_grad else torch.zeros(n, 1, device=logits.device)
        q, k = logits.new_zeros(*logits.shape[:-1], 1), logits.new_zeros(*logits.shape[:-2], n, 1)
        v = v.to(logits.dtype).expand(*logits.shape[:-2], *v.shape)
        problem = AttentionProblem.of(q.detach(), k.detach(), v, attn_mask=logits)
        estimate = attend(problem, self.settings, self.generator)
        return estimate.output if needs_grad else estimate.attention_weights()


@dataclass
class ModuleState:
    """An attention module of a model.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the model.
    number : int
        The module's, in the model.
    calls : list of DrawnSoftmax
        Those that are under way.
    """

    config: Any
    number: int
    calls: list[DrawnSoftmax] = field(default_factory=list)


def draw_by_softmax(model: nn.Module) -> None:
    """Have the attention modules of a model of transformers draw, from its next call on."""
    model.register_forward_pre_hook(_prepare)


@torch.compiler.disable
def _prepare(model: nn.Module, args: Any) -> None:
    """Before a model's forward: its attention modules may be new ones, in a copy."""
    for number, module in enumerate(_attention_modules(model)):
        if module not in _STATES:
            _STATES[module] = ModuleState(model.config, number)
        if _enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_enter)
            module.register_forward_hook(_leave, always_call=True)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that have none in them.

    Raises
    ------
    ArgumentError
        If there are none.
    """
    named = [module for module in model.modules() if re.search("Attention|Attn", type(module).__name__)]
    inner = [m for m in named if not any(other is not m and other in named for other in m.modules())]
    if not inner:
        raise ArgumentError(f"{type(model).__name__} has no attention modules, in which keys could be drawn.")
    return inner


@torch.compiler.disable
def _enter(module: nn.Module, args: Any) -> None:
    state = _STATES[module]
    settings = settings_of(module, state.config, state.number)
    if not settings["sampler"].exact:
        refuse_cache_settings(settings)
        refuse_recomputing(settings)
        state.calls.append(DrawnSoftmax(settings))
        state.calls[-1].__enter__()


@torch.compiler.disable
def _leave(module: nn.Module, args: Any, output: Any) -> None:
    state = _STATES[module]
    if not state.calls:
        return
    call = state.calls.pop()
    call.__exit__(None, None, None)
    if output is not None and not call.has_drawn:  # None: an error is on its way
        raise ArgumentError(
            f"{type(module).__name__} computes no softmax over keys: it draws none. Make its layers "
            '{"sampler": "exact"}.'
        )
