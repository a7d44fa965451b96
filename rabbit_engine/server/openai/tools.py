"""The functions that a client offers to the model, and which of them it may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rabbit_engine.server.errors import RequestError


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


def forced_name(choice: Any) -> str | None:
    """The function that `tool_choice` forces a call of, "required" for any, None if none must be called. Raises RequestError."""
    if choice in (None, "", "none", "auto"):
        return None
    if choice in ("required", "any"):
        return "required"
    if isinstance(choice, Mapping):
        if (allowed := _allowed(choice)) is not None:
            return "required" if allowed.get("mode") == "required" else None
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") == "function" and isinstance(name, str) and name not in ("", "required"):
            return name
    told = 'tool_choice: expected "none", "auto", "required", or {"type": "function", "function": {"name": ...}}'
    raise RequestError(400, told, param="tool_choice")


def allowed_of(choice: Any, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that `tool_choice` allows to be called: none, those of its `allowed_tools`, or all. Raises RequestError."""
    if choice == "none":
        return []
    allowed = _allowed(choice) if isinstance(choice, Mapping) else None
    if allowed is None:
        return list(tools)
    named = allowed.get("tools")
    if not isinstance(named, list) or not named or allowed.get("mode", "auto") not in ("auto", "required"):
        told = '{"type": "allowed_tools", "mode": "auto" or "required", "tools": [...]}'
        raise RequestError(400, f"tool_choice: expected {told}", param="tool_choice")
    names = [_name_of(tool) for tool in named]
    found = [tool for tool in tools if _name_of(tool) in names]
    offered = [_name_of(tool) for tool in found]
    if unknown := next((str(name) for name in names if name not in offered), None):
        raise RequestError(400, f"tool_choice: {unknown[:60]!r} is not among the tools", param="tool_choice")
    return found


def _allowed(choice: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What restricts calls to some tools, as chats and as responses nest it."""
    if choice.get("type") != "allowed_tools":
        return None
    inner = choice.get("allowed_tools", choice)
    return inner if isinstance(inner, Mapping) else {}


def _name_of(tool: Any) -> object:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None
