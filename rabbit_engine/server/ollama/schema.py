"""Validated requests of Ollama's API: known fields have types and ranges; the others are as `fields` decides."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.ollama.durations import read_duration
from rabbit_engine.server.ollama.fields import OPTIONS, REQUEST
from rabbit_engine.server.openai.tools import check_tools
from rabbit_engine.sessions import MOST_ALTERNATIVES

MOST_INPUTS = 2048
_MOST_STOPS = 64
_MOST_CHARACTERS = 4096
_MOST = 2**31
_UNSEEDED = -1
"""The seed with which Ollama draws one itself."""

Level = Literal["low", "medium", "high", "max"]
Chosen = TypeVar("Chosen", bound="OllamaRequest")

_Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]],
    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or []),
]
_KeepAlive = Annotated[float | None, BeforeValidator(read_duration)]
_Format = Annotated[dict[str, Any] | Literal["json"] | None, BeforeValidator(lambda given: given or None)]


class OllamaOptions(BaseModel):
    """`options` of a request. `num_ctx` is not needed: a prompt and its answer have the room that the server was started with."""

    model_config = ConfigDict(extra="ignore")

    num_ctx: int | None = None
    num_predict: Annotated[int, Field(le=_MOST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(le=_MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[_Stops, Field(max_length=_MOST_STOPS)] = []
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repeat_last_n: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    @property
    def is_unlimited(self) -> bool:
        """Whether the answer may fill all the room: Ollama's -1 and -2, and 0."""
        return self.num_predict is not None and self.num_predict <= 0

    def named(self) -> dict[str, Any]:
        """The same under the session's names."""
        penalised = self.repeat_last_n != 0
        found = {
            "max_new_tokens": None if self.is_unlimited else self.num_predict,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "seed": None if self.seed == _UNSEEDED else self.seed,
            "stop": self.stop or None,
            "repetition_penalty": self.repeat_penalty if penalised else None,
            "presence_penalty": self.presence_penalty if penalised else None,
            "frequency_penalty": self.frequency_penalty if penalised else None,
        }
        return {name: value for name, value in found.items() if value is not None}


class OllamaRequest(BaseModel):
    """The fields of every request; without a `model` it is for the default one."""

    model_config = ConfigDict(extra="ignore")
    path: ClassVar[str]

    model: Annotated[str, BeforeValidator(lambda given: "" if given is None else given)] = ""
    keep_alive: _KeepAlive = None

    @property
    def streams(self) -> bool:
        """Whether the answer is a stream."""
        return False

    @property
    def is_empty(self) -> bool:
        """Whether it only loads the model, or unloads it with a `keep_alive` of 0."""
        return False


class _Answered(OllamaRequest):
    options: OllamaOptions | None = None
    stream: bool | None = True
    format: _Format = None
    think: bool | Level | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @property
    def streams(self) -> bool:
        """Unless the client says no."""
        return self.stream is not False

    @property
    def chosen(self) -> OllamaOptions:
        """The options, if only defaults."""
        return self.options or OllamaOptions()

    def named_options(self) -> dict[str, Any]:
        """The session's options."""
        found = self.chosen.named()
        if self.logprobs:
            found["logprobs"] = self.top_logprobs or 0
        if self.format is not None:
            found["schema"] = True if self.format == "json" else self.format
        return found


class OllamaChat(_Answered):
    """`POST /api/chat`."""

    path = "/api/chat"
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Without messages."""
        return not self.messages

    @property
    def tool_names(self) -> list[str]:
        """The functions that the model may call."""
        return [str(tool["function"]["name"]) for tool in self.tools or []]


class OllamaGenerate(_Answered):
    """`POST /api/generate`."""

    path = "/api/generate"
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = False
    context: list[int] | None = None
    images: list[str] | None = None

    @property
    def is_empty(self) -> bool:
        """Without a prompt."""
        return not self.prompt


class OllamaEmbed(OllamaRequest):
    """`POST /api/embed`."""

    path = "/api/embed"
    input: str | list[str] | None = None
    truncate: bool | None = True
    dimensions: Annotated[int, Field(ge=1)] | None = None
    options: dict[str, Any] | None = None

    @property
    def texts(self) -> list[str]:
        """The texts; there may be none, or empty ones are left to the session."""
        return [self.input] * bool(self.input) if isinstance(self.input, str) else self.input or []

    @property
    def is_empty(self) -> bool:
        """Without a text."""
        return not self.texts


class OllamaOldEmbed(OllamaEmbed):
    """`POST /api/embeddings`."""

    path = "/api/embeddings"
    prompt: str | None = None

    @property
    def texts(self) -> list[str]:
        """The prompt alone."""
        return [self.prompt] if self.prompt else []


class OllamaShow(OllamaRequest):
    """`POST /api/show`; older clients say `name`."""

    path = "/api/show"
    name: str | None = None
    verbose: bool | None = False

    @property
    def asked(self) -> str:
        """The model's name."""
        return self.model or self.name or ""


def parse(kind: type[Chosen], body: dict[str, Any]) -> Chosen:
    """The request in a JSON object. Raises RequestError that names the field."""
    REQUEST.check(body, kind.model_fields)
    given = body.get("options")
    if isinstance(given, dict) and issubclass(kind, _Answered):
        OPTIONS.check(given, [name for name in OllamaOptions.model_fields if name != "repeat_last_n" or given.get(name) == 0])
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from error
    if isinstance(found, OllamaChat):
        check_tools(found.tools or [])
    if isinstance(found, OllamaEmbed) and len(found.texts) > MOST_INPUTS:
        raise RequestError(400, f"{len(found.texts)} texts are more than the limit of {MOST_INPUTS}", param="input")
    return found


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    parts = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "dict[", "function-", "constrained"))]
    where = ".".join(part for part in parts if part not in ("bool", "str", "float", "literal['json']"))
    told = first["msg"].removeprefix("Value error, ").removesuffix(f" or instance of {OllamaOptions.__name__}")
    return RequestError(400, f"{where or 'the body'}: {told}", param=where or None)
