"""`SampledCache`: a cache for transformers' generation that attends to a `SampledKVCache` a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import Cache, DynamicLayer

from ..cache import SampledKVCache
from ..errors import ArgumentError, ShapeError
from .huggingface_settings import IMPLEMENTATION, given_settings, read_settings

PLACEHOLDERS = WeakIdKeyDictionary()
"""The `SampledLayer` whose keys a tensor stands for, of each such tensor that is alive."""


class SampledCache(Cache):
    """A cache to generate with: a new token reads a sketch of the keys, and then few keys and values.

    The prompt is attended to by `sampled_attention`. Layers that the settings make `exact` have transformers'
    own cache. One sequence, or several of equal length: no padding, no beams, no sliding windows.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Of the (text) model, whose `attn_implementation` is "qtx_sampled".
    proposal, rank, defensive
        As for `SampledKVCache.build`.

    Raises
    ------
    ArgumentError
        If the config has another attention, or layers that do not attend to all tokens before them.

    Examples
    --------
    >>> import torch, transformers
    >>> from qtx_lab import huggingface
    >>> huggingface.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="qtx_sampled")
    >>> model = transformers.AutoModelForCausalLM.from_config(config)
    >>> cache = SampledCache(model.config, proposal="low-rank", rank=2)
    >>> four = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    >>> model.generate(torch.arange(12)[None], past_key_values=cache, **four).shape
    torch.Size([1, 16])
    """

    def __init__(self, config: Any, **options: Any):
        given = getattr(config, "_attn_implementation", None)
        if given != IMPLEMENTATION:
            raise ArgumentError(
                f"config has attn_implementation={given!r}; a SampledCache is for models with "
                f"{IMPLEMENTATION!r}."
            )
        number = config.num_hidden_layers
        window = ("sliding_attention",) if getattr(config, "sliding_window", None) else ()
        kinds = set(getattr(config, "layer_types", None) or window) - {"full_attention"}
        if kinds:
            raise ArgumentError(
                f"config has layers of {', '.join(sorted(kinds))}; a SampledCache is for full attention only."
            )
        settings = read_settings(given_settings(config), number)
        exact = [settings.get(i, settings[None])["sampler"].exact for i in range(number)]
        features = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        probe = torch.zeros(1, features)
        SampledKVCache.build(probe, probe, **options)  # a mistake in the options is refused now
        super().__init__(layers=[DynamicLayer() if whole else SampledLayer(options) for whole in exact])


class SampledLayer(DynamicLayer):
    """One layer of a `SampledCache`, whose tokens are in `sampled`.

    Parameters
    ----------
    options : dict
        Arguments of `SampledKVCache.build`.
    """

    is_croppable = False

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self.sampled: SampledKVCache | None = None
        """The tokens; None before the first."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens, and return what has the shape of all keys and values.

        For one new token that is all they have: they are NaN, and attention reads the cache instead.
        """
        if self.sampled is None:
            self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
            self.sampled = SampledKVCache.build(key_states, value_states, **self.options)
            return key_states, value_states
        self.sampled.append(key_states, value_states)
        if key_states.shape[-2] > 1:
            return self.sampled.tokens()
        # NaN, so that whoever else reads them cannot miss it.
        shape = (*key_states.shape[:-2], len(self.sampled))
        k, v = (x.new_full((), torch.nan).expand(*shape, x.shape[-1]) for x in (key_states, value_states))
        PLACEHOLDERS[k] = self
        return k, v

    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float | None, settings: dict[str, Any]
    ) -> Tensor:
        """The output (B, 1, H, Ev) for one new token, query (B, H, 1, E).

        Raises
        ------
        ShapeError
            If the mask hides tokens.
        """
        assert self.sampled is not None
        visible = None if mask is None else (mask if mask.dtype == torch.bool else mask >= 0)
        if visible is not None and not bool(visible.all()):
            raise ShapeError(
                "A SampledCache attends to every token, but the mask hides some (padding, or a window)."
            )
        estimate = self.sampled.attend(
            query,
            settings["num_samples"],
            replicates=settings["replicates"],
            scale=scaling,
            generator=settings["generator"],
        )
        return estimate.output.transpose(1, 2).contiguous()

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if self.sampled is None else len(self.sampled)

    def reset(self) -> None:
        """Forget all tokens."""
        self.sampled, self.is_initialized = None, False

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise ArgumentError(
            "A SampledCache cannot be reordered, cropped or moved: no beams, no assistants, no offloading."
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = _refuse
