"""ChatGLM2, ChatGLM3 and GLM-4-9B in their own `ChatGLMModel` form as transformers' Glm.

Source of the format: the modelling code in the family's repositories. In both, the rotary embedding covers half of each
head, with interleaved pairs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers import GlmConfig, GlmForCausalLM, WeightConverter

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.families.fused import SplitGroupedQKV, SplitQKV
from rabbit_engine.architectures.families.rawconfig import QKV, common, refuse, require, require_plain_weights
from rabbit_engine.errors import UnsupportedArchitectureError
from rabbit_engine.transformers_bridge.weight_transforms import WeightRenaming

logger = logging.getLogger(__name__)

_VOCABULARY, _USER_AND_OBSERVATION = 65024, (64795, 64797)
"""Ids of ChatGLM3's released tokenizer, whose vocabulary ChatGLM2 shares; GLM-4's generation_config.json has its own."""

_MULTIPLY = ("chatglm3", "glm-4", "glm4", "codegeex4", "longwriter")

_TRANSFORMS = (
    WeightRenaming(r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
    WeightRenaming(r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
    WeightRenaming(r"^transformer\.output_layer\.", "lm_head."),
    WeightRenaming(r"^transformer\.encoder\.layers\.", "model.layers."),
    WeightRenaming(r"\.self_attention\.dense\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."),
    WeightRenaming(r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
)


def _require_known(raw: RawConfig) -> None:
    """Raise UnsupportedArchitectureError for an option of the family's code that the target class does not have."""
    if "position_encoding_2d" in raw or "inner_hidden_size" in raw:
        raise UnsupportedArchitectureError(
            "ChatGLM-6B (the first version) has two-dimensional positions, which no class of transformers supports: "
            "use ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B"
        )
    if "vision_config" in raw:
        raise UnsupportedArchitectureError(
            "GLM-4V's vision tower has no class in transformers: use a GLM-4.1V or GLM-4.5V repository"
        )
    require_plain_weights(raw)
    require(raw, "rmsnorm", True, "LayerNorm is not supported")
    require(raw, "post_layer_norm", True, "a model without its last norm is not supported")
    require(raw, "apply_residual_connection_post_layernorm", False, "residuals taken after the norm are not supported")
    require(raw, "add_bias_linear", False, "Glm has no bias in its other projections")
    if raw.get("pre_seq_len") is not None:
        raise refuse(raw, f"pre_seq_len={raw['pre_seq_len']}", "tuned prefixes are not supported")


def _rope(raw: RawConfig, folder: Path) -> dict[str, Any]:
    """`rope_ratio` divides ChatGLM2-32k's positions; it multiplies the base of ChatGLM3 and GLM-4."""
    theta, ratio = float(raw.get("rope_theta", 10000)), float(raw.get("rope_ratio") or 1)
    shared = {"partial_rotary_factor": 0.5}
    if ratio == 1:
        return {"rope_type": "default", "rope_theta": theta, **shared}
    if _divides_positions(raw, folder, ratio):
        return {"rope_type": "linear", "rope_theta": theta, "factor": ratio, **shared}
    return {"rope_type": "default", "rope_theta": theta * ratio, **shared}


def _divides_positions(raw: RawConfig, folder: Path, ratio: float) -> bool:
    """Decided by the code next to the config (read, never run), else by the name: the config alone looks like ChatGLM3's."""
    file = folder / "modeling_chatglm.py"
    code = re.sub(r"\s", "", file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else ""
    if "/self.rope_ratio" in code or "*self.rope_ratio" in code:
        return "/self.rope_ratio" in code
    repo = folder.parent.parent if folder.parent.name == "snapshots" else folder
    names = f"{raw.get('_name_or_path', '')} {repo.name}".lower()
    if "chatglm2" not in names and not any(name in names for name in _MULTIPLY):
        logger.warning(
            "assuming that rope_ratio=%s multiplies the rotary base, as in ChatGLM3 and GLM-4; ChatGLM2-32k divides positions: "
            "if this is one, put its modeling_chatglm.py next to the config",
            ratio,
        )
    return "chatglm2" in names


def _convert(raw: RawConfig, folder: Path) -> Architecture:
    _require_known(raw)
    heads, grouped = raw["num_attention_heads"], raw.get("multi_query_attention", False)
    kv_heads = raw.get("multi_query_group_num", 1) if grouped else heads
    config = GlmConfig(
        vocab_size=raw.get("padded_vocab_size") or raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["ffn_hidden_size"],
        num_hidden_layers=raw["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=raw.get("kv_channels") or raw["hidden_size"] // heads,
        max_position_embeddings=raw.get("seq_length", 2048),
        rms_norm_eps=raw.get("layernorm_epsilon", 1e-5),
        attention_bias=bool(raw.get("add_qkv_bias", False)),
        rope_parameters=_rope(raw, folder),
        use_cache=raw.get("use_cache", True),
        **{**common(raw), "eos_token_id": raw.get("eos_token_id", 2)},
    )
    split = SplitQKV() if grouped else SplitGroupedQKV()
    transforms = (*_TRANSFORMS, WeightConverter("self_attention.query_key_value", list(QKV), [split]))
    ends = _USER_AND_OBSERVATION if config.vocab_size == _VOCABULARY else ()
    return Architecture(cls=GlmForCausalLM, config=config, transforms=transforms, chat_ends=ends)


FAMILIES = (
    Family(
        name="ChatGLM",
        model_type="chatglm",
        classes=("ChatGLMModel", "ChatGLMForConditionalGeneration", "ChatGLMForCausalLM"),
        becomes="GlmForCausalLM",
        convert=_convert,
        tokenizer="chatglm",
    ),
)
