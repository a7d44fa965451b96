"""Tiny random models of the families, made by transformers itself: hidden size 32, three or four layers, 96 tokens."""

from __future__ import annotations

from collections.abc import Callable
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

# name: (config class, model class, the config's keys besides BASE; None takes a BASE key away)
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
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 12, "num_experts_per_tok": 2, "sliding_window": 8, "intermediate_size": 64},
    ),
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
            "global_head_dim": 16,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"head_dim": None}),
}

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 32,
}
NOT_IN_MPT = ("head_dim", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

NOT_IN_MAMBA2 = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 4}

# more of them, proved by test_matrix alone
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama3_tied": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
        },
    ),
    "qwen2_untied": ("Qwen2Config", "Qwen2ForCausalLM", {"head_dim": None}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**EXPERTS, "head_dim": None, "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**LINEAR, "num_hidden_layers": 4}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**LINEAR, **EXPERTS, "num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    ),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {"sliding_window": 8}),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
            "num_kv_shared_layers": 2,
            "intermediate_size": [48] * 5,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0],
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {"head_dim": None, "num_key_value_heads": 4}),
    "phi4": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"head_dim": None, "tie_word_embeddings": True, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32},
    ),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {"head_dim": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **DEEPSEEK,
            **MLA,
            "moe_intermediate_size": 16,
            "head_dim": None,
            "num_key_value_heads": 4,
            "topk_method": "group_limited_greedy",
        },
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {}),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {**DEEPSEEK, "n_group": 1, "moe_intermediate_size": 16},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {"head_dim": None}),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "use_cache": True, **dict.fromkeys(NOT_IN_MPT)},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"head_dim": None}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"head_dim": None}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {"head_dim": None, "sliding_window": 8}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"head_dim": None}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {"head_dim": None}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"head_dim": None}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"head_dim": None}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"head_dim": None}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"head_dim": None, "state_size": 4}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "head_dim": None,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"head_dim": 8, "num_heads": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4, **dict.fromkeys(NOT_IN_MAMBA2)},
    ),
    "bamba": (
        "BambaConfig",
        "BambaForCausalLM",
        {**MAMBA2, "head_dim": None, "num_hidden_layers": 4, "attn_layer_indices": [1]},
    ),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {**MAMBA2, "mamba_d_ssm": 64}),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {"head_dim": None, "num_hidden_layers": 4, "full_attn_idxs": [1, 3]}),
}

STATEFUL = {"qwen3_next", "qwen3_5", "qwen3_5_moe", "mamba", "jamba", "mamba2", "bamba", "falcon_h1"}
"""Families whose cache cannot go back: transformers refuses assisted decoding for them."""


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A family's model with random weights, biases and norms included, so that each of them matters."""
    if name in IMAGE_TEXT:
        config, model_class = IMAGE_TEXT[name]()
    else:
        config_class, model_class, extra = (FAMILIES | MORE)[name]
        merged = {**BASE, **extra, **changes}
        keywords = {key: value for key, value in merged.items() if value is not None or key == "eos_token_id"}
        config = getattr(transformers, config_class)(**keywords)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model if dtype == torch.float32 else model.to(dtype)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The family's model as a sharded safetensors checkpoint."""
    build(name, dtype, **changes).save_pretrained(folder, max_shard_size="60KB")
    return folder


IMAGE = 100
"""The token for a piece of an image, in addition to `vocab_size` 110 for those around it."""

_EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PIXELS = {"image_size": 28, "patch_size": 7}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_PATCHES = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
_AROUND = {"image_token_index": IMAGE, "boi_token_index": 101, "eoi_token_index": 102}


def _text(**changes: Any) -> dict[str, Any]:
    merged = {**BASE, "vocab_size": 110, **changes}
    return {key: value for key, value in merged.items() if value is not None or key == "eos_token_id"}


def _gemma3() -> tuple[Any, str]:
    text = _text(num_hidden_layers=7, sliding_window=8)
    config = transformers.Gemma3Config(text_config=text, vision_config={**_EYES, **_PIXELS}, mm_tokens_per_image=4, **_AROUND)
    return config, "Gemma3ForConditionalGeneration"


def _qwen2_5_vl() -> tuple[Any, str]:
    eyes = {**_PATCHES, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    text = _text(head_dim=None, rope_parameters=_MROPE)
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=eyes, **_QWEN_TOKENS
    ), "Qwen2_5_VLForConditionalGeneration"


def _qwen2_vl() -> tuple[Any, str]:
    eyes = {**_PATCHES, "embed_dim": 32, "mlp_ratio": 2}
    text = _text(head_dim=None, rope_parameters=_MROPE)
    return transformers.Qwen2VLConfig(text_config=text, vision_config=eyes, **_QWEN_TOKENS), "Qwen2VLForConditionalGeneration"


def _qwen3_5() -> tuple[Any, str]:
    eyes = {**_PATCHES, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    rope = {**_MROPE, "partial_rotary_factor": 1.0}
    text = _text(num_hidden_layers=4, rope_parameters=rope, **LINEAR)
    return transformers.Qwen3_5Config(text_config=text, vision_config=eyes, **_QWEN_TOKENS), "Qwen3_5ForConditionalGeneration"


def _llama4() -> tuple[Any, str]:
    eyes = {**_EYES, **_PIXELS, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5}
    eyes |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
    text = _text(**MORE["llama4"][2])
    return transformers.Llama4Config(text_config=text, vision_config=eyes, **_AROUND), "Llama4ForConditionalGeneration"


def _mistral3() -> tuple[Any, str]:
    eyes = transformers.PixtralVisionConfig(**_EYES, **_PIXELS, head_dim=8)
    text = transformers.MistralConfig(**_text())
    config = transformers.Mistral3Config(text_config=text, vision_config=eyes, image_token_index=IMAGE, spatial_merge_size=2)
    return config, "Mistral3ForConditionalGeneration"


IMAGE_TEXT: dict[str, Callable[[], tuple[Any, str]]] = {
    "gemma3_image": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5_image": _qwen3_5,
    "llama4_image": _llama4,
    "mistral3_image": _mistral3,
}


def picture(name: str) -> dict[str, torch.Tensor]:
    """A prompt of words, an image and words, as the processor of an image-text family would give it."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 96, (1, 5), generator=generator)
    before, after = {"gemma3_image": ([101], [102])}.get(name, ([102], [103]) if "qwen" in name else ([], []))
    ids = torch.cat([words, torch.tensor([[*before, *[IMAGE] * 4, *after]], dtype=torch.long), words], dim=1)
    if "qwen" in name:
        patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        kinds = (ids == IMAGE).int()
        return {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
    pixels = torch.randn(1, 3, 28, 28, generator=generator)
    extra = {
        "gemma3_image": {"token_type_ids": (ids == IMAGE).long()},
        "mistral3_image": {"image_sizes": torch.tensor([[28, 28]])},
    }
    return {"input_ids": ids, "pixel_values": pixels, **extra.get(name, {})}
