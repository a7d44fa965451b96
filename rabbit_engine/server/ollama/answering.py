"""Answers to chats and prompts, streamed and whole, and embeddings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeVar

from rabbit_engine.server.errors import told_error
from rabbit_engine.server.flow import AnswerFlow
from rabbit_engine.server.ollama.asking import Question
from rabbit_engine.server.ollama.schema import OllamaChat, OllamaEmbed, OllamaGenerate
from rabbit_engine.server.ollama.wire import CallGatherer, OllamaWire, Stopwatch, line
from rabbit_engine.server.service import Taken
from rabbit_engine.server.streams import Silence
from rabbit_engine.sessions import Events, Reply
from rabbit_engine.sessions.embeddings import EmbeddingWork

Spoken = TypeVar("Spoken", OllamaChat, OllamaGenerate)
Embedding = Taken[OllamaEmbed, EmbeddingWork | None]


async def answer_stream(
    taken: Taken[Spoken, Question | None], question: Question, events: Events, wire: OllamaWire
) -> AsyncIterator[str]:
    """An answer as it is generated; an error is the last line."""
    flow, calls = AnswerFlow(question.form), CallGatherer()
    try:
        async for heard in taken.follow(events):
            if isinstance(heard, Silence):
                yield line(wire.silence(heard))
                continue
            _, event = heard
            for part in wire.parts(flow.end() if isinstance(event, Reply) else flow.push(event), calls):
                yield line(part)
            if isinstance(event, Reply):
                for part in wire.rest(calls):
                    yield line(part)
                yield line(wire.last(wire.part(), event, context_of(question, event)))
    except Exception as error:  # noqa: BLE001 - the status has been sent
        yield line({"error": str(told_error(error))})


async def whole_answer(
    taken: Taken[Spoken, Question | None], question: Question, events: Events, wire: OllamaWire
) -> dict[str, object]:
    """An answer as one object."""
    (reply,) = await taken.replies(events, 1)
    return wire.whole(AnswerFlow.read(question.form, reply), reply, context_of(question, reply))


def context_of(question: Question, reply: Reply) -> list[int] | None:
    """The tokens of the conversation so far, if the client may go on from them."""
    return [*question.request.prompt.ids, *reply.tokens] if question.gives_context else None


async def vectors_of(taken: Embedding) -> list[list[float]]:
    """Vectors of texts, as `Session.embed` gives them; none without a text."""
    if taken.prepared is None:
        return []
    found = await taken.prepared.awaited()
    return [[float(value) for value in row] for row in found.tolist()]


async def embeddings_body(taken: Embedding, watch: Stopwatch, name: str) -> dict[str, object]:
    """The answer of `/api/embed`."""
    vectors = await vectors_of(taken)
    tokens = taken.prepared.tokens if taken.prepared is not None else 0
    return {"model": name, "embeddings": vectors, **watch.durations(), "prompt_eval_count": tokens}


async def old_embedding_body(taken: Embedding) -> dict[str, object]:
    """The answer of `/api/embeddings`: one vector, an empty one without a text."""
    return {"embedding": next(iter(await vectors_of(taken)), [])}
