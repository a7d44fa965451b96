"""Validated requests of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.constraints import FREE, Forced, format_of
from rabbit_engine.server.openai.fields import unsupported
from rabbit_engine.server.openai.generating import MOST, Generating, template_variables
from rabbit_engine.server.openai.tools import allowed_of
from rabbit_engine.server.responses.items import read_items
from rabbit_engine.sessions import MOST_ALTERNATIVES

_NOTHING_STORED = "nothing is stored: send all items in input"
LOGPROBS = "message.output_text.logprobs"


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class TextConfig(_Loose):
    """`text`: the form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningConfig(_Loose):
    """`reasoning`; summaries are not written, the reasoning itself is part of the answer."""

    effort: str | None = None
    summary: str | None = None


class Obfuscation(BaseModel):
    """Padding of events, which is not sent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_obfuscation: bool | None = True


class ResponseRequest(Generating):
    """`POST /v1/responses`."""

    path: ClassVar[str] = "/v1/responses"
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    metadata: dict[str, str] | None = None
    stream_options: Obfuscation | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = False
    max_tool_calls: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """As many as requested."""
        return self.max_output_tokens

    @property
    def name_of_most(self) -> str:
        """The request's own field takes precedence."""
        return "max_output_tokens" if self.max_output_tokens is not None else super().name_of_most

    @property
    def alternatives(self) -> int | None:
        """None unless the log probabilities are requested."""
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None

    @property
    def effort(self) -> str | None:
        """How much to reason, as the template's variable `reasoning_effort`."""
        return self.reasoning.effort if self.reasoning is not None else None

    @property
    def most_calls(self) -> int | None:
        """The most calls of an answer: one if the client wants no parallel calls."""
        return 1 if self.parallel_tool_calls is False else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told about: those that it may call, in the form of chats. Raises RequestError."""
        found = [_as_chat_tool(tool, f"tools.{index}") for index, tool in enumerate(self.tools or [])]
        return allowed_of(self.tool_choice, found)

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """The tools as a response repeats them."""
        return [{"parameters": None, "strict": False, **tool, "type": "function"} for tool in self.tools or []]

    @property
    def told_format(self) -> dict[str, Any]:
        """The form of the answer as a response repeats it."""
        return (self.text.format if self.text is not None else None) or {"type": "text"}

    @property
    def form(self) -> Forced:
        """The form that the answer must have. Raises RequestError."""
        own, other = format_of("text.format", self.told_format), super().form
        if own is not None and other is not FREE:
            raise RequestError(400, f"text.format and {other.field}: an answer follows only one of them", param=other.field)
        return own or other

    def template_kwargs(self) -> dict[str, Any]:
        """The chat template's variables that the client sets."""
        return template_variables(self.chat_template_kwargs)

    def conversation_messages(self, *, with_images: bool) -> list[dict[str, Any]]:
        """The messages in the form of chat templates. Raises RequestError."""
        return read_items(self.input, self.instructions, with_images=with_images)

    def refuse_unsupported(self) -> None:
        """Raise RequestError for fields that would change the answer and are not supported."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name):
                raise unsupported(name, _NOTHING_STORED)
        if self.background:
            raise unsupported("background", _NOTHING_STORED + ", and stream the answer")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise unsupported("text.verbosity", "ask for it in words")
        for index, tool in enumerate(self.tools or []):
            _as_chat_tool(tool, f"tools.{index}")


def _as_chat_tool(tool: Any, where: str) -> dict[str, Any]:
    """A function as chat templates take it. Raises RequestError for what is not a function."""
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(400, f'{where}: a tool is {{"type": "function", "name": ...}}', param=where)
    if kind != "function":
        told = f"{where}: the tool {kind[:60]!r} is not supported: the server has no tools of its own, it calls only functions"
        raise RequestError(400, told, param=where, code="unsupported_parameter")
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(400, f"{where}.name: a function needs a name", param=f"{where}.name")
    for key, expected in (("description", str), ("parameters", Mapping), ("strict", bool)):
        if tool.get(key) is not None and not isinstance(tool[key], expected):
            raise RequestError(400, f"{where}.{key}: wrong type", param=f"{where}.{key}")
    own = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
    return {"type": "function", "function": own}
