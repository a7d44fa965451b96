"""JSON objects of requests, refused before parsing them costs much."""

from __future__ import annotations

import json
import re
from typing import Any

from rabbit_engine.server.errors import RequestError

MOST_VALUES = 2**17
"""The most JSON values in a body: parsing holds the GIL, for about 30 ms with this many."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    values = _count_values(body)
    if values > MOST_VALUES:
        raise RequestError(400, f"the body has {values} values, more than {MOST_VALUES}: send fewer", code="request_too_large")
    try:
        found = json.loads(body.decode("utf-8-sig"))
        if _HALF_PAIR.search(body):
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is not valid text
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise RequestError(400, "the body is not a JSON object", code="invalid_json")
    return found


def _count_values(body: bytes) -> int:
    """An upper bound; strings are stripped only if their commas could exceed the limit."""
    count = _count_marks(body)
    return count if count <= MOST_VALUES else _count_marks(_STRINGS.sub(b"", body))


def _count_marks(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")
