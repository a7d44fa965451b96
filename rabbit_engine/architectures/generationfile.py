"""generation_config.json as it lies on disk: types that would fail amid an answer are named when the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rabbit_engine.errors import DamagedCheckpointError, first_line


def _is_count(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_COUNTS = """max_length max_new_tokens min_length min_new_tokens num_beams num_beam_groups num_return_sequences top_k
    no_repeat_ngram_size encoder_no_repeat_ngram_size num_assistant_tokens prompt_lookup_num_tokens max_matching_ngram_size
    assistant_early_exit assistant_lookbehind target_lookbehind prefill_chunk_size max_cache_len"""
_NUMBERS = """temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
    length_penalty diversity_penalty penalty_alpha guidance_scale max_time assistant_confidence_threshold"""
_ID = "pad_token_id bos_token_id forced_bos_token_id"
_IDS = "eos_token_id forced_eos_token_id decoder_start_token_id"
_LISTS = "suppress_tokens begin_suppress_tokens"

_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_COUNTS.split(), ("a whole number", _is_count)),
    **dict.fromkeys(_NUMBERS.split(), ("a number", _is_number)),
    **dict.fromkeys(_ID.split(), ("a token id", lambda value: isinstance(value, int))),
    **dict.fromkeys(_IDS.split(), ("a token id or a list of them", lambda value: _are(int, [value]) or _are(int, value))),
    **dict.fromkeys(_LISTS.split(), ("a list of token ids", lambda value: _are(int, value))),
    "bad_words_ids": ("a list of lists of token ids", lambda value: _are(list, value) and all(_are(int, ids) for ids in value)),
    "stop_strings": ("a text or a list of texts", lambda value: isinstance(value, str) or _are(str, value)),
    "cache_implementation": ("the name of a cache", lambda value: isinstance(value, str)),
}


def require_generation_config(folder: Path) -> None:
    """Raise DamagedCheckpointError where the folder's generation_config.json cannot be read, or has a value of another type."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return
    advice = "download it again, or delete it to generate with the defaults"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): {advice}") from error
    if not isinstance(raw, dict):
        raise DamagedCheckpointError(f"{path} holds a JSON {type(raw).__name__} where an object is wanted: {advice}")
    for key, (wanted, fits) in _WANTED.items():
        if raw.get(key) is not None and not fits(raw[key]):
            raise DamagedCheckpointError(f"{path} says {key}={raw[key]!r}, where {wanted} is wanted: {advice}")
