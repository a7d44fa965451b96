"""Which models and caches can verify guesses, and how; for the others, the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PretrainedConfig

from rabbit_engine.decoding.verification import PER_TOKEN, CarryVerifier, ChainVerifier, TreeVerifier, Verifier, mask_kinds
from rabbit_engine.transformers_bridge.caches import ability_of, is_made_for, tokens_in, windows_of
from rabbit_engine.transformers_bridge.forwards import cache_of

_MASKED = ("sdpa", "eager")
"""Attention implementations that take a mask [1, 1, queries, keys]."""


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What matters about the model: its text config, the dtype of its masks, its attention implementation."""

    config: PretrainedConfig
    dtype: torch.dtype
    attention: str


def why_plain(generation_config: Any, keywords: Mapping[str, Any], *, texts: int, encoder_decoder: bool) -> str:
    """Why a call of `generate` decodes one token a pass whatever its cache can do; empty if it need not.

    `texts` are the sequences of the call, `keywords` the model's.
    """
    config = generation_config
    reasons = {
        f"{texts} texts at once": texts > 1,
        "an encoder and a decoder": encoder_decoder,
        "returned attentions": bool(config.output_attentions and config.return_dict_in_generate),
        "guidance": config.guidance_scale not in (None, 1, 1.0),
        "use_cache=False": not keywords.get("use_cache"),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def verifier_for(
    inputs: Mapping[str, Any], traits: ModelTraits, refused: Collection[type[Verifier]] = ()
) -> tuple[Verifier | None, str]:
    """What verifies guesses with the cache in `inputs`, the keywords of a pass, or None and the reason.

    `refused` are ways that this model was found to compute wrongly.
    """
    cache = cache_of(inputs)
    if not isinstance(cache, Cache):
        return None, "no cache of transformers' own"
    if "input_ids" not in inputs:
        return None, "no token ids"
    if not _holds_the_text(cache, inputs):
        return None, "a cache that does not hold the text"
    if unknown := [name for name, value in inputs.items() if name not in PER_TOKEN and _is_per_token(value)]:
        return None, f"{unknown[0]}, of which later tokens need values of their own"
    ways = {way for way in _ways(cache, inputs, traits) if way not in refused}
    if TreeVerifier in ways:
        return TreeVerifier(cache, traits.config, traits.dtype), ""
    for way in (ChainVerifier, CarryVerifier):
        if way in ways:
            return way(cache), ""
    if refused:
        return None, "other numbers for several tokens than for one"
    return None, f"a {type(cache).__name__} that cannot go back"


def _is_per_token(value: object) -> bool:
    """Whether a keyword of a pass over one token may hold a value for each token: [batch, tokens, ...]."""
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == 1


def _holds_the_text(cache: Cache, inputs: Mapping[str, Any]) -> bool:
    """Whether the cache is as long as the mask of the text, but for its last token; unknown of recurrent states."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or ability_of(cache) == "restore":
        return True
    held = tokens_in(cache)
    return held is None or held + 1 == mask.shape[1]


def _ways(cache: Cache, inputs: Mapping[str, Any], traits: ModelTraits) -> set[type[Verifier]]:
    """The ways that a cache allows."""
    ability = ability_of(cache)
    if ability == "none":
        return set()
    if ability == "restore":
        return {CarryVerifier}
    has_depths = "position_ids" in inputs and "cache_position" not in inputs  # with the latter, classes make masks of their own
    if ability == "select" and has_depths and _takes_tree_masks(cache, traits):
        return {TreeVerifier, ChainVerifier}
    return {ChainVerifier}


def _takes_tree_masks(cache: Cache, traits: ModelTraits) -> bool:
    kinds = getattr(traits.config, "layer_types", None)
    if traits.attention not in _MASKED or "chunked_attention" in (kinds or ()) or not is_made_for(cache, traits.config):
        return False
    try:
        return bool(mask_kinds(windows_of(cache), kinds))
    except ValueError:
        return False


def length_of(inputs: Mapping[str, Any], tokens: int) -> int:
    """The length of a text of `tokens` known ones, whose last is in `inputs`: without padding, with those given as embeddings."""
    positions = inputs.get("position_ids", inputs.get("cache_position"))
    return tokens if positions is None else int(positions.max()) + 1


def deepest(config: PretrainedConfig, positions: int) -> int:
    """How deep a tree after a text of `positions` may be, so that a pass computes what passes over single tokens would.

    It ends with the positions that the model was made for: learnt ones end there. Two kinds of rotary embeddings depend on the
    last position of a pass: "longrope" changes its factors behind the original length, "dynamic" from there on with each token.
    """
    most = getattr(config, "max_position_embeddings", None) or 0
    limit = most - positions if positions <= most else UNLIMITED
    return min([limit, *(_deepest(rope, config, positions) for rope in _ropes(config))])


def proven_length(config: PretrainedConfig, tokens: int) -> int:
    """For texts of how many tokens a trial proves a way that it tried after `tokens`.

    A model with an indexer attends to all keys in a text of up to `index_topk` tokens. In a longer one it selects them, by scores
    that may be equal; which of equal ones are selected depends on the number of rows.
    """
    selected = getattr(config, "index_topk", None)
    return selected if isinstance(selected, int) and tokens < selected else UNLIMITED


UNLIMITED = 1 << 30
"""More tokens than any text has."""


def _ropes(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The settings of rotary embeddings, of all kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(part for part in rope.values() if isinstance(part, Mapping))]


def _deepest(rope: Mapping[str, Any], config: PretrainedConfig, positions: int) -> int:
    kind = rope.get("rope_type")
    if kind not in ("longrope", "dynamic"):
        return UNLIMITED
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    original = original or config.max_position_embeddings
    if positions <= original:
        return int(original - positions)
    return UNLIMITED if kind == "longrope" else 0
