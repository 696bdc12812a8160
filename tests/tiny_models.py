"""A tiny random model of any causal architecture that transformers knows, made from its own
configuration with the dimensions shrunk. `benchmarks/architectures.py` uses it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support import make_tokenizer

VOCABULARY = 64
POSITIONS = 128
WINDOW = 16  # shorter than the sequences of the tests, so that windows and chunks matter

_SIZES: dict[int, str] = {  # value: names of dimensions, whatever an architecture calls them
    32: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim lru_width "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size",
    64: "intermediate_size ffn_dim n_inner inner_dim d_ff ffn_hidden_size decoder_ffn_dim "
    "encoder_ffn_dim intermediate_size_mlp mamba_d_ssm attention_hidden_size attn_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_key_value_heads swa_num_key_value_heads num_global_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k mamba_expand "
    "n_mamba_heads linear_num_key_heads index_n_heads o_groups altup_num_inputs",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads swa_num_attention_heads attention_num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank conv_kernel "
    "mamba_d_conv linear_num_value_heads linear_conv_kernel_dim adapter_rank",
    8: "head_dim attention_head_dim kv_channels d_kv swa_head_dim swa_v_head_dim global_head_dim "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state mamba_n_heads "
    "mamba_d_head mamba_num_heads mamba_head_dim ssm_state_size mamba_headdim linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input laurel_rank rotary_dim rotary_ndims "
    "rotary_emb_dim",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts "
    "moe_num_shared_experts zero_expert_num first_k_dense_replace moe_layer_start_index "
    "num_dense_layers mamba_n_groups n_groups mamba_ngroups num_memory_blocks",
    16: "q_lora_rank kv_lora_rank qk_head_dim index_head_dim index_topk o_lora_rank chunk_size "
    "mamba_chunk_size",
    WINDOW: "attention_window_size sliding_window sliding_window_size attention_chunk_size "
    "local_attention window_size attention_window",
    POSITIONS: "max_position_embeddings n_positions n_ctx max_seq_len seq_length",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
_OTHER: dict[str, Any] = {
    "decoder_layerdrop": 0.0,
    "use_shared_attention_adapter": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_TINY = _OTHER | {name: size for size, names in _SIZES.items() for name in names.split()}
_TINY |= {"index_topk": 16, "chunk_size": 16}

_MLA = {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16}
_EXTRA: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
        *("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "bailing_hybrid", "kimi_linear"),
    ),
    _MLA,
) | {
    "camembert": {"pad_token_id": 0},
    "data2vec-text": {"pad_token_id": 0},
    "prophetnet": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 0},
    "roberta-prelayernorm": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 0},
    "xlm-roberta-xl": {"pad_token_id": 0},
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "modernbert-decoder": {"pad_token_id": 0, "sep_token_id": 2, "cls_token_id": 3},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "hash_seed": 0,
    },
    "rwkv": {"attention_hidden_size": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "xmod": {"pad_token_id": 0, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str, **changes: Any) -> Any:
    """The configuration of a model type of transformers, with its dimensions shrunk."""
    return _shrunk(CONFIG_MAPPING[kind], changes)


def tiny_model(kind: str, folder: Path, **changes: Any) -> str:
    """A random model with a tokenizer in a folder. Weights are large, so that a wrong position,
    mask or state changes the probabilities a lot.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return str(folder)


def _shrunk(cls: Any, changes: dict[str, Any]) -> Any:
    default = cls()
    known = default.to_dict()
    chosen = {name: size for name, size in _TINY.items() if name in known}
    if isinstance(kinds := known.get("layer_types"), list):  # one layer of each kind
        kinds = list(dict.fromkeys(kinds))
        chosen["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in chosen:
                chosen[name] = len(chosen["layer_types"])
    for name in getattr(cls, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            chosen[name] = _shrunk(type(part), {}).to_dict() if _speaks(name) else _seen(part)
    return cls(**(chosen | _EXTRA.get(default.model_type, {}) | changes))


def _speaks(name: str) -> bool:
    return "text" in name or "decoder" in name


def _seen(part: Any) -> dict[str, Any]:
    """The eye or ear of a multimodal model, as small as it can be."""
    sizes = {
        "num_hidden_layers": 1,
        "image_size": 28,
        "patch_size": 14,
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "num_attention_heads": 2,
    }
    known = part.to_dict()
    tiny = {k: v for k, v in _TINY.items() if k in known and k not in ("vocab_size", *_OTHER)}
    return tiny | {k: v for k, v in sizes.items() if k in known}
