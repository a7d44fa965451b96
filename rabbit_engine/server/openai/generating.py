"""The fields that all requests for generated text have, with their types and ranges, and the session's options in them."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.constraints import Forced, forced_form
from rabbit_engine.server.openai.fields import check_config, unsupported
from rabbit_engine.sessions import Options

MOST_CHOICES = 16
_MOST_STOPS = 16
_MOST_TOKENS = 1024
_MOST_CHARACTERS = 4096
"""The most characters of a stop text or a bad word."""

MOST = 2**31
"""The largest integer, as in `Options`."""

Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or []),
]

Kind = TypeVar("Kind", bound="Asked")


class Asked(BaseModel):
    """The field of every request: the model's name. Without one, or with an empty one, it is the server's default model."""

    model_config = ConfigDict(extra="ignore")
    path: ClassVar[str]

    model: Annotated[str, BeforeValidator(lambda given: "" if given is None else given)] = ""

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return False


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = False
    include_obfuscation: bool | None = True
    continuous_usage_stats: Literal[False] | None = False


class Generating(Asked):
    """The fields of every request for generated text."""

    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    eta_cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=MOST)] | None = None
    stop: Annotated[Stops, Field(max_length=_MOST_STOPS)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=_MOST_TOKENS)] | None = None
    bad_words: Annotated[Stops, Field(max_length=_MOST_TOKENS)] = []
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    min_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = None
    skip_special_tokens: bool | None = True
    generation_config: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Any = None
    grammar: str | None = None
    regex: str | None = None
    ebnf: str | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return bool(self.stream)

    @property
    def form(self) -> Forced:
        """The form that the answer must have. Raises RequestError."""
        return forced_form(self.__dict__)

    @property
    def most_tokens(self) -> int | None:
        """The maximum number of tokens of an answer."""
        return None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives get log probabilities; None for no log probabilities at all."""
        return None

    def options(self) -> dict[str, Any]:
        """The session's options; fields of `generation_config` apply unless the request sets them itself."""
        own = {
            "max_new_tokens": self.most_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stop or None,
            "typical_p": self.typical_p,
            "epsilon_cutoff": self.epsilon_cutoff,
            "eta_cutoff": self.eta_cutoff,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "stop_token_ids": self.stop_token_ids,
            "bad_words": self.bad_words or None,
            "include_stop": self.include_stop_str_in_output or None,
            "ignore_eos": self.ignore_eos,
            "min_new_tokens": self.min_tokens,
            "skip_special_tokens": self.skip_special_tokens,
            "logprobs": self.alternatives,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
        }
        found = {**_of_config(self.generation_config), **{name: value for name, value in own.items() if value is not None}}
        self._require_order(found.get("min_new_tokens") or 0, found.get("max_new_tokens"))
        return found

    def _require_order(self, least: int, most: int | None) -> None:
        if most is not None and least > most:
            name = "min_tokens" if self.min_tokens is not None else "generation_config.min_new_tokens"
            raise RequestError(400, f"{name}={least} is more than {self.name_of_most}={most}", param=name)

    @property
    def name_of_most(self) -> str:
        """The field that limits the tokens of an answer."""
        return "generation_config.max_new_tokens"


class Continuing(Generating):
    """The fields of chats and completions."""

    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None

    @property
    def choices(self) -> int:
        """The number of answers."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        """As many as requested."""
        return self.max_tokens

    @property
    def name_of_most(self) -> str:
        """The request's own field takes precedence."""
        return "max_tokens" if self.max_tokens is not None else super().name_of_most


def _of_config(config: object) -> dict[str, Any]:
    """The options in a transformers GenerationConfig, which its own client sends as JSON."""
    try:
        given = json.loads(config) if isinstance(config, str) else {} if config is None else config
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"generation_config is not valid JSON: {error}", param="generation_config") from error
    if not isinstance(given, dict):
        raise RequestError(400, "generation_config is not a JSON object", param="generation_config")
    check_config(given, _Config.model_fields, Continuing.model_fields)
    try:
        asked = _Config.model_validate(given)
    except ValidationError as error:
        raise invalid(error, "generation_config.") from error
    found = {name: value for name, value in asked.model_dump().items() if value is not None}
    if not found.pop("do_sample", None):  # without it, the sampling fields are only defaults
        found = {name: value for name, value in found.items() if name not in _CONFIG_DRAWING}
        found |= {"temperature": 0.0} if asked.do_sample is False else {}
    if stops := found.pop("stop_strings", None):
        found |= {"stop": stops, "include_stop": True}  # as in transformers' text
    return found


_CONFIG_DRAWING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_CONFIG_SHAPING = ("no_repeat_ngram_size", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")


def _config_model() -> Any:
    """The fields of a generation config that are honoured, with the types and ranges of the request's own, and no others."""
    types = get_type_hints(Continuing, include_extras=True)
    own = (*_CONFIG_DRAWING, *_CONFIG_SHAPING)
    names = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_strings": "stop"} | dict(
        zip(own, own, strict=True)
    )
    chosen: dict[str, Any] = {name: (types[field] | None, None) for name, field in names.items()}
    return create_model("_Config", __config__=ConfigDict(strict=True), do_sample=(bool | None, None), **chosen)


_Config = _config_model()


_RESERVED = {
    *("chat_template", "add_generation_prompt", "continue_final_message", "conversation", "tokenize", "padding", "truncation"),
    *(
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "tools",
        *("processor_kwargs", "messages", "self"),
    ),
    *(option.name for option in fields(Options)),
}
"""Arguments of `apply_chat_template` besides a template's own variables."""


def template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """A client's variables of the chat template. Raises RequestError for what only the server sets."""
    if reserved := sorted(_RESERVED & set(given or {})):
        raise unsupported("chat_template_kwargs", f"{', '.join(reserved)} cannot be set by the client")
    return dict(given or {})


def invalid(error: ValidationError, within: str = "") -> RequestError:
    """The error that names the field which a model of pydantic rejects first; `within` prefixes its name."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "constrained"))]
    where = within + ".".join(parts)
    return RequestError(400, f"{where or 'the body'}: {first['msg']}", param=where or None)
