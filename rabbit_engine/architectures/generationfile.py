"""Checks generation_config.json at load, so that a value of the wrong type does not fail in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rabbit_engine.architectures.configfile import read_object
from rabbit_engine.errors import DamagedCheckpointError


def _is_count(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_whole(value: object) -> bool:
    """For options where transformers does not accept 5.0 for 5; 0.0 turns the option off."""
    return isinstance(value, int) or value == 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _are(fits: Callable[[Any], bool], value: object) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    """A negative id means none; transformers accepts it."""
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _is_index(value: Any) -> bool:
    """An index into a row of logits, where a boolean would act as a mask."""
    return _is_id(value) and not isinstance(value, bool) and value >= 0


def _is_bias(value: object) -> bool:
    """An item of `[[[17, 4], -2.5], ...]`; transformers does not accept an integer as the bias."""
    return isinstance(value, list) and len(value) > 1 and _are(_is_index, value[0]) and isinstance(value[1], float)


_COUNTS = """max_new_tokens num_beam_groups num_assistant_tokens prompt_lookup_num_tokens max_matching_ngram_size
    assistant_early_exit assistant_lookbehind target_lookbehind prefill_chunk_size max_cache_len"""
_WHOLE = "min_length min_new_tokens encoder_no_repeat_ngram_size"
_NUMBERS = """temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
    length_penalty diversity_penalty penalty_alpha guidance_scale max_time assistant_confidence_threshold"""
_ID = "pad_token_id bos_token_id"
_IDS = "eos_token_id decoder_start_token_id"
_LISTS = "suppress_tokens begin_suppress_tokens"

_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_COUNTS.split(), ("a whole number", _is_count)),
    **dict.fromkeys(_WHOLE.split(), ("a whole number", _is_whole)),
    "no_repeat_ngram_size": ("a whole number", lambda value: _is_whole(value) and value is not True),
    "top_k": ("a whole number", lambda value: _is_count(value) and value is not True),
    "max_length": ("a whole number from 0", lambda value: _is_count(value) and not isinstance(value, bool) and value >= 0),
    "num_beams": ("a whole number from 1", lambda value: value == 1 or (isinstance(value, int) and value >= 1)),
    "num_return_sequences": ("a whole number", lambda value: value == 1 or isinstance(value, int)),
    **dict.fromkeys(_NUMBERS.split(), ("a number", _is_number)),
    **dict.fromkeys(_ID.split(), ("a token id", _is_id)),
    **dict.fromkeys(_IDS.split(), ("a token id or a list of them", lambda value: _is_id(value) or _are(_is_id, value))),
    "forced_bos_token_id": ("a token id", _is_index),
    "forced_eos_token_id": (
        "a token id or a list of them",
        lambda value: _is_index(value) or (_are(_is_index, value) and value != []),
    ),
    **dict.fromkeys(
        _LISTS.split(), ("a list of token ids", lambda value: _are(lambda item: _is_id(item) and item is not True, value))
    ),
    "bad_words_ids": ("a list of lists of token ids", lambda value: _are(lambda ids: _are(_is_index, ids), value)),
    "sequence_bias": ("a list of [token ids, bias as a float]", lambda value: value == {} or _are(_is_bias, value)),
    "exponential_decay_length_penalty": (
        "a list of a start and a factor",
        lambda value: _are(_is_number, value) and len(value) > 1,
    ),
    "watermarking_config": (
        "an object with a number as bias",
        lambda value: isinstance(value, dict) and _is_number(value.get("bias", 0.0)),
    ),
    "stop_strings": ("a text or a list of texts", lambda value: _is_text(value) or _are(_is_text, value)),
    "cache_implementation": ("the name of a cache", _is_text),
}


def require_generation_config(folder: Path, vocabulary: int | None) -> None:
    """Raise DamagedCheckpointError if the folder's generation_config.json cannot be read or has an invalid value.

    Forced token ids must be below `vocabulary`, the vocabulary's size; None if it is unknown.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    advice = "download it again, or delete it to generate with the defaults"
    raw = read_object(path, advice)
    for key, (wanted, fits) in _WANTED.items():
        if raw.get(key) is not None and not fits(raw[key]):
            raise DamagedCheckpointError(f"{path} has {key}={raw[key]!r}, expected {wanted}: {advice}")
    forced = raw.get("forced_eos_token_id")
    if forced is not None and max(forced if isinstance(forced, list) else [forced]) >= (vocabulary or 2**63):
        raise DamagedCheckpointError(f"{path} has forced_eos_token_id={forced!r}, the vocabulary has {vocabulary}: {advice}")
