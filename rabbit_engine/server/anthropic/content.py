"""The content blocks of an answer, as they grow: the same streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

from rabbit_engine.server.calls import CallArguments, CallStart
from rabbit_engine.server.flow import Delta, Reasoning

SIGNATURE = "unsigned"
"""Stands where Anthropic's server signs a model's thinking. Nothing reads it."""

ContentEvent = dict[str, Any]


class ContentBlocks:
    """Follows the deltas of one answer. `push` and `end` return the events of a stream; `blocks` is the content so far.

    With `hides_thinking`, blocks of thinking have no text.
    """

    def __init__(self, *, hides_thinking: bool = False) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._hides_thinking = hides_thinking
        self._open = ""
        self._input = ToolInput()

    def push(self, delta: Delta) -> list[ContentEvent]:
        """Add the next part of the answer."""
        match delta:
            case Reasoning(text):
                shown = "" if self._hides_thinking else text
                begun = self._begin("thinking", {"thinking": "", "signature": ""})
                return begun + self._grow("thinking", "thinking_delta", shown)
            case CallStart(_, identity, name):
                tool = f"toolu_{identity}"
                self._input = ToolInput()
                return self._begin("tool_use", {"id": tool, "name": name, "input": {}}, another=True)
            case CallArguments(_, text):
                news = self._input.push(text)
                return [self._delta({"type": "input_json_delta", "partial_json": news})] if news else []
            case _:
                return self._begin("text", {"text": ""}) + self._grow("text", "text_delta", delta.text) if delta.text else []

    def end(self) -> list[ContentEvent]:
        """End the last block."""
        return self._end()

    def _begin(self, kind: str, fields: dict[str, Any], *, another: bool = False) -> list[ContentEvent]:
        """Begin a block of that kind, unless the last one is of it."""
        if self._open == kind and not another:
            return []
        ended = self._end()
        self._open = kind
        self.blocks.append({"type": kind, **fields})
        return [*ended, self._event("content_block_start", content_block=dict(self.blocks[-1]))]

    def _grow(self, field: str, kind: str, text: str) -> list[ContentEvent]:
        self.blocks[-1][field] += text
        return [self._delta({"type": kind, field: text})] if text else []

    def _end(self) -> list[ContentEvent]:
        if not self._open:
            return []
        signed = []
        if self._open == "thinking":
            self.blocks[-1]["signature"] = SIGNATURE
            signed = [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
        elif self._open == "tool_use":
            self.blocks[-1]["input"] = self._input.value
        self._open = ""
        return [*signed, self._event("content_block_stop")]

    def _delta(self, delta: dict[str, Any]) -> ContentEvent:
        return self._event("content_block_delta", delta=delta)

    def _event(self, kind: str, **fields: Any) -> ContentEvent:
        return {"type": kind, "index": len(self.blocks) - 1, **fields}


class ToolInput:
    """The input of a tool as a model writes it. Clients parse it while it comes, so what follows a mistake in its JSON is left
    out, and all of what is not an object."""

    def __init__(self) -> None:
        self._text = ""
        self._is_wrong = False

    def push(self, text: str) -> str:
        """The part of the next text that clients can read."""
        whole = self._text + text
        if self._is_wrong or not whole.lstrip():
            self._text = whole if not self._is_wrong else self._text
            return ""
        before = len(self._text) if self._text.lstrip() else 0
        self._is_wrong = not _is_beginning(whole)
        end = len(whole) if not self._is_wrong else _longest(whole, before)
        self._text = whole[:end]
        return whole[before:end]

    @property
    def value(self) -> dict[str, Any]:
        """The input; one that was cut off has what is complete of it."""
        found = from_json(self._text, allow_partial=True) if self._text.lstrip() else {}
        try:
            json.dumps(found, allow_nan=False)
        except ValueError:  # 1e999 is no JSON number once it is read
            return {}
        return dict(found)


def _is_beginning(text: str) -> bool:
    """Whether the text, which is not blank, may be the beginning of a JSON object."""
    try:
        return isinstance(from_json(text, allow_partial=True, allow_inf_nan=False), dict)
    except ValueError:
        return False


def _longest(text: str, least: int) -> int:
    """The length of the longest beginning that may go on to be an object, at least `least`; what follows a mistake is one."""
    most = len(text) - 1
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if _is_beginning(text[:middle]) else (least, middle - 1)
    return least


def content_of(deltas: Iterable[Delta], *, hides_thinking: bool = False) -> list[dict[str, Any]]:
    """The content of a whole answer."""
    blocks = ContentBlocks(hides_thinking=hides_thinking)
    for delta in deltas:
        blocks.push(delta)
    blocks.end()
    return blocks.blocks
