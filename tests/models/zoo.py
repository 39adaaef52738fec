"""A tiny random model of every causal architecture that transformers can build from a configuration.

`build(name)` makes a model. `NAMES` are the keys of `AutoModelForCausalLM`'s mapping and, after a comma, further
configurations of some of them. `_SHARED` has one small value for the fields of one kind, which have many names. `_OWN`
has what else a configuration needs. Windows, chunks and sparse selections are shorter than the sequences, and weights
are large, so that mistakes show. `NOT_BUILT` gives the reason for each architecture that is missing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
_SHARED = {
    VOCABULARY: ["vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "ngram_vocab_size_base"],
    # hidden sizes
    32: [
        *["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "backbone_hidden_size"],
        *["word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "hidden_size_global"],
        *["out_hidden_size", "adapter_in_dim", "adapter_input_size", "adapter_out_dim", "nd_input_size"],
    ],
    # sizes of feed-forward layers
    48: [
        *["intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff", "dim_ff"],
        *["feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"],
        *["prefix_dense_intermediate_size", "shared_intermediate_size"],
    ],
    16: [
        *["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "router_hidden_size"],
        *["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "patch_size"],
        *["q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim", "d_rel", "gated_norm_rank", "index_n_heads"],
    ],
    # layers
    2: [
        *["num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers", "depth"],
        *["num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack"],
        # keys' heads, experts that a token goes to, and others
        *["num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"],
        *["swa_num_key_value_heads", "linear_num_key_heads", "eos_token_id", "type_vocab_size", "hc_mult", "hc_count"],
        *["num_codebooks", "spatial_merge_size"],
    ],
    # heads, experts
    4: [
        *["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"],
        *["num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "num_heads"],
        *["swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"],
        *["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"],
        *["index_topk", "keep_window_size", "rotary_dim", "hc_lowrank", "laurel_rank"],
    ],
    # sizes of heads and states; windows and chunks
    8: [
        *["head_dim", "swa_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "global_head_dim"],
        *["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "kv_channels", "dim_head"],
        *["attention_head_size", "mamba_head_dim", "mamba_num_heads", "mamba_n_heads", "mamba_d_head", "mamba_d_state"],
        *["state_size", "ssm_state_size", "query_pre_attn_scalar", "hidden_size_per_layer_input"],
        *["sliding_window", "window_size", "attention_window_size", "sliding_window_size", "local_attention"],
        *["attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size", "floor_scale", "rel_extent"],
        *["local_attention_window_len", "log_scaling_n_floor", "adapter_rank"],
    ],
    1: [
        *["n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "bos_token_id"],
        *["mamba_n_groups", "n_groups", "first_k_dense_replace", "num_dense_layers"],
    ],
    128: ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"],
    0.2: ["initializer_range", "init_std", "embed_init_std"],
    0: ["pad_token_id"],
}
_SIZES = {name: value for value, names in _SHARED.items() for name in names} | {"is_decoder": True}  # encoders

_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_HYBRID = {"layer_types": ["hybrid_sliding", "hybrid"]}
_MLA = {"num_key_value_heads": 4}  # keys and values of every head are made of one latent vector
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_CHUNKS = {"attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]}
_QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA | _LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 101, "encoder_hash_byte_group_size": [3, 4]},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **_WINDOWS},
    "cohere2_moe": {"logit_scale": 0.25, **_WINDOWS},
    "cohere_compass_text": {
        **_WINDOWS,
        "rope_parameters": {t: {"rope_type": "default", "rope_theta": 1e4} for t in _WINDOWS["layer_types"]},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
    },
    "dots1": _WINDOWS,
    "dots3_note": {"text_config": _MLA, "vision_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dots3_note_text": _MLA,
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "exaone4": _WINDOWS,
    "exaone_moe": _WINDOWS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **_WINDOWS},
    "gemma3": {"text_config": _WINDOWS, "vision_config": {"model_type": "siglip_vision_model", "image_size": 32}},
    "gemma3_text": _WINDOWS,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": _WINDOWS["layer_types"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": {"num_kv_shared_layers": 0}, "audio_config": None},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "git": {"vision_config": {"image_size": 32}},
    "got_ocr2": {"text_config": _QWEN2},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4, "embedding_multiplier": 2.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4": {},
    "inkling2_text": _HYBRID,
    "inkling_text": _HYBRID | {"logits_mup_width_multiplier": 1.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": _LINEAR | _MLA,
    "laguna": _WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4": {"text_config": {"num_hidden_layers": 4, "attn_scale": 0.5}},
    "llama4_text": {"num_hidden_layers": 4, "attn_scale": 0.5},
    "longcat_flash": _MLA,
    "mamba2": {"num_heads": 8},
    "mellum": _WINDOWS,
    "minicpm3": _MLA,
    "minimax": _LINEAR,
    "moshi": {"audio_vocab_size": 31},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe"]},
    "olmo3": _WINDOWS,
    "olmo_hybrid": _LINEAR,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp": {"text_config": _LINEAR | _INDEXER},
    "qwen4_exp_text": _LINEAR | _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 1.0},
    "reformer": _CHUNKS,
    "roc_bert": {
        "pronunciation_vocab_size": 31,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 31,
        "shape_embed_dim": 8,
    },
    "smollm3": {"use_sliding_window": True, **_WINDOWS},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_key_value_heads": 4},
    "zaya": _HYBRID | {"num_experts_per_tok": 1},
}

NOT_BUILT: dict[str, str] = {
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "it drafts tokens for another model and reads its keys and values",
    "gemma4_unified_assistant": "it drafts tokens for another model and reads its keys and values",
    "musicgen": "AutoModelForCausalLM passes it a configuration that it does not take",
    "musicgen_melody": "AutoModelForCausalLM passes it a configuration that it does not take",
}

REFUSED: dict[str, str] = {
    "cpmant": "a later token changes an earlier logit: positions count from the end",
    "xlnet": "a later token changes an earlier logit: it attends in both directions",
    "bert, encoder": "a later token changes an earlier logit: `is_decoder=True` makes it a decoder",
    "reformer": "gradients need training mode, which takes only lengths that are multiples of its chunks",
    "roberta, encoder": "a later token changes an earlier logit: `is_decoder=True` makes it a decoder",
}
"""Why LitDPO refuses what it refuses."""

_VARIANTS: dict[str, dict[str, Any]] = {
    "bert, encoder": {"is_decoder": False},
    "roberta, encoder": {"is_decoder": False},
    "deepseek_v32, ties": {"index_n_heads": 2},  # scores of exactly 0, whose order depends on the length
    "falcon, alibi": {"alibi": True},
    "falcon, new decoder": {"new_decoder_architecture": True},
    "gemma2, eager": {"attn_implementation": "eager"},
    "gpt_oss, router loss": {"output_router_logits": True, "router_aux_loss_coef": 1.0},
    "llama, eager": {"attn_implementation": "eager"},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, dynamic RoPE": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
    "llama, yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        },
    },
    "mixtral, router loss": {"output_router_logits": True, "router_aux_loss_coef": 1.0},
    "phi3, longrope": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 4.0, 8.0, 16.0],
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3_moe, router loss": {"output_router_logits": True, "router_aux_loss_coef": 1.0},
    "rwkv, rescaled": {"rescale_every": 1},
}

NAMES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT] + list(_VARIANTS)


_MAMBA = ["in_proj", "q_proj", "v_proj"]  # peft takes no layer of Mamba that is named out_proj
_LORA = {
    "deepseek_v4": ["q_a_proj", "q_b_proj", "kv_proj"],  # others are grouped
    "falcon_h1": _MAMBA,
    "falcon_mamba": _MAMBA,
    "llama4": ["q_proj", "v_proj", "down_proj"],  # its router is a linear layer too
    "llama4_text": ["q_proj", "v_proj", "down_proj"],
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "nemotron_h": _MAMBA,
    "phimoe": ["q_proj", "v_proj"],
}


def lora_targets(name: str) -> str | list[str]:
    """`target_modules` of a LoRA adapter."""
    return _LORA.get(name.split(",")[0], "all-linear")


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model in eval mode, in float32, from the key of the mapping or of a variant."""
    torch.manual_seed(seed)
    model_type = name.split(",")[0]
    own = _OWN.get(model_type, {}) | _VARIANTS.get(name, {})
    options = {"attn_implementation": own["attn_implementation"]} if "attn_implementation" in own else {}
    config = _config(_class(model_type), {n: v for n, v in own.items() if n not in options})
    model = transformers.AutoModelForCausalLM.from_config(config, **options)
    with torch.no_grad():  # biases and norms' weights, which start at 0 or 1: each its own
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _class(model_type: str) -> type[PreTrainedConfig]:
    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


def _config(of: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of a class, and of all that it is made of."""
    arguments = {name: _SIZES[name] for name in _fields(of) if name in _SIZES}
    for name, part in of.sub_configs.items():
        given = own.get(name, {})
        if given is None:
            arguments[name] = None
            continue
        kind = _class(given["model_type"]) if "model_type" in given else part
        if kind is not transformers.AutoConfig:
            arguments[name] = _config(kind, given)
    own = {name: value for name, value in own.items() if name not in of.sub_configs and name != "model_type"}
    return of(**{**arguments, **own})


def _fields(of: type[PreTrainedConfig]) -> set[str]:
    return set(inspect.signature(of.__init__).parameters)
