"""The service: OpenAI's API over HTTP, and a web page for chatting."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rabbit_engine import __version__
from rabbit_engine.errors import ConfigurationError, RabbitError, SessionClosedError
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.server.answering import Answering
from rabbit_engine.server.body import LARGE_BODY_BYTES, Incoming, read_body
from rabbit_engine.server.errors import RequestError, as_request_error
from rabbit_engine.server.lanes import MOST_SECONDS, Lanes
from rabbit_engine.server.metrics import Metrics
from rabbit_engine.server.parsing import parse_object
from rabbit_engine.server.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Kind, parse
from rabbit_engine.server.timeouts import USUAL, Timeouts
from rabbit_engine.server.wire import event
from rabbit_engine.sessions import Events, Session
from rabbit_engine.utils.heap import give_free_memory_back

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LARGE = "rabbit_engine.large_body"
_OPEN_PATHS = ("/", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def _is_local(host: str) -> bool:
    """Whether the Host header names this machine: a foreign web page may point its own name here (DNS rebinding)."""
    with suppress(ValueError):
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    return False


def check_exposure(host: str, api_key: str | None) -> None:
    """Raise ConfigurationError for a server that other machines could use without a key."""
    if api_key is None and not is_loopback(host):
        raise ConfigurationError(
            f"a server on {host} could be used by anyone who can reach this machine: give it a key with --api-key-file, "
            "or listen on 127.0.0.1"
        )


def create_app(
    session: Session,
    name: str,
    *,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    local: bool = True,
    timeouts: Timeouts = USUAL,
) -> FastAPI:
    """The application; `name` is what clients call the model. `local` accepts only Host headers that name this machine, so
    that no web page reaches it under another name; `origins` are the pages that may use it from a browser."""
    service = _Service(session, name, api_key, local=local and api_key is None, timeouts=timeouts)
    with suppress(RabbitError):  # without one, token ids still work, and texts get an error
        _ = session.model.tokenizer  # loaded now, so that the first request does not wait for it
    hidden: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="rabbit_engine", version=__version__, lifespan=service.lifespan, **hidden)
    app.add_middleware(_Gate, service=service)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _query_error)
    app.get("/")(service.page)
    app.get("/health")(service.health)
    app.get("/metrics")(service.show_metrics)
    app.get("/plan")(service.plan)
    app.get("/lanes")(service.show_lanes)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{model:path}")(service.model)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/completions")(service.complete)
    app.post("/v1/embeddings")(service.embed)
    app.post("/load_model")(service.load)
    app.state.end_answers = service.end_answers
    return app


class _Gate:
    """Authorizes and counts requests, and answers every error: nothing that a client sends ends the server."""

    def __init__(self, app: ASGIApp, service: _Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, incoming = 0, Incoming(scope, receive)

        async def sending(message: Message) -> None:
            nonlocal status
            status = status or message.get("status", 0)
            await send(message)

        try:
            self._service.admit(scope)
            await self._until_ending(self._app(scope, incoming.receive, sending), lambda: bool(status))
        except Exception as error:
            if status:
                logger.exception("an answer was interrupted")
            else:
                answer = _answer_error(error)
                if answer.status_code < 500 and answer.status_code != 408:
                    await incoming.drain(self._service.timeouts.drain_s)
                await answer(scope, receive, sending)
        finally:
            self._service.count(scope, status)
            if scope.get(_LARGE):
                asyncio.get_running_loop().run_in_executor(None, give_free_memory_back)

    async def _until_ending(self, work: Awaitable[None], answers: Callable[[], bool]) -> None:
        """Do the work. When the server ends, requests without an answer get SessionClosedError; streams end themselves."""
        task, ended = asyncio.ensure_future(work), asyncio.ensure_future(self._service.ending.wait())
        try:
            await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
            if task.done() or answers():
                await task
            else:
                raise SessionClosedError("the server is shutting down")
        finally:
            for pending in (task, ended):
                pending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


class _Service:
    def __init__(self, session: Session, name: str, api_key: str | None, *, local: bool, timeouts: Timeouts) -> None:
        self._session, self._name, self._api_key, self._local = session, name, api_key, local
        self.timeouts = timeouts
        self._created = int(time.time())
        self._metrics = Metrics(session)
        self._lanes = Lanes(session)
        self.ending = asyncio.Event()
        self._large = asyncio.Semaphore(1)
        self._answering = Answering(session, name, self._metrics, self.ending)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """While it serves. Cancels running answers at the end; the session and the model stay open."""
        yield
        self.end_answers()
        self._lanes.stop()

    def end_answers(self) -> None:
        """End streams with an error event and other answers with 503, as the server stops. Called in the serving event loop."""
        self.ending.set()

    def admit(self, scope: Scope) -> None:
        """Raise RequestError for a request that is not allowed."""
        headers = Headers(scope=scope)
        if self._local and not _is_local(headers.get("host", "")):
            raise RequestError(400, "the Host header does not name this machine: use localhost, or give the server a key")
        if self._api_key is None or scope["path"] in _OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._api_key.encode()):
            raise RequestError(401, "this server requires its key: Authorization: Bearer KEY", code="invalid_api_key")

    def count(self, scope: Scope, status: int) -> None:
        """A request was answered."""
        self._metrics.count_request(getattr(scope.get("route"), "path", "other"), status)

    async def page(self) -> HTMLResponse:
        """The page for chatting."""
        policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(files("rabbit_engine.server").joinpath("page.html").read_text("utf-8"), headers=headers)

    async def health(self) -> JSONResponse:
        """Whether the server can answer."""
        closed = runtime_of(self._session.model).transfer.closed
        body = {"status": "closed" if closed else "ok", "model": self._name, "running": self._session.running}
        return JSONResponse({**body, "waiting": self._session.waiting}, 503 if closed else 200)

    async def show_metrics(self) -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def plan(self) -> dict[str, object]:
        """The plan of the model."""
        plan = self._session.model.plan
        return {
            "model": self._name,
            "rows": [list(row) for row in plan.rows()],
            "pass_bytes": plan.pass_bytes,
            "version": __version__,
        }

    async def show_lanes(self, seconds: float = 10.0) -> dict[str, object]:
        """The activity of disk, copies and computation in the last seconds, and the progress of the pass."""
        return await asyncio.to_thread(self._lanes.show, min(max(seconds, 0.1), MOST_SECONDS))

    async def models(self) -> dict[str, object]:
        """The only model."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, model: str) -> dict[str, object]:
        """The card of a model."""
        self._check_model(model)
        return self._card()

    def _card(self) -> dict[str, object]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "rabbit_engine",
            "max_model_len": self._session.most_tokens,
        }

    def _check_model(self, asked: str) -> None:
        if asked not in (self._name, self._name.rpartition("/")[2]) and asked.partition("@")[0] != self._name:
            raise RequestError(
                404, f"the model {asked!r} is not served; {self._name!r} is", code="model_not_found", param="model"
            )

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        asked, requests = await self._take(request, ChatRequest, self._answering.chat_requests)
        events = self._answering.events(requests)
        if asked.stream:
            return _Stream(self._answering.chat_stream(asked, events, len(requests)), events)
        return await _whole(request, self._answering.chat(asked, events, len(requests)), events)

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        asked, requests = await self._take(request, CompletionRequest, self._answering.text_requests)
        events = self._answering.events(requests)
        if asked.stream:
            return _Stream(self._answering.text_stream(asked, requests, events), events)
        return await _whole(request, self._answering.text(asked, requests, events), events)

    async def embed(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        asked, work = await self._take(request, EmbeddingRequest, self._answering.embedding)
        return await _whole(request, self._answering.embed(asked, work))

    async def load(self, request: Request) -> Response:
        """`POST /load_model`, which transformers' client calls first: the model is already loaded."""
        self._check_model(str(parse_object(await read_body(request, self.timeouts.body_s)).get("model", "")))
        body = event({"status": "ready", "model": self._name, "cached": True})
        return Response(body, media_type="text/event-stream")

    async def _take(self, request: Request, kind: type[Kind], prepare: Callable[[Kind], T]) -> tuple[Kind, T]:
        """The request, and the result of `prepare`: parsed, checked and tokenised off the event loop, large ones in turn."""
        body = await read_body(request, self.timeouts.body_s)

        def work() -> tuple[Kind, T]:
            asked = parse(kind, parse_object(body))
            self._check_model(asked.model)
            return asked, prepare(asked)

        if len(body) <= LARGE_BODY_BYTES:
            return await asyncio.to_thread(work)
        request.scope[_LARGE] = True
        async with self._large:
            return await asyncio.to_thread(work)


class _Stream(StreamingResponse):
    """Chunks as they are generated. A client that disconnects before the first one is cancelled, too."""

    def __init__(self, chunks: AsyncIterator[str], events: Events) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _whole(request: Request, work: Awaitable[dict[str, object]], events: Events | None = None) -> Response:
    """The answer, unless the client disconnects first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=499)
        return JSONResponse(task.result())
    finally:
        for pending in (task, gone):
            pending.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        if events is not None:  # work cancelled before it began has closed nothing
            await events.aclose()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _answer_error(error: Exception) -> Response:
    found = RequestError(499, "the client disconnected") if isinstance(error, ClientDisconnect) else as_request_error(error)
    if found.status >= 500 and found.status != 503:  # a server or model that was closed is not a failure
        logger.error("a request failed: %s", error, exc_info=error)
    return _response(found)


async def _query_error(_: Request, error: Exception) -> Response:
    return _response(RequestError(400, f"cannot read the query: {error}"))


async def _http_error(_: Request, error: Exception) -> Response:
    """What the framework rejects, in the same format."""
    status = getattr(error, "status_code", 500)
    codes = {404: "there is nothing at this path", 405: "this path does not support this method"}
    return _response(RequestError(status, codes.get(status, str(getattr(error, "detail", error)))))


def _response(error: RequestError) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())
