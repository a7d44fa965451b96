"""The endpoints of OpenAI's Responses API."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.openai.schema import parse
from rabbit_engine.server.openapi import body_of
from rabbit_engine.server.responses.answering import numbered, prepared, stream, whole
from rabbit_engine.server.responses.schema import ResponseRequest
from rabbit_engine.server.service import Service
from rabbit_engine.server.streams import EVENTS
from rabbit_engine.sessions import Request as Asking


class ResponsesEndpoints:
    """Answers of the Responses API, and the number of tokens of an input."""

    paths: tuple[str, ...] = ("/v1/responses",)

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.post("/v1/responses", openapi_extra=body_of(ResponseRequest, streams=EVENTS))(self.respond)
        app.post("/v1/responses/input_tokens", openapi_extra=body_of(ResponseRequest))(self.count)
        app.get("/v1/responses/{response_id}")(self.stored)
        app.delete("/v1/responses/{response_id}")(self.stored)
        app.post("/v1/responses/{response_id}/cancel")(self.stored)
        app.get("/v1/responses/{response_id}/input_items")(self.stored)

    def error(self, error: RequestError) -> Response:
        """An error as OpenAI's clients read it."""
        return JSONResponse(error.body(), error.status, error.headers())

    def stream_error(self, error: RequestError) -> str:
        """The only event."""
        body = {"type": "error", "code": error.code or error.kind, "message": str(error), "param": error.param}
        return numbered(body, 0)

    async def respond(self, request: Request) -> Response:
        """`POST /v1/responses`."""
        async with self._service.take(request, _parse, _prepare) as taken:
            events = taken.submit([taken.prepared])
            if taken.asked.stream:
                return taken.stream(stream(taken, events))
            return await taken.whole(whole(taken, events))

    async def count(self, request: Request) -> dict[str, object]:
        """`POST /v1/responses/input_tokens`."""
        async with self._service.take(request, _parse, _prepare) as taken:
            return {"object": "response.input_tokens", "input_tokens": len(taken.prepared.prompt.ids)}

    async def stored(self, response_id: str) -> Response:
        """Whatever a client wants with a response that it expects to be stored."""
        raise RequestError(404, f"there is no response {response_id[:80]!r}: responses are not stored", code="not_found")


def _parse(body: dict[str, object]) -> ResponseRequest:
    return parse(ResponseRequest, body)


def _prepare(served: Served, asked: ResponseRequest) -> Asking:
    return prepared(served.session, asked)
