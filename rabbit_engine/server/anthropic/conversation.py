"""Turns a conversation of Anthropic's API into the messages that a session takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rabbit_engine.server.anthropic.blocks import (
    Block,
    is_binary_document,
    read_blocks,
    read_image_data,
    read_shown,
    read_text,
    text_at,
    without_metadata,
    wrong,
)

_MERGED = ("user", "assistant")
"""Consecutive messages of these roles are one, as in Anthropic's API."""

_ERROR = "Error: "
_BEGINNING = 80
"""Where the text of a failed tool says that it is an error, or else is told to."""

_SHOWN_NEXT = "(The image is in the next message.)"
_UNSEEN = "(An image, which you cannot see.)"
_UNREADABLE = "(A document that is not text, which you cannot read.)"
"""Told to the model where a tool returned such a thing: an error would end the conversation, as clients send it again."""


def read_conversation(system: object, messages: Sequence[object], *, with_images: bool = True) -> list[dict[str, Any]]:
    """Messages with texts, tool calls and results of tools. Images that tools return are shown only `with_images`; those of the
    user always. Raises RequestError that names the place."""
    reader = _Conversion(with_images=with_images)
    if system is not None:
        reader.add_system(system, "system")
    for index, message in enumerate(messages):
        reader.add(message, f"messages.{index}")
    return reader.messages


class _Conversion:
    def __init__(self, *, with_images: bool) -> None:
        self.messages: list[dict[str, Any]] = []
        self._with_images = with_images
        self._names: dict[str, str] = {}
        """The name of the tool of each call."""

    def add(self, message: object, where: str) -> None:
        """Add the next message."""
        if not isinstance(message, Mapping):
            raise wrong(where, 'a message is {"role": ..., "content": ...}')
        content, place = message.get("content"), f"{where}.content"
        match message.get("role"):
            case "user":
                self._add_user(content, place)
            case "assistant":
                self._append(self._read_assistant(read_blocks(content, place)))
            case "system":
                self.add_system(content, place)
            case _:
                raise wrong(f"{where}.role", "must be user, assistant or system")

    def add_system(self, content: object, where: str) -> None:
        """Add instructions, without what only Anthropic's server reads."""
        texts = []
        for place, block in read_blocks(content, where):
            if block["type"] != "text":
                raise wrong(place, "instructions are blocks of type text")
            text = read_text(block, place)
            texts += [kept] if (kept := without_metadata(text)) or not text else []
        if texts:
            self._append({"role": "system", "content": _parts(texts)})

    def _add_user(self, content: object, where: str) -> None:
        """Add results of tools and the user's texts, in their order; images of results follow all of them."""
        blocks = read_blocks(content, where)
        results = [(place, block) for place, block in blocks if block["type"] == "tool_result"]
        images: list[dict[str, Any]] = []
        for place, block in blocks:
            if block["type"] == "tool_result":
                self.messages.append(self._read_result(block, place, images))
                if place == results[-1][0] and images:
                    self._append({"role": "user", "content": images})
            else:
                self._append({"role": "user", "content": [self._read_part(block, place, of_tool=bool(results))]})
        if not blocks:
            self._append({"role": "user", "content": []})

    def _read_part(self, block: Block, where: str, *, of_tool: bool) -> dict[str, Any]:
        """What a user shows, or a client next to the results `of_tool`s."""
        if block["type"] == "image" and (self._with_images or not of_tool):
            return _image(read_image_data(block, where))
        return _text(self._read_tools(block, where) if of_tool else read_shown(block, where))

    def _read_result(self, block: Block, where: str, images: list[dict[str, Any]]) -> dict[str, Any]:
        """A message with the text of a result; its images are added to `images`."""
        identity, content = text_at(block, "tool_use_id", where), block.get("content")
        parts = [] if content is None else read_blocks(content, f"{where}.content")
        text = "\n".join(self._read_returned(part, place, images) for place, part in parts)
        if block.get("is_error") and "error" not in text[:_BEGINNING].lower():
            text = _ERROR + text
        name = {"name": self._names[identity]} if identity in self._names else {}
        return {"role": "tool", "tool_call_id": identity, **name, "content": text}

    def _read_returned(self, block: Block, where: str, images: list[dict[str, Any]]) -> str:
        if block["type"] != "image" or not self._with_images:
            return self._read_tools(block, where)
        images.append(_image(read_image_data(block, where)))
        return _SHOWN_NEXT

    @staticmethod
    def _read_tools(block: Block, where: str) -> str:
        """The text of what a tool returned, or that it has none."""
        if block["type"] == "image":
            read_image_data(block, where)
            return _UNSEEN
        return _UNREADABLE if is_binary_document(block) else read_shown(block, where)

    def _read_assistant(self, blocks: Sequence[tuple[str, Block]]) -> dict[str, Any]:
        texts, thoughts, calls = [], [], []
        for place, block in blocks:
            match block["type"]:
                case "text":
                    texts.append(read_text(block, place))
                case "thinking":
                    thoughts.append(text_at(block, "thinking", place))
                case "redacted_thinking":
                    continue
                case "tool_use":
                    calls.append(self._read_call(block, place))
                case other:
                    raise wrong(place, f"cannot read a block of type {other[:60]!r} of an assistant")
        found: dict[str, Any] = {"role": "assistant", "content": _parts(texts)}
        if thought := "\n".join(filter(None, thoughts)):
            found["reasoning_content"] = thought
        return found | ({"tool_calls": calls} if calls else {})

    def _read_call(self, block: Block, where: str) -> dict[str, Any]:
        identity, name, given = text_at(block, "id", where), text_at(block, "name", where), block.get("input")
        if not isinstance(given, Mapping):
            raise wrong(f"{where}.input", "must be an object")
        self._names[identity] = name
        return {"id": identity, "type": "function", "function": {"name": name, "arguments": given}}

    def _append(self, message: dict[str, Any]) -> None:
        """Add a message, to the last one if that has the same role."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != message["role"] or message["role"] not in _MERGED:
            self.messages.append(message)
            return
        last["content"] += message["content"]
        if calls := message.get("tool_calls"):
            last["tool_calls"] = [*last.get("tool_calls", []), *calls]
        if thought := message.get("reasoning_content"):
            last["reasoning_content"] = "\n".join(filter(None, (last.get("reasoning_content"), thought)))


def _parts(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [_text(text) for text in texts]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(data: str) -> dict[str, Any]:
    return {"type": "image", "base64": data}
