"""Draws in Hugging Face models that compute attention on their own: a softmax gives the weights of draws."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..attention.dispatch import attend
from ..attention.settings import AttentionSettings
from ..errors import ArgumentError
from ..problem import AttentionProblem
from .huggingface_settings import CACHE_SETTINGS, refuse_cache_settings, refuse_recomputing, settings_of

SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax}
"""The functions by which models turn logits into weights."""

_STATES: WeakKeyDictionary[nn.Module, ModuleState] = WeakKeyDictionary()
"""The state of each attention module that draws by itself."""


class _Uncompiled:
    """Keeps torch from compiling while some thread is in it: the stance is one for all threads.

    Compiled code would not ask for a function's meaning when it runs.
    """

    def __init__(self) -> None:
        self._lock, self._entered = threading.Lock(), 0
        self._stance: Any = None

    def enter(self) -> None:
        """Compile nothing, from the first that enters on."""
        with self._lock:
            if not self._entered:
                self._stance = torch.compiler.set_stance("force_eager")
            self._entered += 1

    def leave(self) -> None:
        """Compile again as before, once the last one has left."""
        with self._lock:
            self._entered -= 1
            if not self._entered:
                self._stance.__exit__(None, None, None)


_UNCOMPILED = _Uncompiled()


class DrawnSoftmax(TorchFunctionMode):
    """While it is entered, a softmax over the last dimension gives the estimated weights of drawn keys.

    Their mean is the softmax: a product with the values is sampled attention, whatever the model added to the
    logits. It saves no time, and samplers that lay out keys by their values do not see these.

    Parameters
    ----------
    settings : dict
        The arguments of `sampled_attention`, and `generator`.
    is_running : callable
        Whether what draws is still running. torch calls no hook after Ctrl-C, so that the mode may be left
        entered: a softmax is torch's own then.
    """

    def __init__(self, settings: dict[str, Any], is_running: Callable[[], bool] = lambda: True):
        super().__init__()
        self._is_running = is_running
        self.generator = settings["generator"]
        others = ("generator", *CACHE_SETTINGS)
        self.settings = AttentionSettings.of(**{k: x for k, x in settings.items() if k not in others})
        self.has_drawn = False

    def __enter__(self) -> DrawnSoftmax:
        """Enter the mode; what follows is not compiled."""
        _UNCOMPILED.enter()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the mode, so that softmax is torch's again."""
        super().__exit__(*error)
        _UNCOMPILED.leave()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any of torch's functions but a softmax over the last dimension is as it was."""
        kwargs = kwargs or {}
        if func not in SOFTMAXES:
            return func(*args, **kwargs)
        logits = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if logits.ndim < 2 or dim not in (-1, logits.ndim - 1) or not self._is_running():
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
    calls : dict
        Those that are under way, by the number of their thread.
    """

    config: Any
    number: int
    calls: dict[int, DrawnSoftmax] = field(default_factory=dict)


def draw_by_softmax(model: nn.Module) -> None:
    """Have the attention modules of a model of transformers draw, from its next call on."""
    if not draws_by_softmax(model):
        model.register_forward_pre_hook(_prepare)


def draws_by_softmax(model: nn.Module) -> bool:
    """Whether `draw_by_softmax` was called for this model, or the one that it is a copy of."""
    return _prepare in model._forward_pre_hooks.values()


def stop_drawing(model: nn.Module) -> None:
    """Have a model compute its softmax exactly again, and all models that are parts of it."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_prepare, _enter, _leave)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        _STATES.pop(module, None)


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
    interrupted = state.calls.pop(threading.get_ident(), None)
    if interrupted is not None:
        _leave_interrupted(interrupted)
    if not settings["sampler"].exact:
        refuse_cache_settings(settings)
        refuse_recomputing(settings)
        call = DrawnSoftmax(settings, lambda: _is_running(module))
        state.calls[threading.get_ident()] = call.__enter__()


@torch.compiler.disable
def _is_running(module: nn.Module) -> bool:
    """Whether this thread is in a call of a module."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _leave_interrupted(call: DrawnSoftmax) -> None:
    """Leave the mode of a call that Ctrl-C ended."""
    if _get_current_function_mode() is call:
        call.__exit__(None, None, None)
    else:  # below another mode, where it changes nothing
        _UNCOMPILED.leave()


@torch.compiler.disable
def _leave(module: nn.Module, args: Any, output: Any) -> None:
    call = _STATES[module].calls.pop(threading.get_ident(), None)
    if call is None:
        return
    call.__exit__(None, None, None)
    if output is not None and not call.has_drawn:  # None: an error is on its way
        raise ArgumentError(
            f"{type(module).__name__} computes no softmax over keys: it draws none. Make its layers "
            '{"sampler": "exact"}.'
        )
