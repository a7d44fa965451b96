"""Options of `model.generate` and of OpenAI's API that a session does not have, and what to use instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from types import MappingProxyType

from transformers import GenerationConfig, GenerationMixin

from rabbit_engine.errors import ConfigurationError

_LENGTH, _SEVERAL = "use max_new_tokens", "pass the prompt to generate several times, each with its own seed"
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("max_length", "max_tokens", "max_completion_tokens", "max_output_tokens", "max_time"), _LENGTH),
        **dict.fromkeys(("min_length", "min_tokens"), "use min_new_tokens"),
        **dict.fromkeys(("stop_strings", "stop_sequences", "stopping_criteria"), "use stop, or stop_token_ids"),
        **dict.fromkeys(("n", "best_of", "num_return_sequences"), _SEVERAL),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "allowed_token_ids"), "use logit_bias"),
        "do_sample": "use temperature=0 for the likeliest token, or a higher temperature to sample",
        "eos_token_id": "use stop_token_ids",
        "bad_words_ids": "use bad_words",
        "top_logprobs": "use logprobs=N, the number of alternatives",
        "streamer": "use stream",
        "stream": "use the method stream",
        "response_format": "use schema",
        "generation_config": "pass its values as options",
    }
)


def tell_instead(name: str) -> str | None:
    """What to use instead of this option; None if neither `generate` nor OpenAI's API has it."""
    return _INSTEAD.get(name, "call model.generate for it") if name in _INSTEAD or name in _names_of_generate() else None


def refuse_foreign(name: str, value: object) -> None:
    """Raise ConfigurationError for an option of `generate` or OpenAI's API: ignoring it would change the answer."""
    if value is not None and (instead := tell_instead(name)):
        raise ConfigurationError(f"{name} is not an option of a session: {instead}")


@functools.cache
def _names_of_generate() -> frozenset[str]:
    """The attributes of a generation config and the parameters of `generate` in the installed transformers."""
    return frozenset(vars(GenerationConfig())) | (
        set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    )
