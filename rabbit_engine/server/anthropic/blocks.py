"""Reads the content blocks of messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rabbit_engine.server.errors import RequestError

Block = Mapping[str, Any]

_METADATA = re.compile(r"(?:\s*x-anthropic-[\w-]+:[^\n]*(?:\n|\Z))+")
"""Lines for Anthropic's accounting at the beginning of a system text: they change with each request."""

_NOT_FETCHED = "the server fetches nothing from the net: send the content itself"


def wrong(where: str, why: str) -> RequestError:
    """The error for a block or a message at a place."""
    return RequestError(400, f"{where}: {why}", param=where)


def read_blocks(content: object, where: str) -> list[tuple[str, Block]]:
    """The blocks of a content, each with its place; a text is one block."""
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise wrong(where, "must be a text or a list of content blocks")
    found = [(f"{where}.{index}", block) for index, block in enumerate(content)]
    for place, block in found:
        if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
            raise wrong(place, 'a content block is an object with a type, as {"type": "text", "text": ...}')
    return found


def read_text(block: Block, where: str) -> str:
    """The text of a block of type text."""
    return text_at(block, "text", where)


def text_at(block: Block, name: str, where: str) -> str:
    """A field that must be a text."""
    value = block.get(name)
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}", "must be a text")
    return value


def without_metadata(text: str) -> str:
    """A system text without lines such as `x-anthropic-billing-header: ...` at its beginning, so that prompts of the same
    conversation begin with the same tokens."""
    found = _METADATA.match(text)
    return text if found is None else text[found.end() :]


def read_shown(block: Block, where: str) -> str:
    """The text of what a user or a tool shows to the model."""
    read = _SHOWN.get(block["type"])
    if read is None:
        raise wrong(where, f"cannot read a block of type {block['type'][:60]!r} here")
    return read(block, where)


def read_image_data(block: Block, where: str) -> str:
    """The base64 text of an image."""
    source, place = _source(block, where), f"{where}.source"
    if source["type"] != "base64":
        raise wrong(place, _NOT_FETCHED)
    return text_at(source, "data", place)


def is_binary_document(block: Block) -> bool:
    """Whether it is a document in base64, such as a PDF file."""
    source = block.get("source")
    return block["type"] == "document" and isinstance(source, Mapping) and source.get("type") == "base64"


def _source(block: Block, where: str) -> Block:
    source = block.get("source")
    if not isinstance(source, Mapping) or not isinstance(source.get("type"), str):
        raise wrong(f"{where}.source", "must be an object with a type")
    return source


def _read_document(block: Block, where: str) -> str:
    _refuse_citations(block, where)
    source, place = _source(block, where), f"{where}.source"
    match source["type"]:
        case "text":
            text = text_at(source, "data", place)
        case "content":
            text = read_shown_blocks(source.get("content"), f"{place}.content")
        case "base64":
            raise wrong(place, "only documents of text are supported: convert this one first")
        case _:
            raise wrong(place, _NOT_FETCHED)
    return "\n".join([*_heads(block, where, ("title", "context")), text])


def _read_search_result(block: Block, where: str) -> str:
    _refuse_citations(block, where)
    return "\n".join([*_heads(block, where, ("title", "source")), read_shown_blocks(block.get("content"), f"{where}.content")])


def _heads(block: Block, where: str, names: tuple[str, ...]) -> list[str]:
    return [text for name in names if block.get(name) is not None and (text := text_at(block, name, where))]


def _refuse_citations(block: Block, where: str) -> None:
    citations = block.get("citations")
    if isinstance(citations, Mapping) and citations.get("enabled"):
        raise wrong(f"{where}.citations", "answers cannot cite documents")


def _read_reference(block: Block, where: str) -> str:
    return text_at(block, "tool_name", where)


def read_shown_blocks(content: object, where: str) -> str:
    """The text of all blocks, joined by newlines."""
    return "\n".join(read_shown(block, place) for place, block in read_blocks(content, where))


_SHOWN: Mapping[str, Callable[[Block, str], str]] = {
    "text": read_text,
    "document": _read_document,
    "search_result": _read_search_result,
    "tool_reference": _read_reference,
}
