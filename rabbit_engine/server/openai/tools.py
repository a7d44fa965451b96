"""Checks the functions that a client offers to the model."""

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
