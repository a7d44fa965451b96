"""Places instructions that stand between other messages where the chat template takes them.

Claude Code sends some in each conversation, and many templates raise at them or leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions import Session

_BEGIN, _END = "<system-reminder>", "</system-reminder>"
"""How Claude Code marks instructions in a user's message, where a server takes no others."""

_SHORT, _LONG = (
    ({"role": "system", "content": "A"}, {"role": "user", "content": "B"}, {"role": "system", "content": text})
    for text in ("C", "One two three four five six seven")
)


def place_instructions(session: Session, conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as it is, if its template shows the model later instructions; otherwise with those marked in messages of
    the user, where they stand."""
    if not any(message["role"] == "system" for message in conversation[1:]) or _shows_late(session):
        return list(conversation)
    found: list[dict[str, Any]] = []
    for message in conversation:
        last = found[-1] if found else None
        late = message["role"] == "system" and last is not None and last["role"] != "system"
        placed = {"role": "user", "content": [_marked(part) for part in message["content"]]} if late else message
        if last is not None and last["role"] == placed["role"] and placed["role"] in ("system", "user"):
            found[-1] = {**last, "content": [*last["content"], *placed["content"]]}
        else:
            found.append(placed)
    return found


def _shows_late(session: Session) -> bool:
    """Whether the chat template shows instructions after a user's message."""
    try:
        return session.count_tokens(_LONG) > session.count_tokens(_SHORT)
    except ConfigurationError:
        return False


def _marked(part: dict[str, Any]) -> dict[str, Any]:
    text = str(part["text"])
    return part if text.lstrip().startswith(_BEGIN) else {**part, "text": f"{_BEGIN}\n{text}\n{_END}"}
