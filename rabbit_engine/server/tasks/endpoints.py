"""The endpoints for labels, ranks and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.openai.generating import Asked
from rabbit_engine.server.openai.schema import parse
from rabbit_engine.server.openai.wire import event
from rabbit_engine.server.openapi import body_of
from rabbit_engine.server.service import Service
from rabbit_engine.server.tasks import bodies, tokens
from rabbit_engine.server.tasks.bodies import TaskAnswer
from rabbit_engine.server.tasks.schema import ClassifyRequest, RerankRequest, ScoreRequest
from rabbit_engine.server.tasks.tokens import DetokenizeRequest, TokenizeRequest
from rabbit_engine.sessions import Session

Kind = TypeVar("Kind", bound=Asked)


class TaskEndpoints:
    """Classify, rerank and score, in the forms of vLLM, Jina and Cohere."""

    paths: tuple[str, ...] = (
        "/v1/classify",
        "/classify",
        "/v1/rerank",
        "/rerank",
        "/v2/rerank",
        "/v1/score",
        "/score",
        "/tokenize",
        "/detokenize",
    )

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        ranks = body_of(RerankRequest)
        for path, endpoint, described in (
            ("classify", self.classify, body_of(ClassifyRequest)),
            ("rerank", self.rerank, ranks),
            ("score", self.score, body_of(ScoreRequest)),
        ):
            app.post(f"/v1/{path}", openapi_extra=described)(endpoint)
            app.post(f"/{path}", openapi_extra=described)(endpoint)
        app.post("/v2/rerank", openapi_extra=ranks)(self.rerank_as_cohere)
        app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))(self.tokenize)
        app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))(self.detokenize)

    def error(self, error: RequestError) -> Response:
        """An error as OpenAI's clients read it; `message` is where Cohere's looks."""
        return JSONResponse({**error.body(), "message": str(error)}, error.status, error.headers())

    def stream_error(self, error: RequestError) -> str:
        """None of these answers is a stream."""
        return event(error.body())

    async def classify(self, request: Request) -> Response:
        """`POST /v1/classify` and `/classify`."""
        return await self._answer(request, ClassifyRequest, bodies.classify)

    async def score(self, request: Request) -> Response:
        """`POST /v1/score` and `/score`."""
        return await self._answer(request, ScoreRequest, bodies.score)

    async def rerank(self, request: Request) -> Response:
        """`POST /v1/rerank` and `/rerank`: with the documents, unless the request says otherwise."""

        def answer(session: Session, model: str, asked: RerankRequest) -> TaskAnswer:
            return bodies.rerank(session, model, asked, with_documents=True)

        return await self._answer(request, RerankRequest, answer)

    async def rerank_as_cohere(self, request: Request) -> Response:
        """`POST /v2/rerank`: without the documents, unless the request says otherwise."""
        return await self._answer(request, RerankRequest, bodies.rerank)

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`."""
        return await self._read(request, TokenizeRequest, tokens.tokenize)

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`."""
        return await self._read(request, DetokenizeRequest, tokens.detokenize)

    async def _read(self, request: Request, kind: type[Kind], read: Callable[[Session, Kind], dict[str, object]]) -> Response:
        """The answer of what needs no pass."""

        def prepare(served: Served, asked: Kind) -> dict[str, object]:
            return read(served.session, asked)

        async with self._service.take(request, lambda body: parse(kind, body), prepare) as taken:
            return JSONResponse(taken.prepared)

    async def _answer(self, request: Request, kind: type[Kind], answer: Callable[[Session, str, Kind], TaskAnswer]) -> Response:
        def read(body: dict[str, Any]) -> Kind:
            return parse(kind, body)

        def prepare(served: Served, asked: Kind) -> TaskAnswer:
            return answer(served.session, served.name, asked)

        async with self._service.take(request, read, prepare) as taken:
            taken.count_tokens(taken.prepared.work.tokens)
            return await taken.whole(taken.prepared.awaited())
