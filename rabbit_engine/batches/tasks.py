"""Lines that ask for something other than generated text: their bodies, and the answers, computed by the session's methods."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from rabbit_engine.batches.lines import Task
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai import wire
from rabbit_engine.server.openai.schema import Asked, EmbeddingRequest, parse
from rabbit_engine.sessions import Session
from rabbit_engine.tasks.heads import require_head

Body = dict[str, object]
Some = Annotated[list[Any], Field(min_length=1)]


class ClassifyRequest(Asked):
    """`input` is a text or a list of texts or pairs of texts; `activation` and `truncation` as of `Session.classify`."""

    path = "/v1/classify"
    input: str | Some
    activation: str | None = None
    truncation: bool = False


class RerankRequest(Asked):
    """`top_n`, `instruction`, `activation` and `truncation` as of `Session.rerank`."""

    path = "/v1/rerank"
    query: str
    documents: Annotated[list[str], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    instruction: str | None = None
    activation: str | None = None
    truncation: bool = False


class ScoreRequest(Asked):
    """`input` is a text or a list of texts or pairs, or there are a `context` and its `continuation`."""

    path = "/v1/score"
    input: str | Some | None = None
    context: str | None = None
    continuation: str | None = None
    truncation: bool = False

    @property
    def texts(self) -> list[Any]:
        """What `Session.score` takes. Raises RequestError unless one of both forms is given."""
        if self.input is not None and self.context is None and self.continuation is None:
            return [self.input] if isinstance(self.input, str) else [_pair(text) for text in self.input]
        if self.input is None and self.continuation is not None:
            return [(self.context or "", self.continuation)]
        raise RequestError(400, "give input, or context and continuation", param="input")


def _pair(text: Any) -> Any:
    return tuple(text) if isinstance(text, list) and len(text) == 2 and all(isinstance(part, str) for part in text) else text


def _embed(session: Session, body: dict[str, Any]) -> Body:
    asked = parse(EmbeddingRequest, body)
    work = session.embedding(asked.inputs)
    vectors = work.run(asked.dimensions)
    return wire.embeddings(asked.model, vectors.tolist(), asked.encoding_format or "float", work.tokens)


def _classify(session: Session, body: dict[str, Any]) -> Body:
    asked = parse(ClassifyRequest, body)
    texts = [asked.input] if isinstance(asked.input, str) else [_pair(text) for text in asked.input]
    found = session.classify(texts, activation=asked.activation, truncation=asked.truncation)
    data = [
        {
            "index": index,
            "label": each.label,
            "score": each.score,
            "scores": [{"label": pair.label, "score": pair.score} for pair in each.scores],
        }
        for index, each in enumerate(found)
    ]
    return _listed("classify", asked.model, data)


def _rerank(session: Session, body: dict[str, Any]) -> Body:
    asked = parse(RerankRequest, body)
    found = session.rerank(
        asked.query,
        asked.documents,
        top=asked.top_n,
        instruction=asked.instruction,
        activation=asked.activation,
        truncation=asked.truncation,
    )
    ranked = sorted(found, key=lambda each: -each.logit)
    results = [{"index": each.index, "relevance_score": each.score} for each in ranked]
    return {"id": f"rerank-{uuid.uuid4().hex}", "model": asked.model, "results": results}


def _score(session: Session, body: dict[str, Any]) -> Body:
    asked = parse(ScoreRequest, body)
    found = session.score(asked.texts, truncation=asked.truncation)
    data = [
        {
            "index": index,
            "logprob": each.logprob,
            "tokens": each.tokens,
            "is_greedy": each.is_greedy,
            "token_logprobs": list(each.token_logprobs),
        }
        for index, each in enumerate(found)
    ]
    return _listed("score", asked.model, data)


def _listed(prefix: str, model: str, data: Sequence[Mapping[str, object]]) -> Body:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "model": model, "data": list(data)}


COMPUTED: Mapping[Task, Callable[[Session, dict[str, Any]], Body]] = MappingProxyType(
    {"embed": _embed, "classify": _classify, "rerank": _rerank, "score": _score}
)
"""The tasks that a session computes while the caller waits: the answer to a body. They raise RequestError, or as it does."""

_SEQUENCES, _CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
_HEADS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {"classify": (_SEQUENCES,), "rerank": (_SEQUENCES, _CAUSAL), "score": (_CAUSAL, "AutoModelForImageTextToText")}
)


def require_task(model: object, task: Task | None) -> None:
    """Raise WrongHeadError for a model without a head for a task: every line would fail."""
    if heads := _HEADS.get(task) if task is not None else None:
        require_head(model, *heads)
