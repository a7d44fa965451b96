"""Lines that ask for something other than generated text: their bodies, and the answers, computed by the session's methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rabbit_engine.batches.lines import Task
from rabbit_engine.server.openai.schema import EmbeddingRequest, parse
from rabbit_engine.server.tasks import bodies
from rabbit_engine.server.tasks.bodies import TaskAnswer
from rabbit_engine.server.tasks.schema import ClassifyRequest, RerankRequest, ScoreRequest
from rabbit_engine.sessions import Session
from rabbit_engine.tasks.heads import require_head


def _embed(session: Session, body: dict[str, Any]) -> TaskAnswer:
    asked = parse(EmbeddingRequest, body)
    return bodies.embed(session, asked.model, asked)


def _classify(session: Session, body: dict[str, Any]) -> TaskAnswer:
    asked = parse(ClassifyRequest, body)
    return bodies.classify(session, asked.model, asked)


def _rerank(session: Session, body: dict[str, Any]) -> TaskAnswer:
    asked = parse(RerankRequest, body)
    return bodies.rerank(session, asked.model, asked)


def _score(session: Session, body: dict[str, Any]) -> TaskAnswer:
    asked = parse(ScoreRequest, body)
    return bodies.score(session, asked.model, asked)


COMPUTED: Mapping[Task, Callable[[Session, dict[str, Any]], TaskAnswer]] = MappingProxyType(
    {"embed": _embed, "classify": _classify, "rerank": _rerank, "score": _score}
)
"""The tasks of texts that are not continued, from the body of a line. They raise RequestError, or as the session does."""

_SEQUENCES, _CAUSAL = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
_HEADS: Mapping[Task, tuple[str, ...]] = MappingProxyType(
    {"classify": (_SEQUENCES,), "rerank": (_SEQUENCES, _CAUSAL), "score": (_CAUSAL, "AutoModelForImageTextToText")}
)


def require_task(model: object, task: Task | None) -> None:
    """Raise WrongHeadError for a model without a head for a task: every line would fail."""
    if heads := _HEADS.get(task) if task is not None else None:
        require_head(model, *heads)
