"""The endpoints of Anthropic's Messages API."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from rabbit_engine.server.anthropic.answering import message, message_stream
from rabbit_engine.server.anthropic.asking import MessagePlan, count_tokens, plan_message
from rabbit_engine.server.anthropic.schema import CountRequest, MessagesRequest, parse
from rabbit_engine.server.anthropic.wire import error_body, event, new_request_id
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.openapi import body_of
from rabbit_engine.server.service import Service
from rabbit_engine.server.streams import EVENTS

_ID = "request-id"


class AnthropicEndpoints:
    """Messages, and the tokens of their prompts."""

    paths: tuple[str, ...] = ("/v1/messages",)

    def __init__(self, service: Service) -> None:
        self._service = service

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.post("/v1/messages", openapi_extra=body_of(MessagesRequest, streams=EVENTS))(self.messages)
        app.post("/v1/messages/count_tokens", openapi_extra=body_of(CountRequest))(self.count)

    def error(self, error: RequestError) -> Response:
        """An error as Anthropic's clients read it."""
        request_id = new_request_id()
        return JSONResponse(error_body(error, request_id), error.status, {**error.headers(), _ID: request_id})

    def stream_error(self, error: RequestError) -> str:
        """The only event."""
        return event(error_body(error, new_request_id()))

    async def messages(self, request: Request) -> Response:
        """`POST /v1/messages`."""

        def prepare(served: Served, asked: MessagesRequest) -> MessagePlan:
            return plan_message(served.session, asked)

        request_id = new_request_id()
        async with self._service.take(request, lambda body: parse(MessagesRequest, body), prepare) as taken:
            events = taken.submit([taken.prepared.request])
            if taken.asked.stream:
                response = taken.stream(message_stream(taken, events, request_id))
            else:
                response = await taken.whole(message(taken, events))
            response.headers[_ID] = request_id
            return response

    async def count(self, request: Request) -> Response:
        """`POST /v1/messages/count_tokens`."""

        def prepare(served: Served, asked: CountRequest) -> int:
            return count_tokens(served.session, asked)

        async with self._service.take(request, lambda body: parse(CountRequest, body), prepare) as taken:
            return JSONResponse({"input_tokens": taken.prepared}, headers={_ID: new_request_id()})
