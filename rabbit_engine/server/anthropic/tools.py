"""Turns tools of Anthropic's API into those of chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rabbit_engine.server.errors import RequestError


def read_tools(tools: Sequence[object]) -> list[dict[str, Any]]:
    """The functions that the model may call. Raises RequestError for tools that only Anthropic's server has."""
    found = [_read(tool, f"tools.{index}") for index, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise RequestError(400, f"tools: two of them are called {twice[:60]!r}", param="tools")
    return found


def _read(tool: object, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(400, f'{where}: a tool is {{"name": ..., "input_schema": {{...}}}}', param=where)
    kind = tool.get("type") or "custom"
    if kind != "custom":
        told = f"the tool {str(kind)[:60]!r} is Anthropic's own: offer one with a name and an input_schema"
        raise RequestError(400, f"{where}: {told}", param=where)
    name, schema, about = tool.get("name"), tool.get("input_schema"), tool.get("description")
    if not isinstance(name, str) or not name:
        raise RequestError(400, f"{where}.name: a tool needs a name", param=f"{where}.name")
    if not isinstance(schema, Mapping):
        raise RequestError(400, f"{where}.input_schema: a tool needs a JSON schema of its input", param=f"{where}.input_schema")
    if about is not None and not isinstance(about, str):
        raise RequestError(400, f"{where}.description: must be a text", param=f"{where}.description")
    callers = tool.get("allowed_callers")
    if callers and "direct" not in (callers if isinstance(callers, list) else [callers]):
        told = "the server runs no code that could call the tool"
        raise RequestError(400, f"{where}.allowed_callers: {told}", param=f"{where}.allowed_callers")
    examples = {"input_examples": tool["input_examples"]} if tool.get("input_examples") else {}
    return {"type": "function", "function": {"name": name, "description": about or "", "parameters": schema, **examples}}
