"""The endpoints of Ollama's API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rabbit_engine import __version__
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.ollama.answering import (
    Embedding,
    Spoken,
    answer_stream,
    embeddings_body,
    old_embedding_body,
    whole_answer,
)
from rabbit_engine.server.ollama.asking import Question, chat_question, generate_question
from rabbit_engine.server.ollama.cards import Cards, tagged
from rabbit_engine.server.ollama.schema import (
    Chosen,
    OllamaChat,
    OllamaEmbed,
    OllamaGenerate,
    OllamaOldEmbed,
    OllamaRequest,
    OllamaShow,
    parse,
)
from rabbit_engine.server.ollama.wire import NDJSON, OllamaWire, Stopwatch, line
from rabbit_engine.server.openapi import body_of
from rabbit_engine.server.outgoing import IN_JSON, KeepAlive
from rabbit_engine.server.service import Service
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.embeddings import EmbeddingWork

API_VERSION = "0.12.11"
"""The release of Ollama whose API this is: clients refuse older ones than they know."""

_FIXED = "the server's models are those that it was started with: rabbit serve NAME=MODEL"


class OllamaEndpoints:
    """Chat, generate, embeddings, and what is served."""

    paths: tuple[str, ...] = ("/api/",)

    def __init__(self, service: Service) -> None:
        self._service, self._host, self._cards = service, service.host, Cards(service.host)

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.post("/api/chat", openapi_extra=body_of(OllamaChat, streams=NDJSON))(self.chat)
        app.post("/api/generate", openapi_extra=body_of(OllamaGenerate, streams=NDJSON))(self.generate)
        app.post("/api/embed", openapi_extra=body_of(OllamaEmbed))(self.embed)
        app.post("/api/embeddings", openapi_extra=body_of(OllamaOldEmbed))(self.embed_old)
        app.post("/api/show", openapi_extra=body_of(OllamaShow))(self.show)
        for path, endpoint in (("/api/tags", self.tags), ("/api/version", self.version)):
            app.get(path)(endpoint)
            app.head(path, include_in_schema=False)(endpoint)
        app.get("/api/ps")(self.running)
        app.head("/", include_in_schema=False)(self.alive)
        for path in ("pull", "create", "push", "copy"):
            app.post(f"/api/{path}", include_in_schema=False)(self.refuse)
        app.delete("/api/delete", include_in_schema=False)(self.refuse)

    def error(self, error: RequestError) -> Response:
        """An error as Ollama's clients read it."""
        return JSONResponse({"error": str(error)}, error.status, error.headers())

    def stream_error(self, error: RequestError) -> str:
        """The only line."""
        return line({"error": str(error)})

    async def chat(self, request: Request) -> Response:
        """`POST /api/chat`."""
        return await self._answer(request, OllamaChat, "chat", chat_question)

    async def generate(self, request: Request) -> Response:
        """`POST /api/generate`."""
        return await self._answer(request, OllamaGenerate, "generate", generate_question)

    async def _answer(
        self,
        request: Request,
        kind: type[Spoken],
        called: Literal["chat", "generate"],
        question_of: Callable[[Session, str, Spoken], Question | None],
    ) -> Response:
        watch = Stopwatch()
        asked = await self._read(request, kind, watch)

        def prepare(served: Served, asked: Spoken) -> Question | None:
            watch.load()
            return question_of(served.session, served.name, asked)

        if asked.is_empty and asked.keep_alive == 0:
            return JSONResponse(self._unload(asked, called, watch))
        name = asked.model or tagged(self._host.default)
        waiting = OllamaWire(called, name, watch, str)
        lines = KeepAlive(NDJSON, lambda silence: line(waiting.silence(silence))) if asked.streams else IN_JSON
        async with self._service.hold(request, asked, prepare, asked.keep_alive, keeping=lines) as taken:
            question, model = taken.prepared, taken.served.session.model
            wire = OllamaWire(called, name, watch, lambda token: str(model.tokenizer.decode([token])))
            if question is None:
                return JSONResponse(wire.emptied("load"))
            events = taken.submit([question.request])
            if asked.streams:
                return taken.stream(answer_stream(taken, question, events, wire), NDJSON)
            return await taken.whole(whole_answer(taken, question, events, wire))

    def _unload(self, asked: OllamaRequest, called: Literal["chat", "generate"], watch: Stopwatch) -> dict[str, object]:
        """Unload a model as soon as nobody uses it; a session that the server's caller opened stays, and the answer says so."""
        name = self._host.name_of(asked.model)
        goes = self._host.unload(name)
        return OllamaWire(called, asked.model or tagged(name), watch, str).emptied("unload" if goes else "load")

    async def embed(self, request: Request) -> Response:
        """`POST /api/embed`."""
        return await self._embed(request, OllamaEmbed)

    async def embed_old(self, request: Request) -> Response:
        """`POST /api/embeddings`, which `/api/embed` replaced."""
        return await self._embed(request, OllamaOldEmbed)

    async def _embed(self, request: Request, kind: type[OllamaEmbed]) -> Response:
        watch = Stopwatch()
        asked: OllamaEmbed = await self._read(request, kind, watch)

        def prepare(served: Served, asked: OllamaEmbed) -> EmbeddingWork | None:
            watch.load()
            if served.session.embedder is None:
                raise RequestError(400, f"{served.name} cannot embed texts: it has no sentence-transformers files")
            if asked.is_empty:
                return None
            return served.session.embedding(asked.texts, asked.dimensions, truncation=asked.truncate is not False)

        async with self._service.hold(request, asked, prepare, asked.keep_alive) as taken:
            taken.count_tokens(taken.prepared.tokens if taken.prepared is not None else 0)
            return await taken.whole(self._embedded(taken, watch))

    async def _embedded(self, taken: Embedding, watch: Stopwatch) -> dict[str, object]:
        if isinstance(taken.asked, OllamaOldEmbed):
            return await old_embedding_body(taken)
        return await embeddings_body(taken, watch, taken.asked.model or tagged(taken.served.name))

    async def _read(self, request: Request, kind: type[Chosen], watch: Stopwatch) -> Chosen:
        asked = await self._service.read(request, partial(parse, kind))
        watch.read()
        return asked

    async def tags(self) -> dict[str, object]:
        """`GET /api/tags`: the models."""
        await self._cards.learn(self._host.names)
        return {"models": await asyncio.to_thread(self._cards.served)}

    async def running(self) -> dict[str, object]:
        """`GET /api/ps`: the models in memory."""
        return {"models": await asyncio.to_thread(self._cards.loaded)}

    async def show(self, request: Request) -> dict[str, object]:
        """`POST /api/show`: one model."""
        asked = await self._service.read(request, partial(parse, OllamaShow))
        name = self._host.find(asked.asked) if asked.asked else self._host.default
        await self._cards.learn([name])
        return await asyncio.to_thread(self._cards.details, name)

    async def version(self) -> dict[str, object]:
        """`GET /api/version`."""
        return {"version": API_VERSION, "rabbit_engine": __version__}

    async def alive(self) -> Response:
        """`HEAD /`, with which Ollama's clients look for the server."""
        return Response()

    async def refuse(self, request: Request) -> Response:
        """What changes the models of a server of Ollama's."""
        return self.error(RequestError(501, f"{request.url.path} is not supported: {_FIXED}"))
