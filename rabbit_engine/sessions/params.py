"""Sampling parameters under vLLM's names, for scripts written for it, and what they mean as `Options`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions.options import NAMES, Options

_SAME = (
    *("temperature", "top_p", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "bad_words", "skip_special_tokens"),
    *("logprobs", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
)
_RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "include_stop_str_in_output": "include_stop"}
_REFUSED = (
    *("prompt_logprobs", "best_of", "logits_processors", "allowed_token_ids"),
    *("truncate_prompt_tokens", "flat_logprobs", "repetition_detection", "thinking_token_budget"),
)

_CONSTRAINING = ("structured_outputs", "guided_decoding")
_CONSTRAINTS = {"json": "schema", "json_object": "schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
_NO_CONSTRAINTS = ("structural_tag", "whitespace_pattern", "disable_additional_properties")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How `LLM` continues a prompt: names and defaults as in vLLM, meanings as in `Options`.

    Unlike `Options`, it is complete: the checkpoint's generation config is not asked. `n` is the number of answers; -1 for
    `top_k` and None for `max_tokens` set no limit of their own. `structured_outputs`, in older scripts `guided_decoding`, is a
    mapping or an object with one of `json`, `json_object`, `regex`, `choice` and `grammar`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    bad_words: Sequence[str] | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None)
    structured_outputs: Any = None
    guided_decoding: Any = None


def read_params(params: object) -> tuple[dict[str, Any], int]:
    """The keywords of `Options` in sampling parameters, and the number of answers.

    `params` is `SamplingParams` or any object with its attributes, such as vLLM's own; `Options`; a mapping of either's names;
    or None. Raises ConfigurationError for what is set and not supported.
    """
    if params is None:
        return {}, 1
    if isinstance(params, Options):
        return {name: getattr(params, name) for name in NAMES}, 1
    given = dict(params) if isinstance(params, Mapping) else _attributes(params)
    if refused := next((name for name in _REFUSED if given.get(name)), None):
        raise ConfigurationError(f"{refused}={given[refused]!r} is not supported")
    count = given.pop("n", None) or 1
    if not isinstance(count, int) or count < 1:
        raise ConfigurationError(f"n={count!r}: expected at least 1")
    found = {_RENAMED.get(name, name): value for name, value in given.items() if value is not None and name not in _REFUSED}
    for name in _CONSTRAINING:
        found |= _constraint_in(name, found.pop(name, None))
    if found.get("top_k") == -1:
        found["top_k"] = 0
    return found, count


def _constraint_in(name: str, given: Any) -> dict[str, Any]:
    """The option of a constraint in vLLM's form. Raises ConfigurationError for what has no equivalent."""
    known = {**_CONSTRAINTS, **dict.fromkeys(_NO_CONSTRAINTS)}
    if isinstance(given, Mapping):
        values = {key: value for key, value in given.items() if value not in (None, False)}
    else:
        values = {key: value for key in known if (value := getattr(given, key, None)) not in (None, False)}
    if given is not None and not values:
        raise ConfigurationError(f"{name}={given!r}: expected one of {', '.join(_CONSTRAINTS)}")
    if wrong := next((key for key in values if known.get(key) is None), None):
        raise ConfigurationError(f"{name} with {wrong}={values[wrong]!r} is not supported: {', '.join(_CONSTRAINTS)} are")
    if len(values) > 1:
        raise ConfigurationError(f"{name} has {' and '.join(values)}, but an answer follows only one of them")
    return {_CONSTRAINTS[key]: value for key, value in values.items()}


def _attributes(params: object) -> dict[str, Any]:
    names = ("n", "top_k", *_SAME, *_RENAMED, *_CONSTRAINING, *_REFUSED)
    found = {name: getattr(params, name) for name in names if hasattr(params, name)}
    if not found:
        raise ConfigurationError(f"expected SamplingParams or Options, not a value of type {type(params).__name__}")
    return found
