"""The answers to requests for labels, ranks and scores: for the server, and for batches."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai import wire
from rabbit_engine.server.openai.schema import EmbeddingRequest
from rabbit_engine.server.tasks.schema import ClassifyRequest, RerankRequest, ScoreRequest, text_of
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.forwards import Started
from rabbit_engine.sessions.works import Work
from rabbit_engine.tasks.classification import Classification, labeller_of
from rabbit_engine.tasks.heads import SEQUENCES, has_head
from rabbit_engine.tasks.reranking import Relevance
from rabbit_engine.tasks.scoring import Score

Body = dict[str, object]


@dataclass(frozen=True, slots=True)
class TaskAnswer:
    """Encoded texts, and the body of an answer from what they give."""

    work: Work[Any, Any]
    body: Callable[[Any], Body]

    def start(self, tell: Callable[[], object]) -> Started[Any]:
        """Begin, for a caller that does not wait; as `Work.start`."""
        return self.work.start(tell)

    def ended(self, started: Started[Any]) -> Body:
        """The body of what has ended. Raises what computing raises."""
        return self.body(self.work.finish(started.results()))

    async def awaited(self) -> Body:
        """The body, for an event loop."""
        return self.body(await self.work.awaited())


def embed(session: Session, model: str, asked: EmbeddingRequest) -> TaskAnswer:
    """Vectors. Raises as `Session.embed`."""
    work = session.embedding(asked.inputs, asked.dimensions)
    encoding = asked.encoding_format or "float"
    return TaskAnswer(work, lambda vectors: wire.embeddings(model, vectors.tolist(), encoding, work.tokens))


def classify(session: Session, model: str, asked: ClassifyRequest) -> TaskAnswer:
    """Labels. Raises as `Session.classify`."""
    work = session.classifying(asked.texts, activation=asked.function, truncation=asked.truncation)
    labels = labeller_of(session.model.config).labels

    def body(found: Sequence[Classification]) -> Body:
        return _listed("classify", model, [_labels(index, each, labels) for index, each in enumerate(found)], work.tokens)

    return TaskAnswer(work, body)


def _labels(index: int, found: Classification, labels: Sequence[str]) -> Body:
    scores = {pair.label: pair.score for pair in found.scores}
    return {
        "index": index,
        "label": found.label,
        "score": found.score,
        "probs": [scores[label] for label in labels],
        "num_classes": len(labels),
        "scores": [{"label": pair.label, "score": pair.score} for pair in found.scores],
    }


def rerank(session: Session, model: str, asked: RerankRequest, *, with_documents: bool = False) -> TaskAnswer:
    """Documents, the most relevant first; with their texts if the request says so, or else `with_documents`.

    Raises as `Session.rerank`.
    """
    documents = [text_of(document) for document in asked.documents]
    work = session.ranking(
        [(asked.query, document) for document in documents],
        instruction=asked.instruction,
        activation=asked.function,
        truncation=asked.truncation,
    )
    shown = with_documents if asked.return_documents is None else asked.return_documents

    def body(found: Sequence[Relevance]) -> Body:
        ranked = sorted(found, key=lambda each: -each.logit)[: asked.top_n]
        results: list[Body] = [{"index": each.index, "relevance_score": each.score} for each in ranked]
        for each in results if shown else ():
            each["document"] = {"text": documents[int(str(each["index"]))]}
        head = {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": model}
        return {**head, "results": results, "usage": wire.tokens_read(work.tokens)}

    return TaskAnswer(work, body)


def score(session: Session, model: str, asked: ScoreRequest) -> TaskAnswer:
    """Relevance of pairs, or likelihoods of texts; of pairs for a checkpoint that embeds, how similar their vectors are.

    Raises as `Session.rerank`, `Session.embed` and `Session.score`.
    """
    pairs = asked.pairs
    if pairs is None:
        return _likelihoods(session, model, asked)
    if session.embedder is not None and not has_head(session.model, SEQUENCES):
        return _similarities(session, model, asked, pairs)
    work = session.ranking(pairs, instruction=asked.instruction, activation=asked.function, truncation=asked.truncation)
    return TaskAnswer(work, lambda found: _scores(model, [each.score for each in found], work.tokens))


def _similarities(session: Session, model: str, asked: ScoreRequest, pairs: Sequence[tuple[str, str]]) -> TaskAnswer:
    """The cosine of the angle between the vectors of each pair; each text is embedded once."""
    if asked.function not in (None, "none") or asked.instruction is not None:
        raise RequestError(400, f"{model} embeds texts: it takes no activation and no instruction", param="activation")
    places = {text: index for index, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
    work = session.embedding(list(places), truncation=asked.truncation)

    def body(vectors: torch.Tensor) -> Body:
        firsts, seconds = (vectors[[places[pair[side]] for pair in pairs]] for side in (0, 1))
        return _scores(model, torch.cosine_similarity(firsts, seconds, dim=-1).tolist(), work.tokens)

    return TaskAnswer(work, body)


def _scores(model: str, scores: Sequence[float], tokens: int) -> Body:
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
    return _listed("score", model, data, tokens)


def _likelihoods(session: Session, model: str, asked: ScoreRequest) -> TaskAnswer:
    if asked.function is not None or asked.instruction is not None:
        raise RequestError(400, "activation and instruction are for text_1 and text_2", param="activation")
    work = session.scoring(asked.texts, truncation=asked.truncation)

    def body(found: Sequence[Score]) -> Body:
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
        return _listed("score", model, data, work.tokens)

    return TaskAnswer(work, body)


def _listed(prefix: str, model: str, data: Sequence[Mapping[str, object]], tokens: int) -> Body:
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model}
    return {**head, "data": list(data), "usage": wire.tokens_read(tokens)}
