"""Validated requests of OpenAI's API: known fields have types and ranges; a field that would change the answer but is not
supported is refused (the table is `fields`); one that changes nothing is ignored."""

from __future__ import annotations

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.fields import check_fields, unsupported
from rabbit_engine.server.openai.generating import MOST, Asked, Continuing, Kind, invalid, template_variables
from rabbit_engine.server.openai.tools import allowed_of, check_tools
from rabbit_engine.sessions import MOST_ALTERNATIVES

MOST_INPUTS = 2048


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


class ChatRequest(Continuing):
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
        """The tools that the model is told about: those that it may call. Raises RequestError."""
        return allowed_of(self.tool_choice, self.tools or [])

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
        if self.top_logprobs and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        check_tools(self.tools or [])


class CompletionRequest(Continuing):
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
        if self.stream and self.prompt_logprobs is not None:
            raise unsupported("stream", "prompt_logprobs come in whole answers: stream echo with logprobs")


class LoadRequest(Asked):
    """`POST /load_model`."""

    path = "/load_model"

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return True


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
        raise invalid(error) from error


def _each(texts: Any, param: str) -> list[str | list[int]]:
    if isinstance(texts, str):
        return [texts]
    if not texts:
        raise RequestError(400, f"there is no {param}", param=param)
    return [texts] if isinstance(texts[0], int) else texts
