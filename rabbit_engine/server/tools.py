"""Parses tool calls in a model's text, in the formats of the most common chat templates.

<tool_call>{"name": ..., "arguments": {...}}</tool_call>   Qwen, Hermes, SmolLM and others
[TOOL_CALLS][{"name": ..., "arguments": {...}}]            Mistral (the marker is a special token, and may be missing)
{"name": ..., "parameters": {...}}                         Llama 3, with or without <|python_tag|> before it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rabbit_engine.server.errors import RequestError

_MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "[{")
_TAG = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function's name and its arguments, as JSON text."""

    name: str
    arguments: str


def check_tools(tools: Sequence[Any]) -> None:
    """Raise RequestError for a tool that is not a function."""
    for index, tool in enumerate(tools):
        where, kind = f"tools.{index}", tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise RequestError(400, f'{where}: a tool is {{"type": "function", "function": {{"name": ...}}}}', param=where)
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RequestError(400, f"{where}.function.name: a function needs a name", param=f"{where}.function.name")


def may_be_call(text: str) -> bool:
    """Whether an answer that begins like this may become a call, so that it must not be sent as text yet."""
    start = text.lstrip()
    if not start or any(start.startswith(marker) or marker.startswith(start) for marker in _MARKERS):
        return True
    return _TAG in text or any(text.endswith(_TAG[:length]) for length in range(1, len(_TAG)))


def parse_calls(text: str, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """The text without the calls, and the calls of functions in `names`; a text without calls is returned unchanged."""
    tagged = list(_TAGGED.finditer(text))
    if tagged:
        calls = [call for match in tagged for call in _calls_in(match[1], names)]
        return (_TAGGED.sub("", text).strip(), calls) if calls else (text, [])
    bare = text.strip().removeprefix("[TOOL_CALLS]").removeprefix("<|python_tag|>").strip()
    calls = list(_calls_in(bare, names))
    return ("", calls) if calls else (text, [])


def _calls_in(text: str, names: Sequence[str]) -> Iterator[ToolCall]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return
    for call in found if isinstance(found, list) else [found]:
        if isinstance(call, Mapping) and call.get("name") in names:
            arguments: Any = call.get("arguments", call.get("parameters", {}))
            yield ToolCall(call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
