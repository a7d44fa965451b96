"""Reads JSON schemas, and finds the part of one that cannot be served."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rabbit_engine.errors import ConstraintError, first_line

_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    *("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties"),
)

_STANDARD_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uuid", "uri"}
    | {"uri-reference", "iri", "iri-reference", "uri-template", "json-pointer", "relative-json-pointer", "regex"}
)
"""Of JSON Schema 2020-12. It says that others ("int64", "path") are remarks."""

_SAYS_MORE = frozenset(
    {"additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties", "dependentSchemas"}
)
"""About properties that an object does not list."""

_OTHERS = frozenset({"anyOf", "oneOf", "$ref", "if"})
_OF_OBJECTS = _SAYS_MORE | {"properties", "required"}

_MOST_SEARCH_S = 1.0


def read_schema(given: Any) -> dict[str, Any]:
    """A JSON schema from a mapping, JSON text, a class or adapter of pydantic's, or True: any object.

    Formats that JSON Schema does not define are left out. An object that lists its properties has no others, unless it says
    something about them: models go on adding some. Raises ConstraintError for anything else.
    """
    if given is True:
        return {"type": "object"}
    for name in ("model_json_schema", "json_schema"):  # of pydantic's BaseModel and TypeAdapter
        if callable(make := getattr(given, name, None)):
            given = make()
    try:
        found = json.loads(given if isinstance(given, str) else json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the schema is not JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ConstraintError(f"the schema is {json.dumps(found)[:60]}, not a JSON object")
    for _, part in _walk(found):
        if isinstance(part.get("format"), str) and part["format"] not in _STANDARD_FORMATS:
            del part["format"]
    _close(found)
    return found


def _close(schema: dict[str, Any]) -> None:
    """Allow objects only the properties that they list, where no other part of the schema speaks about the same object."""
    parts = [part for _, part in _walk(schema)]
    if any("allOf" in part or (part.keys() & _OTHERS and part.keys() & _OF_OBJECTS) for part in parts):
        return
    for part in parts:
        if _lists_all(part):
            part["additionalProperties"] = False


def _lists_all(part: Mapping[str, Any]) -> bool:
    """Whether an object lists its properties, those it requires among them, and says nothing about others."""
    listed, required = part.get("properties"), part.get("required", [])
    if not isinstance(listed, dict) or not isinstance(required, list) or part.keys() & _SAYS_MORE:
        return False
    return all(isinstance(name, str) and name in listed for name in required)


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part that is a schema itself, with its JSON pointer."""
    waiting = [("#", schema)]
    while waiting:
        place, part = waiting.pop()
        yield place, part
        waiting += [(place + step, child) for step, child in _children(part)]


def _children(schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts directly inside a schema, with the step of a JSON pointer to each."""
    for name in _MAPS:
        if isinstance(found := schema.get(name), dict):
            yield from ((f"/{name}/{_escaped(key)}", value) for key, value in found.items() if isinstance(value, dict))
    for name in _LISTS:
        if isinstance(found := schema.get(name), list):
            yield from ((f"/{name}/{index}", value) for index, value in enumerate(found) if isinstance(value, dict))
    for name in _SINGLE:
        if isinstance(found := schema.get(name), dict):
            yield f"/{name}", found


def moved_schema(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A copy whose references hold where the schema stands at the JSON pointer `place` of another one."""
    found: dict[str, Any] = json.loads(json.dumps(schema))
    for _, part in _walk(found):
        if isinstance(to := part.get("$ref"), str) and to.startswith("#"):
            part["$ref"] = place + to[1:]
    return found


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def failing_part(schema: dict[str, Any], why_not: Callable[[dict[str, Any]], str]) -> str:
    """The JSON pointer of the smallest part for which `why_not` gives the reason that it gives for the whole schema.

    A part is asked about with the definitions of the whole. The search ends after a second, with the smallest found so far.
    """
    until = time.monotonic() + _MOST_SEARCH_S
    shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    reason, place, part = why_not(schema), "#", schema
    while True:
        for step, child in _children(part):
            if time.monotonic() > until:
                return place
            if why_not({**shared, **child}) == reason:
                place, part = place + step, child
                break
        else:
            return place
