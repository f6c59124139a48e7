"""`LosslessGeneration`: transformers' `generate` by drafts of a `SampledCache` and exact passes over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from ..cache import SampledKVCache
from ..checks import check_count
from ..errors import ArgumentError
from ..estimates import AttentionEstimate
from .huggingface_cache import SampledCache
from .huggingface_layer import SampledLayer
from .speculative import (
    Draft,
    DraftLength,
    LosslessReport,
    PassCounts,
    layers_with_error_bars,
    most_drafts,
    share_read,
    speculate,
    squared_error,
    token_probabilities,
)


class LosslessGeneration:
    """Give it to `model.generate(..., custom_generate=)` with a `SampledCache`: the text loses nothing.

    The cache's draws, as `config.qtx_sampled` says, draft tokens, and exact passes over it accept or replace
    them, so that the tokens have the distribution that they have by exact attention; without `do_sample`
    they are the same tokens. Logits processors, warpers and stopping criteria are those of the call, for
    drafts and exact passes alike; a processor may depend on the tokens before and on nothing else. Prompts
    attend exactly. transformers hands no `streamer` on to a custom generation.

    Parameters
    ----------
    max_drafts : int, optional
        Tokens that are drafted at most before an exact pass; as many as one pass can verify with keys and
        values read once where None.

    Raises
    ------
    ArgumentError
        From `generate`, before any token: without a SampledCache, with several sequences, beams, padding, a
        cache that is not empty, draws in prompts (`prefill="sampled"`) or layers that cannot be cropped.

    Examples
    --------
    >>> import torch, transformers
    >>> from qtx_lab import huggingface
    >>> huggingface.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="qtx_sampled")
    >>> model = transformers.AutoModelForCausalLM.from_config(config).eval()
    >>> cache = huggingface.SampledCache(model.config, rank=2)
    >>> lossless = LosslessGeneration()
    >>> options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "custom_generate": lossless}
    >>> model.generate(torch.arange(12)[None], past_key_values=cache, **options).shape
    torch.Size([1, 18])
    >>> lossless.report.tokens
    5
    """

    def __init__(self, max_drafts: int | None = None):
        self.max_drafts = None if max_drafts is None else check_count("max_drafts", max_drafts)
        self._counts = PassCounts()

    @property
    def report(self) -> LosslessReport:
        """What the last text took: acceptance by position, bytes read, time."""
        return self._counts.report()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """What `model.generate` returns: the prompt and the new tokens, int64, (1, L)."""
        cache = _checked_cache(input_ids, generation_config, model_kwargs)
        config = model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        most = most_drafts(heads // (config.to_dict().get("num_key_value_heads") or heads))
        if self.max_drafts is not None and self.max_drafts > most:
            raise ArgumentError(
                f"max_drafts={self.max_drafts} is not allowed: an exact pass of this model verifies up to "
                f"{most} drafts with keys and values read once."
            )
        sampling = bool(generation_config.do_sample)

        def probabilities(text: Sequence[int], logits: Tensor) -> Tensor:
            ids: Any = torch.tensor([text], device=input_ids.device)
            scores = logits_processor(ids, logits[None].float())[0]
            return token_probabilities(scores, 1.0 if sampling else 0.0)

        temperature = float(generation_config.temperature or 1.0) if sampling else 0.0
        self._counts = PassCounts()
        drafter = _CacheDrafter(model, cache, input_ids)
        new = speculate(
            drafter,
            max(1, generation_config.max_length - input_ids.shape[1]),
            probabilities,
            DraftLength(most if self.max_drafts is None else self.max_drafts, temperature),
            self._counts,
            context=input_ids[0].tolist(),
        )
        try:
            for token in new:
                input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), 1)
                if bool(stopping_criteria(input_ids, None).all()):
                    break
        finally:
            drafter.leave(input_ids.shape[1] - 1)
        return input_ids


def _checked_cache(ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> SampledCache:
    """The cache of the call; refuses what would not be lossless, or is not done."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if not isinstance(cache, SampledCache):
        raise ArgumentError(
            f"past_key_values={type(cache).__name__} is not allowed: LosslessGeneration drafts with a "
            "SampledCache(model.config)."
        )
    if cache.prefill != "exact":
        raise ArgumentError('prefill="sampled" is not allowed: the prompt must attend exactly.')
    if cache.get_seq_length():
        raise ArgumentError(
            f"past_key_values has {cache.get_seq_length()} tokens; LosslessGeneration starts from an empty "
            "cache."
        )
    if len(ids) != 1 or config.num_beams not in (None, 1) or config.num_return_sequences not in (None, 1):
        raise ArgumentError("LosslessGeneration is for a single sequence, without beams.")
    if mask is not None and not bool(mask.all()):
        raise ArgumentError(
            "attention_mask hides tokens: LosslessGeneration is for a prompt without padding."
        )
    for name, nothing in (("guidance_scale", 1), ("penalty_alpha", 0), ("dola_layers", None)):
        given = config.to_dict().get(name)
        if given is not None and given != nothing:
            raise ArgumentError(
                f"{name}={given!r} is not allowed: LosslessGeneration takes what the model's own logits say "
                "of the tokens before."
            )
    if config.return_dict_in_generate:
        raise ArgumentError("return_dict_in_generate=True is not allowed: LosslessGeneration gives tokens.")
    other = {type(x).__name__ for x in cache.layers if type(x) not in (SampledLayer, DynamicLayer)}
    if other:
        raise ArgumentError(
            f"The model's cache has layers ({', '.join(sorted(other))}) that cannot forget drafts: use the "
            "model without LosslessGeneration."
        )
    return cache


class _CacheDrafter:
    """A model of transformers after a prompt: see `speculative.Drafter`."""

    def __init__(self, model: PreTrainedModel, cache: SampledCache, ids: Tensor):
        self.model, self.cache = model, cache
        self._sampled = [x for x in cache.layers if isinstance(x, SampledLayer)]
        self._exact_layers = len(cache.layers) - len(self._sampled)
        self._with_bars = layers_with_error_bars(len(self._sampled))
        self._drafts, self._sampled_reads, self._verified = 0, 0.0, 0
        self._errors: list[float] = []
        for i, layer in enumerate(self._sampled):
            layer.verifies, layer.observer = True, self._observer(i in self._with_bars)
        try:
            self.logits = self._forward(ids)[-1]
        except BaseException:
            self.leave(0)
            raise
        self.length = ids.shape[1]

    def _observer(self, with_bars: bool) -> Any:
        def observe(cache: SampledKVCache, estimate: AttentionEstimate) -> None:
            k, v = cache.features
            self._sampled_reads += share_read(cache, estimate, k, v)
            if with_bars:
                self._errors.append(squared_error(estimate))

        return observe

    @property
    def draft_reads(self) -> float:
        """See `Drafter.draft_reads`; layers that the settings make exact read all."""
        return (self._sampled_reads + self._exact_layers * self._drafts) / len(self.cache.layers)

    def draft(self, token: int) -> Draft:
        """See `Drafter.draft`."""
        self._errors, self._drafts = [], self._drafts + 1
        self._let_verify(False)
        logits = self._forward(torch.tensor([[token]]))[-1]
        return Draft(logits, math.sqrt(sum(self._errors) / len(self._errors)) if self._errors else 0.0)

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """See `Drafter.verify`."""
        self._crop(self.length)
        self._let_verify(True)
        self._verified = len(tokens)
        return self._forward(torch.tensor([list(tokens)]))

    def keep(self, count: int) -> None:
        """See `Drafter.keep`."""
        self.length += count
        self._crop(self.length)

    def leave(self, length: int) -> None:
        """Leave the cache with so many tokens, as one that draws again."""
        self._crop(length)
        self._let_verify(False)
        for layer in self._sampled:
            layer.observer = None

    def _crop(self, length: int) -> None:
        if self.cache.get_seq_length() > length:
            self.cache.crop(length - self.cache.get_seq_length())

    def _let_verify(self, verifies: bool) -> None:
        for layer in self._sampled:
            layer.verifies = verifies

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits (T, V) after each of the tokens (1, T), or after the last one of a prompt."""
        with torch.no_grad():
            keep = 0 if self.cache.get_seq_length() else 1
            return self.model(
                ids.to(self.model.device), past_key_values=self.cache, use_cache=True, logits_to_keep=keep
            ).logits[0]
