"""How each request field is handled: one table of all fields that clients of OpenAI's, vLLM's and llama.cpp's servers send.

A field is honoured (the request's model in `schema` has it), refused because ignoring it would silently change the answer,
or ignored because it changes no answer. An unknown field is refused if it looks like a misspelt one, and logged otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig

from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions.spelling import nearest

logger = logging.getLogger(__name__)

_OFF: tuple[Any, ...] = (None, "", [], {}, False)
"""Values with which a refused field has no effect."""

_CONSTRAINED = "use response_format, or structured_outputs"
_BEAMS = "the server has no beam search"
_ONE_SAMPLER = "this sampler is not supported; temperature, top_p, top_k, min_p and typical_p are"
_ONE_MODEL = "the server serves only the model it was started with"
_TEMPLATE = "the checkpoint's own is always used"
_OVERFLOW = "start the server with --overflow truncate"
_THINKING = "thinking cannot be limited separately: use max_tokens"
_INSIDE = "put its fields in the request itself"
_NOTHING_STORED = "nothing is stored: send the whole conversation"
_SYSTEM = "put it in messages, with the role system"
_CONTINUED = "put it in messages, with continue_final_message"

REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = MappingProxyType(
    {
        # name: why, and further values with no effect besides those of _OFF
        "guided_decoding_backend": (_CONSTRAINED, ()),
        "guided_whitespace_pattern": (_CONSTRAINED, ()),
        "structural_tag": (_CONSTRAINED, ()),
        "format": (_CONSTRAINED, ()),
        "allowed_token_ids": (_CONSTRAINED, ()),
        "functions": ("use tools", ()),
        "function_call": ("use tools and tool_choice", ("none", "auto")),
        "suffix": ("text can be continued only at its end", ()),
        "audio": ("answers are text", ()),
        "modalities": ("answers are text", (["text"],)),
        "web_search_options": ("the server does not search the web", ()),
        "verbosity": ("ask for it in words", ()),
        "reasoning": ("use reasoning_effort, or chat_template_kwargs", ()),
        "thinking": ("use chat_template_kwargs", ()),
        "enable_thinking": ('use chat_template_kwargs: {"enable_thinking": ...}', ()),
        "include_reasoning": ("reasoning is part of the text", (True,)),
        "truncation": (_OVERFLOW, ("disabled",)),
        "truncate_prompt_tokens": (_OVERFLOW, ()),
        "return_token_ids": ("answers are text; logprobs name the tokens", ()),
        "return_tokens_as_token_ids": ("answers are text; logprobs name the tokens", ()),
        "detokenize": ("answers are text", (True,)),
        "spaces_between_special_tokens": ("special tokens are written as by the tokenizer", (True,)),
        "logits_processors": ("clients cannot send code", ()),
        "logit_processors": ("clients cannot send code", ()),
        "chat_template": (_TEMPLATE, ()),
        "mm_processor_kwargs": ("only text is supported", ()),
        "files": ("only text is supported", ()),
        "images": ("only text is supported", ()),
        "image_data": ("only text is supported", ()),
        "multi_modal_data": ("only text is supported", ()),
        "lora": (_ONE_MODEL, ()),
        "adapter_id": (_ONE_MODEL, ()),
        "use_beam_search": (_BEAMS, ()),
        "num_beams": (_BEAMS, (1,)),
        "beam_width": (_BEAMS, (1,)),
        "length_penalty": (_BEAMS, (1,)),
        "early_stopping": (_BEAMS, ()),
        "do_sample": ("use temperature: 0 is greedy", ()),
        "max_new_tokens": ("use max_tokens", ()),
        "max_length": ("use max_tokens", ()),
        "max_output_tokens": ("use max_tokens", ()),
        "n_predict": ("use max_tokens", (-1,)),
        "num_predict": ("use max_tokens", (-1,)),
        "n_probs": ("use logprobs", (0,)),
        "n_keep": (_OVERFLOW, (0, -1)),
        "num_ctx": ("start the server with --max-seq-len", ()),
        "stop_strings": ("use stop", ()),
        "stop_sequences": ("use stop", ()),
        "min_new_tokens": ("use min_tokens", (0,)),
        "min_length": ("use min_tokens", (0,)),
        "bad_words_ids": ("use bad_words, or logit_bias", ()),
        "repeat_penalty": ("use repetition_penalty", (1,)),
        "repeat_last_n": ("repetition_penalty covers the whole text", (0, -1, 64)),
        "penalize_nl": ("use logit_bias", ()),
        "no_repeat_ngram": ("use no_repeat_ngram_size", (0,)),
        "typical": ("use typical_p", (1,)),
        "top_a": (_ONE_SAMPLER, (0,)),
        "top_n_sigma": (_ONE_SAMPLER, (0, -1)),
        "tfs_z": (_ONE_SAMPLER, (1,)),
        "mirostat": (_ONE_SAMPLER, (0,)),
        "mirostat_tau": (_ONE_SAMPLER, (5,)),
        "mirostat_eta": (_ONE_SAMPLER, (0.1,)),
        "dynatemp_range": (_ONE_SAMPLER, (0,)),
        "dynatemp_exponent": (_ONE_SAMPLER, (1,)),
        "xtc_probability": (_ONE_SAMPLER, (0,)),
        "xtc_threshold": (_ONE_SAMPLER, (0.1,)),
        "dry_multiplier": (_ONE_SAMPLER, (0,)),
        "dry_base": (_ONE_SAMPLER, (1.75,)),
        "dry_allowed_length": (_ONE_SAMPLER, (2,)),
        "dry_penalty_last_n": (_ONE_SAMPLER, (0, -1)),
        "dry_sequence_breakers": (_ONE_SAMPLER, (["\n", ":", '"', "*"],)),
        "smoothing_factor": (_ONE_SAMPLER, (0,)),
        "samplers": (_ONE_SAMPLER, ()),
        "min_keep": (_ONE_SAMPLER, (0, 1)),
        "guidance_scale": (_ONE_SAMPLER, (1,)),
        "cfg_scale": (_ONE_SAMPLER, (1,)),
        "negative_prompt": (_ONE_SAMPLER, ()),
        "penalty_alpha": (_ONE_SAMPLER, (0,)),
        "top_h": (_ONE_SAMPLER, ()),
        "dynamic_temperature": (_ONE_SAMPLER, ()),
        "encoder_repetition_penalty": (_ONE_SAMPLER, (1,)),
        "diversity_penalty": (_BEAMS, (0,)),
        "num_beam_groups": (_BEAMS, (1,)),
        "num_return_sequences": ("use n", (1,)),
        "renormalize_logits": (_ONE_SAMPLER, ()),
        "exponential_decay_length_penalty": (_ONE_SAMPLER, ()),
        "suppress_tokens": ("use logit_bias", ()),
        "begin_suppress_tokens": ("use logit_bias", ()),
        "banned_tokens": ("use logit_bias", ()),
        "custom_token_bans": ("use logit_bias", ()),
        "sequence_bias": ("use logit_bias", ()),
        "banned_strings": ("use bad_words", ()),
        "forced_bos_token_id": (_CONSTRAINED, ()),
        "forced_eos_token_id": (_CONSTRAINED, ()),
        "eos_token_id": ("use stop_token_ids", ()),
        "token_healing": ("the prompt is used as it is", ()),
        "max_time": ("use max_tokens", ()),
        "lora_request": (_ONE_MODEL, ()),
        "watermark": ("answers are not marked", ()),
        "t_max_predict_ms": ("use max_tokens", (0,)),
        **dict.fromkeys(("max_tokens_per_doc", "max_chunks_per_doc"), ("truncation: true shortens documents", ())),
        "rank_fields": ("documents are texts", ()),
        "input_type": ("put the checkpoint's prompt before the text", ()),
        "task": ("put the checkpoint's prompt before the text", ()),
        "instruction": ("put it before the text", ()),
        "prompt_name": ("put the checkpoint's prompt before the text", ()),
        "normalize": ("the checkpoint decides whether vectors are normalised", ()),
        "embed_dtype": ("vectors are float32", ("float32",)),
        "output_dtype": ("vectors are float32", ("float", "float32")),
        **dict.fromkeys(("max_gen_len", "num_tokens"), ("use max_tokens", ())),
        **dict.fromkeys(("max_input_length", "truncate"), (_OVERFLOW, ("NONE",))),
        **dict.fromkeys(("thinking_budget", "thinking_token_budget", "reasoning_max_tokens"), (_THINKING, (-1,))),
        "stop_words": ("use stop", ()),
        "stop_ids": ("use stop_token_ids", ()),
        "stop_regex": ("use stop, which takes texts", ()),
        "no_stop_trim": ("use include_stop_str_in_output", ()),
        "ban_eos_token": ("use ignore_eos", ()),
        **dict.fromkeys(("json_mode", "schema", "json", "guided", "choice", "choices"), (_CONSTRAINED, ())),
        "guided_json_schema": (_CONSTRAINED, ()),
        "output_format": (_CONSTRAINED, ("text", {"type": "text"})),
        "text": (_CONSTRAINED, ({"format": {"type": "text"}},)),
        **dict.fromkeys(("random_seed", "sampling_seed"), ("use seed", ())),
        "temp": ("use temperature", ()),
        "greedy": ("use temperature: 0 is greedy", ()),
        "rep_pen": ("use repetition_penalty", (1,)),
        "presence": ("use presence_penalty", (0,)),
        "frequency": ("use frequency_penalty", (0,)),
        "typical_sampling": ("use typical_p", (1,)),
        "repetition_context_size": ("repetition_penalty covers the whole text", (20, 0, -1)),
        "penalty_range": ("repetition_penalty covers the whole text", (0, -1)),
        **dict.fromkeys(("system", "system_prompt", "instructions"), (_SYSTEM, ())),
        **dict.fromkeys(("previous_response_id", "conversation", "background"), (_NOTHING_STORED, ())),
        **dict.fromkeys(("prefix", "assistant_prefix"), (_CONTINUED, ())),
        "instruction_template": (_TEMPLATE, ()),
        "raw": ("use /v1/completions", ()),
        "think": ("use chat_template_kwargs", ()),
        "safe_prompt": (_SYSTEM, ()),
        "add_bos_token": ("use add_special_tokens", (True,)),
        **dict.fromkeys(("extra_body", "options", "parameters", "sampling_params"), (_INSIDE, ())),
        "return_logprobs": ("use logprobs", ()),
        **dict.fromkeys(("constraints", "force_words_ids"), (_BEAMS, ())),
        "encoder_no_repeat_ngram_size": (_ONE_SAMPLER, (0,)),
        "dola_layers": (_ONE_SAMPLER, ()),
        "watermarking_config": ("answers are not marked", ()),
    }
)

FALSE_ASKS = frozenset({"enable_thinking", "think", "thinking", "add_bos_token", "detokenize"})
"""Refused fields that are on unless they are false."""

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "client_metadata"),
        *("prediction", "cache_prompt", "cache_salt", "id_slot", "slot_id", "priority", "request_id", "session_id"),
        *("models", "route", "provider", "transforms", "plugins", "timings_per_token", "return_progress", "post_sampling_probs"),
        *("keep_alive", "api_key", "timeout", "extra_headers", "kv_transfer_params", "vllm_xargs", "return_hidden_states"),
        *("return_full_text", "details", "decoder_input_details", "chat_id", "title", "background_tasks", "features"),
    }
)
"""Fields that change no answer: they concern the caller, storage and speed."""

_CONFIG_IGNORED = frozenset(
    {
        *("transformers_version", "_from_model_config", "_commit_hash", "_original_object_hash", "generation_kwargs"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "trust_remote_code"),
        *("use_cache", "cache_config", "cache_implementation", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("compile_config", "disable_compile", "continuous_batching_config", "remove_invalid_values", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "is_assistant", "use_mtp"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "max_matching_ngram_size", "prompt_lookup_num_tokens"),
        *("speculation_type", "target_lookbehind"),
    }
)
"""Attributes of a GenerationConfig that change how an answer is computed, not its text; special tokens are the checkpoint's."""

_CONFIG_LENGTH = 20
"""The default `max_length` of a GenerationConfig."""

_MOST_TOLD = 100
_MOST_UNKNOWN = 32
_told: set[str] = set()


def check_fields(body: Mapping[str, Any], own: Collection[str], others: Mapping[str, str]) -> None:
    """Raise RequestError for a field that would change the answer and is not honoured; log an unknown one once.

    `own` are the fields of this kind of request, `others` those of other kinds, with their paths.
    """
    unknown = [name for name in body if name not in own and name not in IGNORED and name not in REFUSED and name not in others]
    if len(unknown) > _MOST_UNKNOWN:
        raise RequestError(400, f"the request has {len(unknown)} unknown fields", param=unknown[0][:60])
    for name, value in body.items():
        if name in own or name in IGNORED:
            continue
        if name in REFUSED:
            refuse(name, value)
        elif name in others:
            if value not in _OFF:
                raise unsupported(name, f"it is a field of {others[name]}")
        elif value is not None:
            _meet_unknown(name, [*own, *REFUSED, *others])


def check_config(given: Mapping[str, Any], own: Collection[str], others: Collection[str]) -> None:
    """The same for the attributes of a generation config: `own` are honoured, `others` are fields of the request itself."""
    known = vars(GenerationConfig())
    named = {*own, *_CONFIG_IGNORED, *REFUSED, *known, *others}
    if len(unknown := [name for name in given if name not in named]) > _MOST_UNKNOWN:
        told = f"generation_config has {len(unknown)} unknown fields"
        raise RequestError(400, told, param=f"generation_config.{unknown[0][:60]}")
    for name, value in given.items():
        if name not in own and name not in _CONFIG_IGNORED and not _is_idle_length(name, given):
            _check_attribute(name, value, known, others)
    for name in unknown:
        if given[name] is not None:
            _meet_unknown(name, [*own, *known], "generation_config.")


def _is_idle_length(name: str, given: Mapping[str, Any]) -> bool:
    """If both are given, `max_new_tokens` takes precedence, as in transformers."""
    return name == "max_length" and (given.get("max_new_tokens") is not None or given[name] == _CONFIG_LENGTH)


def _check_attribute(name: str, value: object, known: Mapping[str, Any], others: Collection[str]) -> None:
    if name in REFUSED:
        refuse(name, value, "generation_config.")
    elif name in known and value is not None and value != known[name]:
        raise unsupported(f"generation_config.{name}", "the server answers without it")
    elif name in others and value not in _OFF:
        raise unsupported(f"generation_config.{name}", "it is a field of the request itself")


def refuse(name: str, value: object, within: str = "") -> None:
    """Raise for a field of REFUSED, unless its value has no effect; `within` prefixes its name."""
    why, neutral = REFUSED[name]
    if value is False and name in FALSE_ASKS:
        raise unsupported(within + name, why)
    if not any(value == known and type(value) is type(known) for known in _OFF) and value not in neutral:
        raise unsupported(within + name, why)


def unsupported(name: str, why: str) -> RequestError:
    """The error for a field that cannot be honoured."""
    return RequestError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")


def _meet_unknown(name: str, known: list[str], within: str = "") -> None:
    shown, names = within + name[:60], [other for other in known if other != "model"]
    if near := nearest(name, names):
        told = f"{shown!r} is not a field of this request: did you mean {near!r}?"
        raise RequestError(400, told, param=shown, code="unknown_parameter")
    if shown not in _told and len(_told) < _MOST_TOLD:
        _told.add(shown)
        near = nearest(name, names, cutoff=0.0)
        logger.warning("a request has the unknown field %r; the nearest known one is %r", shown, near)
