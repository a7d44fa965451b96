"""InternLM 1, 2 and 3 as Llamas: the same computation under other names.

Source of the formats: the modelling code in the families' repositories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, WeightConverter

from rabbit_engine.architectures.architecture import Architecture, Family, RawConfig
from rabbit_engine.architectures.families.fused import SplitGroupedQKV
from rabbit_engine.architectures.families.rawconfig import QKV, common, llama_sizes, refuse
from rabbit_engine.transformers_bridge.weight_transforms import WeightRenaming

_VOCABULARY, _END_OF_ANSWER = 103168, 103028
"""Vocabulary size of InternLM's released tokenizer, and the id of its <eoa> token."""


def _rope(raw: RawConfig, kind: str, theta: float, factor: float) -> dict[str, Any]:
    if kind in ("origin", "default"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind in ("dynamic", "linear"):
        return {"rope_type": kind, "rope_theta": theta, "factor": factor}
    raise refuse(raw, f"rotary type {kind!r}", "only plain, linear and dynamic are supported")


def _convert_1(raw: RawConfig, _: Path) -> Architecture:
    rotary = raw.get("rotary") or {"base": raw.get("rope_theta", 10000), "type": "dynamic"}
    theta, kind = float(rotary["base"]), rotary.get("type", "dynamic")
    rope = _rope(raw, "origin" if kind == "dynamic" else kind, theta, float(rotary.get("scaling_factor", 1.0)))
    sizes = {**llama_sizes(raw), "num_key_value_heads": raw["num_attention_heads"]}  # the family's code reads no other key
    config = LlamaConfig(**sizes, **common(raw), attention_bias=bool(raw.get("bias", True)), rope_parameters=rope)
    return Architecture(
        cls=LlamaForCausalLM,
        config=config,
        chat_ends=(_END_OF_ANSWER,) if config.vocab_size == _VOCABULARY else (),
        positions=config.max_position_embeddings if kind == "dynamic" else None,
        positions_reason="past them the family's own code rotates every cached key again as the text grows",
    )


def _scaled(raw: RawConfig, theta: float) -> dict[str, Any]:
    scaling = raw.get("rope_scaling") or {"type": "default", "factor": 1.0}
    return _rope(raw, scaling.get("rope_type") or scaling["type"], theta, float(scaling.get("factor", 1.0)))


def _convert_2(raw: RawConfig, _: Path) -> Architecture:
    rope = _scaled(raw, float(raw.get("rope_theta", 10000)))
    config = LlamaConfig(**llama_sizes(raw), **common(raw), attention_bias=bool(raw.get("bias", True)), rope_parameters=rope)
    transforms = (
        WeightRenaming(r"^model\.tok_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"^output\.", "lm_head."),
        WeightRenaming(r"\.attention\.wo\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention_norm\.", ".input_layernorm."),
        WeightRenaming(r"\.ffn_norm\.", ".post_attention_layernorm."),
        WeightRenaming(r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
        WeightRenaming(r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        WeightRenaming(r"\.feed_forward\.w2\.", ".mlp.down_proj."),
        WeightConverter("attention.wqkv", list(QKV), [SplitGroupedQKV()]),
    )
    return Architecture(cls=LlamaForCausalLM, config=config, transforms=transforms)


def _convert_3(raw: RawConfig, _: Path) -> Architecture:
    qkv_bias, bias = bool(raw.get("qkv_bias", False)), bool(raw.get("bias", False))
    shared = {**llama_sizes(raw), **common(raw), "rope_parameters": _scaled(raw, float(raw.get("rope_theta", 10000)))}
    if qkv_bias and not bias:
        return Architecture(cls=Qwen2ForCausalLM, config=Qwen2Config(**shared))
    if bias and not qkv_bias:
        raise refuse(raw, "bias=True with qkv_bias=False", "no class adds a bias to the output projection alone")
    return Architecture(cls=LlamaForCausalLM, config=LlamaConfig(**shared, attention_bias=bias, mlp_bias=bias))


FAMILIES = (
    Family(
        name="InternLM",
        model_type="internlm",
        classes=("InternLMForCausalLM",),
        becomes="LlamaForCausalLM",
        convert=_convert_1,
        tokenizer="internlm",
    ),
    Family(
        name="InternLM2",
        model_type="internlm2",
        classes=("InternLM2ForCausalLM",),
        becomes="LlamaForCausalLM",
        convert=_convert_2,
        tokenizer="internlm2",
    ),
    Family(
        name="InternLM3",
        model_type="internlm3",
        classes=("InternLM3ForCausalLM",),
        becomes="LlamaForCausalLM or Qwen2ForCausalLM",
        convert=_convert_3,
    ),
)
