"""Reads the items of a request as messages: texts, calls of functions with their outputs, and reasoning."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.server.errors import RequestError
from rabbit_engine.sessions import read_messages
from rabbit_engine.sessions.images import image_of_part, read_image
from rabbit_engine.sessions.messages import read_content

_SYSTEMS = ("system", "developer")
_ROLES = (*_SYSTEMS, "user", "assistant")
_SYSTEM_BREAK = "\n\n"
Item = Mapping[str, Any]


def read_items(given: str | Sequence[Any], instructions: str | None, *, with_images: bool = False) -> list[dict[str, Any]]:
    """The messages in the form of chat templates; `instructions` go first, in one message with a system's that follows.
    `with_images` reads images of users and of functions' outputs instead of rejecting them.

    Raises RequestError that names the place.
    """
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    reader = _Reader(with_images=with_images)
    try:
        for index, item in enumerate(items):
            reader.add(item, f"input.{index}")
        found = reader.finish()
        if instructions:
            found = _with_instructions(instructions, found)
        if not found:
            raise RequestError(400, "input: there is no message", param="input")
        return read_messages(found, with_images=with_images)
    except ConfigurationError as error:
        raise RequestError(400, str(error), param=str(error).partition(":")[0]) from error


def _with_instructions(instructions: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [instructions]
    while found and found[0]["role"] in _SYSTEMS:
        texts.append(str(found.pop(0)["content"]))
    return [{"role": "system", "content": _SYSTEM_BREAK.join(texts)}, *found]


class _Reader:
    """Joins the items of one turn of the model: its reasoning, its text and its calls are one message of a chat."""

    def __init__(self, *, with_images: bool) -> None:
        self._with_images = with_images
        self._messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        self._kinds: Mapping[str, Callable[[Item, str], None]] = MappingProxyType(
            {
                "message": self._message,
                "function_call": self._call,
                "function_call_output": self._output,
                "reasoning": self._reasoning,
            }
        )

    def add(self, item: Any, where: str) -> None:
        """Add an item. Raises RequestError, or ConfigurationError that starts with the place."""
        if not isinstance(item, Mapping):
            raise RequestError(400, f"{where}: an item is an object, not {type(item).__name__}", param=where)
        kind = item.get("type") or "message"
        if kind == "item_reference":
            raise RequestError(400, f"{where}: nothing is stored: send the item itself", param=where)
        if not isinstance(kind, str) or kind not in self._kinds:
            known = ", ".join(self._kinds)
            raise RequestError(400, f"{where}: items of type {str(kind)[:60]!r} are not supported: {known} are", param=where)
        self._kinds[kind](item, where)

    def finish(self) -> list[dict[str, Any]]:
        """The messages."""
        self._end_turn()
        return self._messages

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, {}
        if turn:
            self._messages.append({"role": "assistant", "content": None, **turn})

    def _message(self, item: Item, where: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role not in _ROLES:
            told = f"{where}.role: {str(role)[:60]!r} is not a role: {', '.join(_ROLES)} are"
            raise RequestError(400, told, param=f"{where}.role")
        if content is None:
            raise RequestError(400, f"{where}.content: a message needs a content", param=f"{where}.content")
        if role != "assistant":
            self._end_turn()
            read = self._shown if role == "user" else read_content
            self._messages.append({"role": role, "content": read(content, f"{where}.content")})
            return
        text = read_content(content, f"{where}.content")
        if {"content", "tool_calls"} & set(self._turn):
            self._end_turn()
        self._turn["content"] = text

    def _call(self, item: Item, where: str) -> None:
        call_id, name, arguments = (_text_of(item, key, where) for key in ("call_id", "name", "arguments"))
        try:
            json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            told = f"{where}.arguments: not valid JSON: {error}"
            raise RequestError(400, told, param=f"{where}.arguments") from error
        self._names[call_id] = name
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        self._turn.setdefault("tool_calls", []).append(call)

    def _output(self, item: Item, where: str) -> None:
        call_id, output = _text_of(item, "call_id", where), item.get("output")
        if output is None:
            raise RequestError(400, f"{where}.output: the output of a call is missing", param=f"{where}.output")
        self._end_turn()
        message = {"role": "tool", "tool_call_id": call_id, "content": self._shown(output, f"{where}.output")}
        self._messages.append({**message, "name": self._names[call_id]} if call_id in self._names else message)

    def _shown(self, content: Any, where: str) -> str | list[dict[str, Any]]:
        """The text of what the model is shown; parts, if there are images among them."""
        parts = content if isinstance(content, list) else []
        images = [image_of_part(part) if self._with_images else None for part in parts]
        if not any(image is not None for image in images):
            return read_content(content, where)
        return [
            {"type": "text", "text": read_content([part], where)}
            if image is None
            else {"type": "image", "image": read_image(image, where)}
            for part, image in zip(parts, images, strict=True)
        ]

    def _reasoning(self, item: Item, where: str) -> None:
        """Only its text: summaries are another model's, and what is encrypted cannot be read."""
        parts = item.get("content")
        if parts is not None and not isinstance(parts, list):
            raise RequestError(400, f"{where}.content: expected a list of parts", param=f"{where}.content")
        texts = [part.get("text") for part in parts or [] if isinstance(part, Mapping)]
        if {"content", "tool_calls"} & set(self._turn):
            self._end_turn()
        if text := "\n".join(each for each in texts if isinstance(each, str)):
            self._turn["reasoning_content"] = text


def _text_of(item: Item, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or (not value and key != "arguments"):
        raise RequestError(400, f"{where}.{key}: expected a text", param=f"{where}.{key}")
    return value
