"""Requests of OpenAI's interface, checked: what is known has its type and range, what would change the answer and cannot be
done here is refused, what changes nothing is ignored."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions import MOST_ALTERNATIVES, Options, read_messages

MOST_CHOICES = 16
MOST_INPUTS = 2048
_MOST_STOPS = 16

Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or []),
]
Texts = str | list[str] | list[int] | list[list[int]]
"""A text, or its token ids, or several of either."""

Kind = TypeVar("Kind", bound="Asked")


class Asked(BaseModel):
    """What every request has: the model's name."""

    model_config = ConfigDict(extra="ignore")

    model: str


class _Request(Asked):
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[Stops, Field(max_length=_MOST_STOPS)] = []
    generation_config: str | dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        """How many answers."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer at most."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Log probabilities of so many alternatives; None for no log probabilities at all."""
        return None

    def options(self) -> dict[str, Any]:
        """The same in a session's words; the fields of `generation_config` count where the request's own say nothing."""
        own = {
            "max_new_tokens": self.most_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k if self.top_k is not None and self.top_k > 0 else None,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": tuple(self.stop),
            "logprobs": self.alternatives,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
        }
        return {**_of_config(self.generation_config), **{name: value for name, value in own.items() if value is not None}}


def _of_config(config: str | dict[str, Any] | None) -> dict[str, Any]:
    """What a GenerationConfig of transformers says (its own client sends one, as JSON)."""
    try:
        given = json.loads(config) if isinstance(config, str) else config or {}
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"generation_config is no JSON: {error}", param="generation_config") from error
    if not isinstance(given, dict):
        raise RequestError(400, "generation_config is no JSON object", param="generation_config")
    if given.get("do_sample") is False:
        given = {**given, "temperature": 0.0, "top_p": None, "top_k": None, "min_p": None}
    elif given.get("do_sample") is None:  # its other fields are defaults that nobody chose
        given = {"max_new_tokens": given.get("max_new_tokens"), "repetition_penalty": given.get("repetition_penalty")}
    kinds: dict[str, type | tuple[type, ...]] = dict.fromkeys(("max_new_tokens", "top_k"), int)
    kinds |= dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), (int, float))
    found = {name: given[name] for name, kind in kinds.items() if isinstance(given.get(name), kind) and given[name] is not True}
    return {name: value for name, value in found.items() if not (name == "top_k" and value == 0)}


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
"""What `apply_chat_template` takes beside a template's own variables."""


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    functions: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The newer name counts."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """None unless `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def tool_names(self) -> list[str]:
        """The functions that it may call."""
        functions = [tool.get("function") for tool in self.offered_tools]
        return [str(function.get("name")) for function in functions if isinstance(function, dict)]

    def template(self) -> dict[str, Any]:
        """What goes to the chat template beside the messages."""
        given = dict(self.chat_template_kwargs or {})
        if reserved := sorted(_RESERVED & set(given)):
            raise _unsupported("chat_template_kwargs", f"{', '.join(reserved)} is not the client's to choose")
        return {**given, "tools": self.offered_tools} if self.offered_tools else given

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them: text instead of parts, arguments as objects."""
        try:
            return read_messages(self.messages)
        except ConfigurationError as error:
            raise RequestError(400, str(error), param=str(error).partition(":")[0]) from error

    def refuse_unsupported(self) -> None:
        """Raise for what would change the answer and cannot be done."""
        kind = (self.response_format or {}).get("type", "text")
        if kind != "text":
            raise _unsupported(
                "response_format", f"{kind!r} would need constrained decoding, which is not here: ask for JSON in words"
            )
        if self.functions:
            raise _unsupported("functions", "use tools")
        if self.tool_choice not in (None, "none", "auto"):
            raise _unsupported("tool_choice", 'only "none" and "auto" are possible: nothing forces a model to call')


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: Texts
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None

    @property
    def alternatives(self) -> int | None:
        """As many as asked for."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt by itself. Raises for an empty list."""
        return _each(self.prompt, "prompt")

    def refuse_unsupported(self) -> None:
        """Raise for what would change the answer and cannot be done."""
        if self.suffix:
            raise _unsupported("suffix", "text is continued at its end only")
        if self.best_of is not None and self.best_of != self.choices:
            raise _unsupported("best_of", "use n")
        if self.echo and self.logprobs is not None:
            raise _unsupported("logprobs", "with echo the prompt's would be needed, which are not computed")


class EmbeddingRequest(Asked):
    """`POST /v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Every text by itself. Raises for an empty list, and for one that is too long."""
        found = _each(self.input, "input")
        if len(found) > MOST_INPUTS:
            raise RequestError(400, f"{len(found)} texts are more than {MOST_INPUTS}", param="input")
        return found


def parse(kind: type[Kind], body: Any) -> Kind:
    """The request in a JSON value. Raises RequestError that names the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-", "constrained")))
        raise RequestError(400, f"{where or 'the body'}: {first['msg']}", param=where or None) from error


def _each(texts: Texts, param: str) -> list[str | list[int]]:
    if isinstance(texts, str):
        return [texts]
    if not texts:
        raise RequestError(400, f"there is no {param}", param=param)
    whole = cast("list[Any]", texts)
    return [whole] if isinstance(whole[0], int) else whole


def _unsupported(param: str, why: str) -> RequestError:
    return RequestError(400, f"{param} is not supported: {why}", param=param, code="unsupported_parameter")
