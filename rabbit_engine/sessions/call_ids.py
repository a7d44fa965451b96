"""Ids of tool calls. Chat templates of Mistral's reject any but nine letters and digits, and others take what they get."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Messages = Sequence[Mapping[str, object]]

_LENGTH = 9
_FITS = re.compile(rf"[A-Za-z0-9]{{{_LENGTH}}}")


def new_call_id() -> str:
    """An id that every chat template takes."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_LENGTH))


def with_fitting_ids(render: Callable[[Messages], T], messages: Messages) -> T:
    """`render(messages)`; if that fails, with ids of nine letters and digits in place of others, which come from other servers.

    Ids that differ still do, and each is the same in every turn. Raises what the first call raises.
    """
    try:
        return render(messages)
    except Exception:
        fitting = [_with_fitting_ids(message) for message in messages]
        if fitting == list(messages):
            raise
        try:
            return render(fitting)
        except Exception:  # noqa: BLE001, S110 - then the ids are not what is wrong: the first error tells more
            pass
        raise


def _with_fitting_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(message)
    if isinstance(own := found.get("tool_call_id"), str):
        found["tool_call_id"] = _fitting(own)
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [
            {**call, "id": _fitting(call["id"])} if isinstance(call.get("id"), str) else call for call in calls
        ]
    return found


def _fitting(given: str) -> str:
    return given if _FITS.fullmatch(given) else hashlib.sha256(given.encode(errors="replace")).hexdigest()[:_LENGTH]
