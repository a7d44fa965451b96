"""The items of an answer as they grow, with the events that tell a client of it; a whole answer is the last state."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rabbit_engine.server.calls import CallArguments, CallStart
from rabbit_engine.server.flow import Delta, Reasoning
from rabbit_engine.server.openai.wire import Wire
from rabbit_engine.sessions import TokenLogprob

Event = dict[str, Any]


@dataclass(slots=True)
class _Part:
    """The item that is open: a text, a call or reasoning."""

    kind: str
    id: str
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        begun = status == "in_progress"
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**head, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if begun else [self.content()]
        if self.kind == "reasoning":
            return {**head, "summary": [], "content": content}
        return {**head, "role": "assistant", "content": content}

    def content(self, *, empty: bool = False) -> dict[str, Any]:
        """The only part of its content."""
        text = "" if empty else self.text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": [] if empty else list(self.logprobs)}


_PREFIXES = {"message": "msg", "function_call": "fc", "reasoning": "rs"}
_NAMES = {"message": "output_text", "function_call": "function_call_arguments", "reasoning": "reasoning_text"}


class Output:
    """The output of one answer. Its methods return the events of what they add."""

    def __init__(self, wire: Wire, *, with_logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._wire, self._with_logprobs = wire, with_logprobs
        self._open: _Part | None = None
        self._early: list[dict[str, Any]] = []
        """Log probabilities of tokens before the text that they belong to."""

    def add(self, delta: Delta) -> Iterator[Event]:
        """Add the next part of the answer."""
        match delta:
            case Reasoning(text):
                yield from self._grow("reasoning", text)
            case CallStart(_, identity, name):
                yield from self._close()
                yield from self._begin(_Part("function_call", _new_id("function_call"), identity, name))
            case CallArguments(_, text):
                yield from self._grow("function_call", text)
            case _:
                yield from self._say(delta.text, delta.logprobs)

    def end(self, *, complete: bool) -> Iterator[Event]:
        """The answer is over; an answer of nothing is an empty text."""
        if self._open is None and not self.items:
            yield from self._begin(_Part("message", _new_id("message")))
        yield from self._close("completed" if complete else "incomplete")

    def _say(self, text: str, logprobs: Sequence[TokenLogprob]) -> Iterator[Event]:
        told = self._wire.logprobs(logprobs)["content"] if self._with_logprobs else []
        found: list[dict[str, Any]] = [*self._early, *told]  # type: ignore[misc]
        is_told = self._open is not None and self._open.kind == "message"
        if not text and not (is_told and found):
            self._early = found
            return
        self._early = []
        yield from self._grow("message", text, found)

    def _grow(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield from self._begin(_Part(kind, _new_id(kind)))
        part = self._open
        assert part is not None  # noqa: S101 - it was begun above
        part.text += text
        part.logprobs += logprobs
        told = {"logprobs": [_short(each) for each in logprobs]} if kind == "message" else {}
        yield self._event(f"response.{_NAMES[kind]}.delta", part, delta=text, **told)

    def _begin(self, part: _Part) -> Iterator[Event]:
        self._open = part
        added = {"type": "response.output_item.added", "output_index": len(self.items), "item": part.item("in_progress")}
        yield added
        if part.kind != "function_call":
            yield self._event("response.content_part.added", part, part=part.content(empty=True))

    def _close(self, status: str = "completed") -> Iterator[Event]:
        part = self._open
        if part is None:
            return
        if part.kind == "function_call":
            yield self._event("response.function_call_arguments.done", part, name=part.name, arguments=part.text)
        else:
            told = {"logprobs": [_short(each) for each in part.logprobs]} if part.kind == "message" else {}
            yield self._event(f"response.{_NAMES[part.kind]}.done", part, text=part.text, **told)
            yield self._event("response.content_part.done", part, part=part.content())
        item = part.item(status)
        yield {"type": "response.output_item.done", "output_index": len(self.items), "item": item}
        self.items.append(item)
        self._open = None

    def _event(self, kind: str, of: _Part, **more: Any) -> Event:
        place = {} if of.kind == "function_call" else {"content_index": 0}
        return {"type": kind, "item_id": of.id, "output_index": len(self.items), **place, **more}


def _new_id(kind: str) -> str:
    return f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """A log probability as events have it, without bytes."""
    top = [{"token": each["token"], "logprob": each["logprob"]} for each in found["top_logprobs"]]
    return {"token": found["token"], "logprob": found["logprob"], "top_logprobs": top}
