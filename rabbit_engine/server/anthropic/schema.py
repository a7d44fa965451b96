"""Validated requests of Anthropic's Messages API. What is in messages, `system` and `tools` is checked where it is converted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rabbit_engine.server.anthropic.fields import MESSAGES
from rabbit_engine.server.errors import RequestError

_MOST = 2**31
"""The largest integer, as in `Options`."""

_MOST_STOPS = 16
_MOST_CHARACTERS = 4096
"""The most characters of a stop sequence."""

_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
"""Anthropic's efforts, and those that chat templates know."""

Asked = TypeVar("Asked", bound="CountRequest")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class ChosenTool(_Strict):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = False


class ThinkingConfig(_Strict):
    """`thinking`. Its budget cannot be kept: `max_tokens` limits reasoning and answer together."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(_Strict):
    """`output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None


class CountRequest(_Strict):
    """`POST /v1/messages/count_tokens`: what makes a prompt."""

    model: str
    messages: Annotated[list[Any], Field(min_length=1)]
    system: Any = None
    tools: list[Any] | None = None
    tool_choice: ChosenTool | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return False

    @property
    def wants_thinking(self) -> bool | None:
        """Whether the model should reason; None leaves it to the chat template."""
        return None if self.thinking is None else self.thinking.type != "disabled"

    @property
    def hides_thinking(self) -> bool:
        """Whether blocks of thinking are sent without their text."""
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def effort(self) -> str | None:
        """The effort of reasoning, as chat templates name it."""
        found = self.output_config and self.output_config.effort
        return _EFFORTS[found] if found else None

    @property
    def format(self) -> dict[str, Any] | None:
        """The form that the answer must have."""
        return (self.output_config and self.output_config.format) or self.output_format

    @property
    def most_calls(self) -> int | None:
        """The most calls of an answer: one if the client wants no parallel calls."""
        return 1 if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use else None


class MessagesRequest(CountRequest):
    """`POST /v1/messages`. `seed` is not Anthropic's: it makes a drawn answer the same each time."""

    max_tokens: Annotated[int, Field(ge=1, le=_MOST)]
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_MOST)] | None = None
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]],
            Field(max_length=_MOST_STOPS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return bool(self.stream)

    def options(self) -> dict[str, Any]:
        """The session's options but the number of tokens."""
        found = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "seed")}
        return {name: value for name, value in (found | {"stop": self.stop_sequences or None}).items() if value is not None}


def parse(kind: type[Asked], body: dict[str, Any]) -> Asked:
    """The request in a JSON object. Raises RequestError that names the field."""
    MESSAGES.check(body, MessagesRequest.model_fields)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(400, f"{where or 'the body'}: {first['msg']}", param=where or None) from error
