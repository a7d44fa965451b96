"""Validated requests for labels, ranks and scores; `activation` and `truncation` are as of the session's methods."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.generating import Asked
from rabbit_engine.server.openai.schema import MOST_INPUTS

Some = Annotated[list[Any], Field(min_length=1, max_length=MOST_INPUTS)]


class TextDocument(BaseModel):
    """A document in an object, as Cohere's and Jina's clients may send it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    text: str


Document = str | TextDocument
Documents = Annotated[list[Document], Field(min_length=1, max_length=MOST_INPUTS)]


class _TaskRequest(Asked):
    activation: str | None = None
    use_activation: bool | None = None
    truncation: bool = False

    @property
    def function(self) -> str | None:
        """The activation, also if it is only turned off."""
        return "none" if self.use_activation is False else self.activation


class ClassifyRequest(_TaskRequest):
    """`input` is a text or a list of texts or pairs of texts."""

    path: ClassVar[str] = "/v1/classify"
    input: str | Some

    @property
    def texts(self) -> list[Any]:
        """As `Session.classify` takes them."""
        return [self.input] if isinstance(self.input, str) else [_pair(text) for text in self.input]


class RerankRequest(_TaskRequest):
    """Documents to sort by their relevance to a query; `instruction` is as of `Session.rerank`."""

    path: ClassVar[str] = "/v1/rerank"
    query: str
    documents: Documents
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    instruction: str | None = None


class ScoreRequest(_TaskRequest):
    """How relevant texts are to others: `text_1` and `text_2`, or `queries` and `documents`, one for all or one for each.

    Or how likely texts are: `input`, a text or a list of texts or pairs, or a `context` and its `continuation`.
    """

    path: ClassVar[str] = "/v1/score"
    text_1: Document | Documents | None = None
    text_2: Document | Documents | None = None
    queries: Document | Documents | None = None
    documents: Document | Documents | None = None
    instruction: str | None = None
    input: str | Some | None = None
    context: str | None = None
    continuation: str | None = None

    @property
    def pairs(self) -> list[tuple[str, str]] | None:
        """The pairs whose relevance is asked for; None if likelihoods are. Raises RequestError for half of one."""
        pairs = (("text_1", self.text_1, "text_2", self.text_2), ("queries", self.queries, "documents", self.documents))
        given = [(one, first, two, second) for one, first, two, second in pairs if first is not None or second is not None]
        if not given:
            return None
        one, first, two, second = given[0]
        if first is None or second is None or len(given) > 1 or self.input is not None or self.continuation is not None:
            raise RequestError(400, f"give {one} and {two}, and no other texts", param=one if first is None else two)
        firsts, seconds = _texts(first), _texts(second)
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        if len(firsts) != len(seconds):
            raise RequestError(400, f"{one} has {len(firsts)} texts and {two} {len(seconds)}: give one, or as many", param=one)
        return list(zip(firsts, seconds, strict=True))

    @property
    def texts(self) -> list[Any]:
        """What `Session.score` takes. Raises RequestError unless one of both forms is given."""
        if self.input is not None and self.context is None and self.continuation is None:
            return [self.input] if isinstance(self.input, str) else [_pair(text) for text in self.input]
        if self.input is None and self.continuation is not None:
            return [(self.context or "", self.continuation)]
        told = "give text_1 and text_2 for relevance, or input, or context and continuation, for likelihoods"
        raise RequestError(400, told, param="input")


def _pair(text: Any) -> Any:
    return tuple(text) if isinstance(text, list) and len(text) == 2 and all(isinstance(part, str) for part in text) else text


def _texts(given: Document | list[Document]) -> list[str]:
    return [text_of(each) for each in (given if isinstance(given, list) else [given])]


def text_of(document: Document) -> str:
    """The text of a document."""
    return document if isinstance(document, str) else document.text
