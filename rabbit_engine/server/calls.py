"""Reads tool calls out of a model's text as it comes, in the formats of the most common chat templates.

<tool_call>{"name": ..., "arguments": {...}}</tool_call>   Qwen, Hermes, SmolLM and others
[TOOL_CALLS][{"name": ..., "arguments": {...}}]            Mistral (the marker is a special token, and may be missing)
{"name": ..., "parameters": {...}}                         Llama 3, with or without <|python_tag|> before it
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rabbit_engine.sessions.call_ids import new_call_id

_TAG, _END_TAG = "<tool_call>", "</tool_call>"
_MARKERS = ("[TOOL_CALLS]", "<|python_tag|>")
_BARE = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*(?:\[\s*)?(?=\{)")
_UNDECIDED = re.compile(r"\s*(?:\[TOOL_CALLS\]|<\|python_tag\|>)?\s*\[?\s*\Z")
_NAMED = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_CLOSE = re.compile(r"\s*\}")
_BETWEEN = re.compile(r"\s*[,;\]]?\s*")
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a function begins; `index` counts the calls of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments, which are JSON text."""

    index: int
    text: str


Part = TextPart | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class FoundCall:
    """A call in a text: the JSON text of its arguments, as far as it goes."""

    name: str
    arguments: str


@dataclass(slots=True)
class CallReader:
    """Splits one answer into text and calls of the functions in `names`. What looks like a call but is none stays text.

    Args:
        names: the functions that may be called; without any, all is text.
        most: the number of calls after which others are dropped; None keeps all.
    """

    names: Collection[str]
    most: int | None = None
    calls: int = 0
    _text: str = ""
    _told: list[int] = field(default_factory=list)
    """For each item of the text so far, how many of its characters were given out."""

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        if not self.names:
            return [TextPart(text)] if text else []
        self._text += text
        return list(self._news(ended=False))

    def end(self) -> list[Part]:
        """The parts that were held back, at the end of the answer."""
        return list(self._news(ended=True)) if self.names else []

    def _news(self, *, ended: bool) -> Iterator[Part]:
        call = -1
        for index, item in enumerate(split_calls(self._text, self.names, ended=ended)):
            call += isinstance(item, FoundCall)
            whole = item.arguments if isinstance(item, FoundCall) else item
            is_new = index == len(self._told)
            if is_new:
                self._told.append(0)
            news, self._told[index] = whole[self._told[index] :], len(whole)
            if isinstance(item, str):
                yield from [TextPart(news)] * bool(news)
            elif self.most is None or call < self.most:
                if is_new:
                    self.calls += 1
                    yield CallStart(call, new_call_id(), item.name)
                yield from [CallArguments(call, news)] * bool(news)


def split_calls(text: str, names: Collection[str], *, ended: bool) -> list[str | FoundCall]:
    """The texts and calls of an answer, in order. Unless it has `ended`, what is undecided yet is left out: later items and the
    last one only ever grow as text is added."""
    if (bare := _BARE.match(text)) is not None:
        calls, end = _calls_from(text, bare.end(), len(text), names)
        if calls:
            rest = text[_skip(text, end) :].strip() if ended and end is not None else ""
            return [*calls, *([rest] if rest else [])]
        if not ended:
            return []
    if not ended and (_UNDECIDED.match(text) or any(one.startswith(text.lstrip()) for one in _MARKERS)):
        return []
    return _tagged(text, names, ended=ended)


def _tagged(text: str, names: Collection[str], *, ended: bool) -> list[str | FoundCall]:
    found: list[str | FoundCall] = []
    position = shown = 0
    while (tag := text.find(_TAG, position)) >= 0:
        inner = tag + len(_TAG)
        close = text.find(_END_TAG, inner)
        calls, _ = _calls_from(text, inner, len(text) if close < 0 else close, names)
        if calls:
            found += [*_shown(text[shown:tag].rstrip(), found), *calls]
            shown = len(text) if close < 0 else close + len(_END_TAG)
        elif close < 0 and not ended:
            return [*found, *_shown(text[shown:tag].rstrip(), found)]
        position = len(text) if close < 0 else close + len(_END_TAG)
    rest = text[shown:]
    if not ended:
        kept = max((size for size in range(1, len(_TAG)) if rest.endswith(_TAG[:size])), default=0)
        rest = rest[: len(rest) - kept].rstrip()
    return [*found, *_shown(rest.rstrip() if found else rest, found)]


def _shown(text: str, before: list[str | FoundCall]) -> list[str]:
    """A text between calls, without the space around it; none if it is empty."""
    found = text.lstrip() if before else text
    return [found] if found else []


def _calls_from(text: str, start: int, end: int, names: Collection[str]) -> tuple[list[FoundCall], int | None]:
    """The calls of a list, or the only one, and where they end; None if the last one goes on."""
    calls: list[FoundCall] = []
    position: int | None = start
    while position is not None and (found := _call_at(text, _skip(text, position), end, names)) is not None:
        call, position = found
        calls.append(call)
    return calls, position


def _skip(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    after = found.end() if found is not None else position
    return after + 1 if text.startswith("[", after) else after


def _call_at(text: str, start: int, end: int, names: Collection[str]) -> tuple[FoundCall, int | None] | None:
    """The call that begins there, and where it ends; None if there is none, or not yet."""
    head = _NAMED.match(text, start, end)
    if head is not None and (name := _decoded(head[1])) in names:
        try:
            _, after = _decoder.raw_decode(text[:end], head.end())
        except (ValueError, RecursionError):
            return FoundCall(str(name), text[head.end() : end]), None
        close = _CLOSE.match(text, after, end)
        return FoundCall(str(name), text[head.end() : after]), close.end() if close is not None else None
    try:
        value, after = _decoder.raw_decode(text[:end], start)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, Mapping) or value.get("name") not in names:
        return None
    arguments: Any = value.get("arguments", value.get("parameters", {}))
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return FoundCall(value["name"], told), after


def _decoded(quoted: str) -> object:
    try:
        return json.loads(quoted)
    except ValueError:
        return None
