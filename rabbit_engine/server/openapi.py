"""The description of all routes for programs, at /openapi.json: endpoints read bodies by hand, and declare them here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from rabbit_engine.server.access import OPEN_PATHS
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.interface import Interface

_JSON = "application/json"
_ERRORS = {"4XX": "The request cannot be answered.", "503": "The model or the server is closed."}
_SCHEMES = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}


def body_of(model: type[BaseModel], *, streams: str | None = None, whole: bool = True) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a body of `model` by hand. Its answer is a JSON object, unless `whole` is False,
    or a stream of the media type `streams`."""
    content: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}} if whole else {}
    if streams is not None:
        content[streams] = {}
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {
        "requestBody": {"required": True, "content": {_JSON: {"schema": schema}}},
        "responses": {"200": {"description": "The answer.", "content": content}},
    }


class Description:
    """The OpenAPI document of an application, written when it is first asked for."""

    def __init__(self, app: FastAPI, interfaces: Sequence[Interface], *, has_keys: bool) -> None:
        self._app, self._interfaces, self._has_keys = app, interfaces, has_keys
        self._found: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The document."""
        self._found = self._found or self._write()
        return self._found

    def _write(self) -> dict[str, Any]:
        found = get_openapi(title=self._app.title, version=self._app.version, routes=self._app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for path, methods in found["paths"].items():
            for operation in methods.values():
                self._complete(path, operation, schemas)
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own errors, which no route sends
            schemas.pop(name, None)
        if self._has_keys:
            found["components"]["securitySchemes"] = _SCHEMES
            found["security"] = [{name: []} for name in _SCHEMES]
        return found

    def _complete(self, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> None:
        """Add the errors of a route, and put the definitions of its body where references find them."""
        responses = operation["responses"]
        responses.pop("422", None)
        errors = {_JSON: {"schema": self._error_schema(path)}}
        responses |= {status: {"description": told, "content": errors} for status, told in _ERRORS.items()}
        if self._has_keys and path in OPEN_PATHS:
            operation["security"] = []
        body = operation.get("requestBody", {}).get("content", {}).get(_JSON, {}).get("schema", {})
        schemas.update(body.pop("$defs", {}))

    def _error_schema(self, path: str) -> dict[str, Any]:
        """That of the errors which the interface at this path sends."""
        interface = next((one for one in self._interfaces if path.startswith(one.paths)), self._interfaces[-1])
        return _schema_of(json.loads(bytes(interface.error(RequestError(400, "message", code="code", param="param")).body)))


def _schema_of(example: object) -> dict[str, Any]:
    """The schema of a JSON value: the same names, and strings that may be null."""
    if isinstance(example, dict):
        fields = {name: _schema_of(value) for name, value in example.items()}
        return {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": ["string", "null"]} if isinstance(example, str) else {}
