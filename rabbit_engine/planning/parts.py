"""Which models compute a prompt in parts in one pass over their weights, and the memory of weights that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import DynamicCache, PreTrainedModel

from rabbit_engine.architectures import recorded_speculation
from rabbit_engine.planning.tiers import UnitSize
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.caches import shows_its_keys
from rabbit_engine.transformers_bridge.forwards import last_logits_argument

MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask [1, 1, queries, keys]."""

_ANY = 1 << 62
"""More positions than any config has: Phi-3 drops its cache at a length of its own, if that is less than it has in all."""

_LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Rotary embeddings whose angles depend on the last position of a forward."""


def computes_parts(model: PreTrainedModel) -> bool:
    """Whether the class, with this config, is known to compute from keys in its cache and a given mask what it computes from the
    whole prompt, and keeps nothing but such keys and values."""
    config = model.config
    if config.is_encoder_decoder or recorded_speculation(type(model), config) != "tree":
        return False
    if attention_of(config) not in MASKED or not last_logits_argument(model.forward):
        return False
    text = config.get_text_config()
    if (getattr(text, "original_max_position_embeddings", None) or _ANY) < (getattr(text, "max_position_embeddings", None) or 0):
        return False
    kinds = getattr(text, "layer_types", None) or ()
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if "chunked_attention" in kinds or any(part.get("rope_type") in _LENGTH_DEPENDENT for part in ropes):
        return False
    try:
        return shows_its_keys(DynamicCache(config=text))
    except (TypeError, ValueError, RuntimeError):  # a window that is not a number: the model's own code says more about it
        return False


def layer_ring_bytes(units: Iterable[UnitSize], layers: Sequence[str]) -> int:
    """The smallest ring that holds all streamed units of a layer at once, while the next unit arrives."""
    inside: dict[str, int] = {}
    largest = 0
    for unit in units:
        if unit.role == "streamed":
            layer = layer_of(unit.name, layers)
            inside[layer] = inside.get(layer, 0) + unit.nbytes
            largest = max(largest, unit.nbytes)
    return max(inside.values(), default=0) + 2 * largest


def layer_of(unit: str, layers: Sequence[str]) -> str:
    """The layer that a unit is in, by their names; a unit outside the layers is one by itself."""
    return next((layer for layer in layers if unit == layer or unit.startswith(f"{layer}.")), unit)
