"""QWen v1 (`QWenLMHeadModel`) as Qwen2, up to its training length.

Source of the format: the modelling code in the family's repositories. Of its two feed-forward inputs, `w2` is the gate;
`intermediate_size` counts both. The first release's configs use GPT-2's names.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, WeightConverter

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.families.fused import SplitQKV
from rabbit_engine.architectures.families.rawconfig import QKV, common, refuse, require, word
from rabbit_engine.transformers_bridge.weight_transforms import WeightRenaming

_TRANSFORMS = (
    WeightRenaming(r"^transformer\.wte\.", "model.embed_tokens."),
    WeightRenaming(r"^transformer\.ln_f\.", "model.norm."),
    WeightRenaming(r"^transformer\.h\.", "model.layers."),
    WeightRenaming(r"\.ln_1\.", ".input_layernorm."),
    WeightRenaming(r"\.ln_2\.", ".post_attention_layernorm."),
    WeightRenaming(r"\.attn\.c_proj\.", ".self_attn.o_proj."),
    WeightRenaming(r"\.mlp\.w2\.", ".mlp.gate_proj."),
    WeightRenaming(r"\.mlp\.w1\.", ".mlp.up_proj."),
    WeightRenaming(r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)


_IM_START_AND_END = (151644, 151645)


def _chats(folder: Path) -> bool:
    """Whether the checkpoint is a chat model, by its generation_config.json."""
    try:
        raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("chat_format") == "chatml"


def _convert(raw: RawConfig, folder: Path) -> Architecture:
    require(raw, "rotary_pct", 1.0, "a rotary embedding over part of each head is not supported")
    require(raw, "scale_attn_weights", True, "unscaled attention is not supported")
    if "visual" in raw:
        raise refuse(raw, "a vision tower", "QWen-VL is not supported")
    heads = word(raw, "num_attention_heads", "n_head")
    shared = {
        "vocab_size": raw["vocab_size"],
        "hidden_size": word(raw, "hidden_size", "n_embd"),
        "intermediate_size": word(raw, "intermediate_size", "ffn_hidden_size") // 2,
        "num_hidden_layers": word(raw, "num_hidden_layers", "n_layer"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": raw.get("kv_channels") or word(raw, "hidden_size", "n_embd") // heads,
        "max_position_embeddings": raw.get("max_position_embeddings", 8192),
        "initializer_range": raw.get("initializer_range", 0.02),
        "rms_norm_eps": raw.get("layer_norm_epsilon", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(raw.get("rotary_emb_base", 10000))},
        "use_cache": raw.get("use_cache", True),
        **common(raw),
    }
    stretched = [name for name in ("use_dynamic_ntk", "use_logn_attn") if raw.get(name, True)]
    plain = bool(raw.get("no_bias", True))
    return Architecture(
        cls=Qwen2ForCausalLM if plain else LlamaForCausalLM,
        config=Qwen2Config(**shared) if plain else LlamaConfig(**shared, attention_bias=True, mlp_bias=True),
        transforms=(*_TRANSFORMS, WeightConverter("attn.c_attn", list(QKV), [SplitQKV()])),
        chat_ends=_IM_START_AND_END if _chats(folder) and raw["vocab_size"] > max(_IM_START_AND_END) else (),
        positions=int(raw.get("seq_length", 8192)) if stretched else None,
        positions_reason=f"past them the family's own code changes its attention ({', '.join(stretched)})",
    )


FAMILIES = (
    Family(
        name="QWen",
        model_type="qwen",
        classes=("QWenLMHeadModel",),
        becomes="Qwen2ForCausalLM or LlamaForCausalLM",
        convert=_convert,
        tokenizer="qwen",
    ),
)
