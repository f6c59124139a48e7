"""Small configs of the causal, masked and encoder-decoder model classes of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""What transformers calls its model classes, by what they predict."""

MAX_PARAMETERS = 12_000_000
"""A model with more is not small."""

NAMES = {
    0: "pad_token_id",
    1: """bos_token_id n_shared_experts n_group topk_group first_k_dense_replace num_dense_layers
        num_codebooks""",
    2: """num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth num_self_attends_per_block num_key_value_heads num_kv_heads kv_n_heads
        linear_num_key_heads linear_num_value_heads index_n_heads indexer_n_heads num_experts_per_tok moe_k
        moe_topk zero_expert_num eos_token_id decoder_start_token_id""",
    4: """num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts index_topk laurel_rank
        patch_size""",
    8: """head_dim d_kv d_head dim_head attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim
        linear_key_head_dim linear_head_dim rotary_dim global_head_dim num_latents sliding_window
        attention_chunk_size local_attention window_size attention_window_size mamba_n_heads n_mamba_heads
        mamba_d_state mamba_chunk_size image_size hidden_size_per_layer_input""",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size kv_lora_rank
        q_lora_rank index_head_dim""",
    32: """hidden_size d_model n_embd embed_dim emb_dim dim embedding_size d_embed word_embed_proj_dim
        intermediate_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size d_inner dim_ff
        hidden_size_global linear_value_head_dim out_hidden_size projection_dim lru_width entity_emb_size
        backbone_hidden_size d_latents""",
    64: """vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input entity_vocab_size
        shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab""",
    128: "max_position_embeddings n_positions max_target_positions max_source_positions max_seq_len",
}
SIZES: dict[str, Any] = {name: size for size, names in NAMES.items() for name in names.split()}
"""Sizes by their names in configs."""

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
GEMMA = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
CHANGES: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": LINEAR | {"num_key_value_heads": 4},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "EsmcForMaskedLM": {"num_key_value_heads": 4},
    "FunnelForMaskedLM": {"block_sizes": [1, 1]},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nForCausalLM": GEMMA | {"activation_sparsity_pattern": None},
    "Gemma4ForCausalLM": GEMMA,
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": LINEAR,
    "Lfm2ForCausalLM": CONVOLUTION,
    "Lfm2MoeForCausalLM": CONVOLUTION,
    "Lfm3ForCausalLM": {"layer_types": ["conv", "sliding_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "n_groups": 1, "state_size": 8},
    "NeoMMEForMaskedLM": {"head_dim": 16},
    "Qwen3NextForCausalLM": LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5MoeForCausalLM": LINEAR,
    "Qwen4ExpForCausalLM": LINEAR
    | {"indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "ReformerForMaskedLM": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "is_decoder": True,
    },
    "XmodForCausalLM": {"default_language": "en_XX"},
    "XmodForMaskedLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "ZambaForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}
"""What the configs of some model classes need besides."""


def small_config(kind: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A config of some kind with small sizes, but for the `changes`."""
    return kind(**{**_sizes(kind), **changes})


def _sizes(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    names = {*inspect.signature(kind.__init__).parameters, *kind.__annotations__}
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        sizes["num_key_value_heads"] = 4
    for name, part in kind.sub_configs_defaults.items():
        part_kind = part.config_class
        if part_kind is AutoConfig:
            part_kind = CONFIG_MAPPING[part.model_type]
        sizes[name] = _sizes(part_kind)
        if part.config_class is AutoConfig:
            sizes[name]["model_type"] = part.model_type
    return sizes


def model_classes(kind: str) -> list[type[PreTrainedModel]]:
    """The model classes of a kind, a key of `KINDS`, in the order of their names."""
    names = set()
    for name in KINDS[kind].values():
        names |= {name} if isinstance(name, str) else set(name)
    return [getattr(transformers, name) for name in sorted(names)]


def config_of(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """A small config of a model class."""
    kind: Any = cls.config_class
    return small_config(kind, **CHANGES.get(cls.__name__, {}))
