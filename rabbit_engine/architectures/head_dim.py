"""Takes the width of an attention head from the checkpoint's projections if its config disagrees."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig


def stated_head_dim(config: PretrainedConfig) -> object:
    """The config's `head_dim`; None if it states none, or one for each layer."""
    text = config.get_text_config()
    return None if getattr(text, "is_heterogeneous", False) else getattr(text, "head_dim", None)


def corrected_head_dim(
    config: PretrainedConfig, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> int | None:
    """The `head_dim` of the checkpoint's projections if it differs from the model's, else None.

    `wanted` and `found` map weight names to shapes: those of the model built from the config, and the checkpoint's. The
    projections are `[heads * head_dim, hidden]`, fused ones `[(heads + 2 * kv heads) * head_dim, hidden]`.
    """
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # heads differ by layer, so there is no single head_dim to correct
        return None
    heads = getattr(text, "num_attention_heads", None)
    if not heads or not hasattr(text, "head_dim"):
        return None
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    rows_per_head = {"q_proj": heads, "k_proj": kv_heads, "qkv_proj": heads + 2 * kv_heads}
    for name, shape in found.items():
        projection = name.removesuffix(".weight").rpartition(".")[2]
        if projection in rows_per_head and name in wanted and shape != wanted[name] and len(shape) == 2:
            width, rest = divmod(shape[0], int(rows_per_head[projection]))
            if rest == 0 and width > 0 and width != int(text.head_dim or 0):
                return width
    return None
