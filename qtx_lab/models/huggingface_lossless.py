"""`LosslessGeneration`: transformers' `generate` by drafts of a `SampledCache` and exact passes over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

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

OTHER_METHODS: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "return_dict_in_generate": (False,),
}
"""Fields of a generation's config that ask for another method, and the values, beside None, that do not."""

READ_KWARGS = ("past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep")
"""What `generate` hands on and LosslessGeneration takes account of."""


class LosslessGeneration:
    """Give it to `model.generate(..., custom_generate=)` with a `SampledCache`: the text loses nothing.

    The cache's draws, as `config.qtx_sampled` says, draft tokens, and exact passes over it accept or replace
    them, so that the tokens have the distribution that they have by exact attention; without `do_sample`
    they are the same tokens. Logits processors, warpers and stopping criteria are those of the call, for
    drafts and exact passes alike; a processor may depend on the tokens before and on nothing else. Prompts
    attend exactly. transformers hands neither the `streamer` nor the `assistant_model` of `generate` on to a
    custom generation: a streamer is an argument here, and `generate_lossless` takes it as `generate` does.

    Parameters
    ----------
    max_drafts : int, optional
        Tokens that are drafted at most before an exact pass; as many as one pass can verify with keys and
        values read once where None.
    streamer : transformers.BaseStreamer, optional
        Is given the prompt and then the tokens, those of an exact pass one after the other.

    Raises
    ------
    ArgumentError
        From `generate`, before any token: without a SampledCache, with several sequences, beams, padding,
        embeddings or positions in place of plain tokens, another method of generation, a cache that is not
        empty, draws in prompts (`prefill="sampled"`) or layers that cannot be cropped.

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

    def __init__(self, max_drafts: int | None = None, streamer: BaseStreamer | None = None):
        self.max_drafts = None if max_drafts is None else check_count("max_drafts", max_drafts)
        if streamer is not None and not isinstance(streamer, BaseStreamer):
            raise ArgumentError(
                f"streamer={streamer!r} is not allowed: it must be a transformers BaseStreamer, or None."
            )
        self.streamer = streamer
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
            scores: Any = logits[None].float().to(ids.device)  # where the processors' own tensors are
            return token_probabilities(logits_processor(ids, scores)[0].cpu(), 1.0 if sampling else 0.0)

        temperature = float(generation_config.temperature or 1.0) if sampling else 0.0
        self._counts = PassCounts()
        self._stream(input_ids)
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
                self._stream(input_ids[:, -1])
                if bool(stopping_criteria(input_ids, None).all()):
                    break
        finally:
            drafter.leave(input_ids.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        return input_ids

    def _stream(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


def generate_lossless(
    *args: Any,
    model: PreTrainedModel,
    proposal: str | None = None,
    rank: int | None = None,
    max_drafts: int | None = None,
    past_key_values: SampledCache | None = None,
    streamer: BaseStreamer | None = None,
    assistant_model: PreTrainedModel | None = None,
    **options: Any,
) -> Tensor:
    """`model.generate` by `LosslessGeneration`, to be called or built into a model's folder.

    A folder's `custom_generate/generate.py` needs two lines:

        from qtx_lab import huggingface
        generate = huggingface.generate_lossless

    Then `model.generate(ids, custom_generate="the/folder", trust_remote_code=True)` is lossless, and so is
    `model.generate(ids)` of a model from `from_pretrained("the/folder", trust_remote_code=True,
    attn_implementation="qtx_sampled")`.

    Parameters
    ----------
    *args, **options
        Those of `transformers.GenerationMixin.generate`, by position or by name.
    model : transformers.PreTrainedModel
    proposal, rank : str, int, optional
        Of a new `SampledCache`, where `past_key_values` is None.
    max_drafts, streamer : optional
        As for `LosslessGeneration`.
    past_key_values : SampledCache, optional
        An empty one.
    assistant_model : None
        Is refused: the cache drafts.

    Returns
    -------
    Tensor, int64, (1, L)
        The prompt and the new tokens.

    Raises
    ------
    ArgumentError
        Before any token: as `SampledCache` and `LosslessGeneration`.

    Examples
    --------
    >>> import torch, transformers
    >>> from qtx_lab import huggingface
    >>> huggingface.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, attn_implementation="qtx_sampled")
    >>> model = transformers.AutoModelForCausalLM.from_config(config).eval()
    >>> options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    >>> generate_lossless(torch.arange(12)[None], model=model, rank=2, **options).shape
    torch.Size([1, 15])
    """
    if assistant_model is not None:
        raise ArgumentError(
            f"assistant_model={type(assistant_model).__name__} is not allowed: the model's own SampledCache "
            "drafts."
        )
    if past_key_values is None:
        past_key_values = SampledCache(model.config, proposal, rank)
    else:
        for name, given in (("proposal", proposal), ("rank", rank)):
            if given is not None:
                raise ArgumentError(
                    f"{name}={given!r} is not allowed beside past_key_values, which has its own."
                )
    kind: Any = type(model)  # whose method it is: `model.generate` may be this function
    tokens: Tensor = kind.generate(
        model,
        *args,
        past_key_values=past_key_values,
        custom_generate=LosslessGeneration(max_drafts, streamer),
        **options,
    )
    return tokens


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
    settings = config.to_dict()
    for name, usual in OTHER_METHODS.items():
        value = settings.get(name)
        if value is not None and value not in usual:
            raise ArgumentError(
                f"{name}={value!r} is not allowed: LosslessGeneration gives the tokens of one sequence, by "
                "what the model's own logits say after those before."
            )
    if len(ids) != 1:
        raise ArgumentError(
            f"inputs has {len(ids)} sequences: LosslessGeneration is for a single sequence. Call generate "
            "for each, with a SampledCache of its own."
        )
    for name, value in kwargs.items():
        if name not in READ_KWARGS and value is not None and value is not False:
            raise ArgumentError(
                f"{name} is not allowed: LosslessGeneration reads tokens (inputs) and nothing else."
            )
    if not ids.shape[1]:
        raise ArgumentError("inputs has no tokens: LosslessGeneration needs a prompt.")
    if mask is not None and not bool(mask.all()):
        raise ArgumentError(
            "attention_mask hides tokens: LosslessGeneration is for a prompt without padding."
        )
    positions = kwargs.get("position_ids")
    if positions is not None and not bool(
        (positions == torch.arange(ids.shape[1], device=positions.device)).all()
    ):
        raise ArgumentError(
            f"position_ids is not allowed but as 0 to {ids.shape[1] - 1}: LosslessGeneration counts tokens."
        )
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
