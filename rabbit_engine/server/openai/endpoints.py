"""The endpoints of OpenAI's API."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.openai.answering import chat_stream, text_stream, text_whole
from rabbit_engine.server.openai.bodies import Bodies, PromptWork
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest, EmbeddingRequest, LoadRequest, parse
from rabbit_engine.server.openai.wire import LAST_CHUNK, event
from rabbit_engine.server.openapi import body_of
from rabbit_engine.server.service import Service
from rabbit_engine.server.streams import EVENTS
from rabbit_engine.server.tasks import bodies as tasks
from rabbit_engine.server.tasks.bodies import TaskAnswer
from rabbit_engine.sessions import Request as Asking


class OpenAIEndpoints:
    """Chat, completions, embeddings and the list of models."""

    paths: tuple[str, ...] = ("/v1",)

    def __init__(self, service: Service) -> None:
        self._service, self._host = service, service.host

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{model:path}")(self.model)
        app.post("/v1/chat/completions", openapi_extra=body_of(ChatRequest, streams=EVENTS))(self.chat)
        app.post("/v1/completions", openapi_extra=body_of(CompletionRequest, streams=EVENTS))(self.complete)
        app.post("/v1/embeddings", openapi_extra=body_of(EmbeddingRequest))(self.embed)
        app.post("/load_model", openapi_extra=body_of(LoadRequest, streams=EVENTS, whole=False))(self.load)

    def error(self, error: RequestError) -> Response:
        """An error as OpenAI's clients read it."""
        return JSONResponse(error.body(), error.status, error.headers())

    def stream_error(self, error: RequestError) -> str:
        """The last event, after which clients stop reading."""
        return event(error.body()) + LAST_CHUNK

    async def models(self) -> dict[str, object]:
        """`GET /v1/models`."""
        await self._host.descriptions.learn(self._host.names)
        return {"object": "list", "data": [self._card(name) for name in self._host.names]}

    async def model(self, model: str) -> dict[str, object]:
        """`GET /v1/models/{model}`."""
        name = self._host.find(model)
        await self._host.descriptions.learn([name])
        return self._card(name)

    def _card(self, name: str) -> dict[str, object]:
        card = {"id": name, "object": "model", "created": self._host.created, "owned_by": "rabbit_engine"}
        described = self._host.descriptions.find(name)
        lengths = {
            "context_length": None if described is None else described.context_length,
            "max_model_len": next((served.session.most_tokens for served in self._host.loaded if served.name == name), None),
        }
        return {**card, **{name: length for name, length in lengths.items() if length is not None}}

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""

        def prepare(served: Served, asked: ChatRequest) -> tuple[Bodies, list[Asking]]:
            bodies = Bodies(served.session, served.name)
            return bodies, bodies.chat_requests(asked)

        async with self._service.take(request, lambda body: parse(ChatRequest, body), prepare) as taken:
            bodies, requests = taken.prepared
            events = taken.submit(requests)
            if taken.asked.stream:
                return taken.stream(chat_stream(taken, events))

            async def answer() -> object:
                return bodies.chat(taken.asked, requests, await taken.replies(events, len(requests)))

            return await taken.whole(answer())

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""

        def prepare(served: Served, asked: CompletionRequest) -> tuple[Bodies, list[Asking], PromptWork | None]:
            bodies, most = Bodies(served.session, served.name), served.session.most_requests
            if len(asked.prompts) * asked.choices > most:
                raise RequestError(400, f"the server takes at most {most} answers at once", param="prompt")
            requests = bodies.text_requests(asked)
            return bodies, requests, bodies.prompt_work(asked, requests)

        async with self._service.take(request, lambda body: parse(CompletionRequest, body), prepare) as taken:
            _, requests, work = taken.prepared
            events = None if taken.asked.max_tokens == 0 else taken.submit(requests)
            if work is not None:
                taken.count_tokens(work.tokens)
            if taken.asked.stream:
                return taken.stream(text_stream(taken, events))
            return await taken.whole(text_whole(taken, events))

    async def embed(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""

        def prepare(served: Served, asked: EmbeddingRequest) -> TaskAnswer:
            if served.session.embedder is None:
                told = f"{served.name} cannot embed texts: it has no sentence-transformers files"
                raise RequestError(400, told, param="model")
            return tasks.embed(served.session, served.name, asked)

        async with self._service.take(request, lambda body: parse(EmbeddingRequest, body), prepare) as taken:
            taken.count_tokens(taken.prepared.work.tokens)
            return await taken.whole(taken.prepared.awaited())

    async def load(self, request: Request) -> Response:
        """`POST /load_model`, which transformers' client calls first: loads the model."""
        async with self._service.take(request, lambda body: parse(LoadRequest, body), lambda *_: None) as taken:
            body = event({"status": "ready", "model": taken.served.name, "cached": True})
        return Response(body, media_type=EVENTS)
