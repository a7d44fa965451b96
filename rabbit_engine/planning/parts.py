"""Which models compute a prompt in parts in one pass over their weights, and the memory of weights that this takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import DynamicCache, PreTrainedModel

from rabbit_engine.architectures import recorded_speculation
from rabbit_engine.planning.tiers import UnitSize
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.caches import shows_its_keys, shows_its_states, state_layers
from rabbit_engine.transformers_bridge.forwards import last_logits_argument

MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask [1, 1, queries, keys]."""

_ANY = 1 << 62
"""More positions than any config has: Phi-3 drops its cache at a length of its own, if that is less than it has in all."""

_STATES = ("chain", "carry")
"""What the record says of classes that continue states with several tokens; without states, classes that take no such mask."""

_LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Rotary embeddings whose angles depend on the last position of a forward."""


def computes_parts(model: PreTrainedModel) -> bool:
    """Whether the class, with this config, is known to compute from what its cache holds and a given mask what it computes from
    the whole prompt: keys and values, and states of the whole text that a pass continues."""
    config = model.config
    known = recorded_speculation(type(model), config)
    if config.is_encoder_decoder or known not in ("tree", *_STATES):
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
        cache = DynamicCache(config=text)
    except (TypeError, ValueError, RuntimeError):  # a window that is not a number: the model's own code says more about it
        return False
    return shows_its_keys(cache) if known == "tree" else bool(state_layers(cache)) and shows_its_states(cache)


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
