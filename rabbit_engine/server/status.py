"""The server's own pages: the chat page, health, metrics, the plan, and the lanes of the pass under way."""

from __future__ import annotations

import asyncio
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from rabbit_engine import __version__
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.hosting import Served
from rabbit_engine.server.lanes import MOST_SECONDS
from rabbit_engine.server.service import Service

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class StatusPages:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service, self._host = service, service.host

    def add_to(self, app: FastAPI) -> None:
        """Add the routes."""
        app.get("/", response_class=HTMLResponse)(self.page)
        app.get("/health")(self.health)
        app.get("/metrics", response_class=PlainTextResponse)(self.metrics)
        app.get("/plan")(self.plan)
        app.get("/lanes")(self.lanes)

    async def page(self) -> HTMLResponse:
        """The page for chatting."""
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(files("rabbit_engine.server").joinpath("page.html").read_text("utf-8"), headers=headers)

    async def health(self) -> JSONResponse:
        """Whether the server can answer."""
        loaded, loading, closed = self._host.loaded, self._host.loading, self._host.closed
        body = {
            "status": "closed" if closed else "ok",
            "model": self._host.default,
            "loaded": [served.name for served in loaded],
            "loading": None if loading is None else loading.facts(),
            "running": sum(served.session.running for served in loaded),
            "waiting": sum(served.session.waiting for served in loaded) + self._host.waiting,
            "start_s": {served.name: round(served.session.start_s, 1) for served in loaded},
        }
        return JSONResponse(body, 503 if closed else 200)

    async def metrics(self) -> PlainTextResponse:
        """For Prometheus."""
        return PlainTextResponse(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def plan(self, model: str | None = None) -> dict[str, object]:
        """The plan of a loaded model."""
        served = self._loaded(model)
        plan = served.session.model.plan
        return {
            "model": served.name,
            "rows": [list(row) for row in plan.rows()],
            "pass_bytes": plan.pass_bytes,
            "version": __version__,
        }

    async def lanes(self, seconds: float = 10.0, model: str | None = None) -> dict[str, object]:
        """The activity of disk, copies and computation in the last seconds, and the progress of the pass."""
        return await asyncio.to_thread(self._loaded(model).lanes.show, min(max(seconds, 0.1), MOST_SECONDS))

    def _loaded(self, model: str | None) -> Served:
        """The model of that name, by default the one that was used last. Raises RequestError if it is not loaded."""
        name = self._host.find(model) if model else None
        for served in reversed(self._host.loaded):
            if name in (None, served.name):
                return served
        raise RequestError(404, f"{name or 'no model'} is loaded now" if name is None else f"{name} is not loaded now")
