"""Tiny random models of the families, made by transformers itself: hidden size 32, three or four layers, 96 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 12, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}

# name: (config class, model class, what the config has beside BASE; None takes a BASE key away)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama_biased": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama_wide_heads": ("LlamaConfig", "LlamaForCausalLM", {"head_dim": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": None, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16, "sliding_window": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"head_dim": None}),
    "glm": ("GlmConfig", "GlmForCausalLM", {"attention_bias": True}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 12, "head_dim": None}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**EXPERTS, "mlp_only_layers": [1]}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, **MLA, "moe_intermediate_size": 16, "head_dim": None, "num_key_value_heads": 4},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": 8}),
    # beyond the asked-for: other module trees, other embeddings
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"head_dim": None}),
}

STATEFUL = {"qwen3_next"}
"""Families whose cache cannot go back: transformers refuses assisted decoding for them."""


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A family's model with random weights, biases and norms included, so that each of them matters."""
    config_class, model_class, extra = FAMILIES[name]
    keywords = {key: value for key, value in {**BASE, **extra, **changes}.items() if value is not None or key == "eos_token_id"}
    config = getattr(transformers, config_class)(**keywords)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.to(dtype)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The family's model as a sharded safetensors checkpoint."""
    build(name, dtype, **changes).save_pretrained(folder, max_shard_size="60KB")
    return folder
