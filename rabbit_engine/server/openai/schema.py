"""Validated requests of OpenAI's API: known fields have types and ranges; a field that would change the answer but is not
supported is refused (the table is `fields`); one that changes nothing is ignored."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, create_model

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.constraints import Forced, forced_form
from rabbit_engine.server.openai.fields import check_config, check_fields, unsupported
from rabbit_engine.server.openai.tools import check_tools
from rabbit_engine.sessions import MOST_ALTERNATIVES, Options

MOST_CHOICES = 16
MOST_INPUTS = 2048
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


def _check_texts(value: Any) -> Any:
    """Check the set of item types: fast for a list of a million."""
    items = value if isinstance(value, list) else [value]
    kinds = set(map(type, items))
    if kinds == {list}:
        kinds = set(map(type, chain.from_iterable(items)))
        good = kinds <= {int}
    else:
        good = kinds <= {str} or (kinds == {int} and isinstance(value, list))
    if not good:
        raise ValueError("must be a text, a list of token ids (integers), or a list of either")
    return value


Texts = Annotated[Any, PlainValidator(_check_texts)]
"""A text, its token ids, or a list of either."""

Kind = TypeVar("Kind", bound="Asked")


class Asked(BaseModel):
    """The field of every request: the model's name."""

    model_config = ConfigDict(extra="ignore")
    path: ClassVar[str]

    model: str


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


class _Request(Generating):
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
    check_config(given, _Config.model_fields, _Request.model_fields)
    try:
        asked = _Config.model_validate(given)
    except ValidationError as error:
        raise _invalid(error, "generation_config.") from error
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
    types = get_type_hints(_Request, include_extras=True)
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


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    path = "/v1/chat/completions"
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    continue_final_message: bool | None = False
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    documents: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The newer name takes precedence."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def name_of_most(self) -> str:
        """The newer one takes precedence."""
        return "max_completion_tokens" if self.max_completion_tokens is not None else super().name_of_most

    @property
    def alternatives(self) -> int | None:
        """None unless `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told about."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def tool_names(self) -> list[str]:
        """The functions that the model may call."""
        functions = [tool.get("function") for tool in self.offered_tools]
        return [str(function.get("name")) for function in functions if isinstance(function, dict)]

    def template(self) -> dict[str, Any]:
        """The chat template's input besides the messages."""
        given = template_variables(self.chat_template_kwargs)
        if self.continue_final_message and self.add_generation_prompt:
            raise unsupported("add_generation_prompt", "a continued message cannot be followed by a generation prompt")
        own = {
            "tools": self.offered_tools,
            "reasoning_effort": self.reasoning_effort,
            "documents": self.documents,
            "continue_final_message": self.continue_final_message,
        }
        if self.add_generation_prompt is not None:
            given["add_generation_prompt"] = self.add_generation_prompt
        return {**given, **{name: value for name, value in own.items() if value}}

    @property
    def most_calls(self) -> int | None:
        """The most calls of an answer: one if the client wants no parallel calls."""
        return 1 if self.parallel_tool_calls is False else None

    def refuse_unsupported(self) -> None:
        """Raise for fields that would change the answer and are not supported."""
        if isinstance(self.tool_choice, dict) and self.tool_choice.get("type") == "allowed_tools":
            raise unsupported("tool_choice", "offer only the tools that are allowed")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        check_tools(self.tools or [])


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    path = "/v1/completions"
    prompt: Texts
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None, BeforeValidator(lambda count: None if count is False else count)
    ] = None
    echo: bool | None = False
    add_special_tokens: bool | None = True
    best_of: int | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @property
    def most_tokens(self) -> int | None:
        """As many as requested; the prompt of a request for none is encoded as for one."""
        return self.max_tokens or (None if self.max_tokens is None else 1)

    @property
    def prompt_alternatives(self) -> int | None:
        """How many alternatives get log probabilities at each position of the prompt; None to compute none there."""
        echoed = self.logprobs if self.echo else None
        found = [count for count in (echoed, self.prompt_logprobs) if count is not None]
        return max(found, default=None)

    @property
    def alternatives(self) -> int | None:
        """As many as requested."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list. Raises for an empty one."""
        return _each(self.prompt, "prompt")

    def refuse_unsupported(self) -> None:
        """Raise for fields that would change the answer and are not supported."""
        if self.best_of is not None and self.best_of != self.choices:
            raise unsupported("best_of", "use n")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(400, "max_tokens: 0 needs echo, or there is nothing to answer", param="max_tokens")
        if self.stream and (self.prompt_alternatives is not None or self.max_tokens == 0):
            raise unsupported("stream", "log probabilities of a prompt, and an echo alone, come in whole answers")


class LoadRequest(Asked):
    """`POST /load_model`."""

    path = "/load_model"


class EmbeddingRequest(Asked):
    """`POST /v1/embeddings`."""

    path = "/v1/embeddings"
    input: Texts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts as a list. Raises for an empty one, and for one that is too long."""
        found = _each(self.input, "input")
        if len(found) > MOST_INPUTS:
            raise RequestError(400, f"{len(found)} texts are more than the limit of {MOST_INPUTS}", param="input")
        return found


def parse(kind: type[Kind], body: dict[str, Any]) -> Kind:
    """The request in a JSON object. Raises RequestError that names the field."""
    others = {name: other.path for other in (ChatRequest, CompletionRequest, EmbeddingRequest) for name in other.model_fields}
    check_fields(body, kind.model_fields, others)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError, within: str = "") -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "constrained"))]
    where = within + ".".join(parts)
    return RequestError(400, f"{where or 'the body'}: {first['msg']}", param=where or None)


def _each(texts: Any, param: str) -> list[str | list[int]]:
    if isinstance(texts, str):
        return [texts]
    if not texts:
        raise RequestError(400, f"there is no {param}", param=param)
    return [texts] if isinstance(texts[0], int) else texts
