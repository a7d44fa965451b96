"""Reads the config.json of a converted family, and refuses options that the target class does not have."""

from __future__ import annotations

from typing import Any

import torch

from rabbit_engine.architectures.architecture import RawConfig
from rabbit_engine.errors import CompressionUnavailableError, UnsupportedArchitectureError

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The weights that a fused projection is split into."""


def refuse(raw: RawConfig, what: str, why: str) -> UnsupportedArchitectureError:
    """The error for a config option that the converted class would compute differently."""
    return UnsupportedArchitectureError(
        f"{what} in the config of this {raw.get('model_type')!r} model: {why}, so its text would be wrong"
    )


def require(raw: RawConfig, key: str, value: object, why: str) -> None:
    """Raise UnsupportedArchitectureError if `key` is present with another value than `value`."""
    if raw.get(key, value) != value:
        raise refuse(raw, f"{key}={raw[key]!r}", why)


def word(raw: RawConfig, key: str, older: str) -> Any:
    """The value of `key`, or of its `older` name. Raises KeyError."""
    return raw[key] if key in raw else raw[older]


def require_plain_weights(raw: RawConfig) -> None:
    """Raise CompressionUnavailableError for weights quantised in the families' own format."""
    bits = raw.get("quantization_bit") or 0
    if bits:
        raise CompressionUnavailableError(
            f"quantization_bit={bits}: the weights are quantised in the family's own format; use the unquantised repository"
        )


def common(raw: RawConfig) -> dict[str, Any]:
    """The keywords that all families share: special token ids, tied embeddings and dtype."""
    kept = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings") if key in raw}
    dtype = raw.get("torch_dtype") or raw.get("dtype")
    known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    return {
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **kept,
        **({"dtype": dtype} if known else {}),
    }


def llama_sizes(raw: RawConfig) -> dict[str, Any]:
    """The sizes of a config with Llama's names, as keywords of LlamaConfig. Raises KeyError."""
    heads = raw["num_attention_heads"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "intermediate_size": raw["intermediate_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
        "hidden_act": raw.get("hidden_act", "silu"),
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "initializer_range": raw.get("initializer_range", 0.02),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "use_cache": raw.get("use_cache", True),
    }
