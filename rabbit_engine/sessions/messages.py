"""Messages as chat templates take them, from what clients and chat interfaces hand over.

A message is `{"role": ..., "content": ...}`, a `(role, content)` pair, an object with these attributes (Gradio's `ChatMessage`,
the openai package's messages), or a `(user, assistant)` pair of an older Gradio history. Its content is a text, a list of
parts such as `{"type": "text", "text": ...}`, or Gradio's `{"text": ..., "files": [...]}`. Anything but text is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rabbit_engine.errors import ConfigurationError

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")} | {
    "human": "user",  # LangChain's words in pairs
    "ai": "assistant",
}
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""The types of parts that hold text, and where."""

_ATTRIBUTES = ("role", "content", "tool_calls", "tool_call_id", "name")
_NOT_FOR_TEMPLATES = ("metadata", "options")
"""What Gradio keeps in a message for its own display."""


def read_messages(given: Any) -> list[dict[str, Any]]:
    """A conversation in any of the forms above; a bare text is the user's.

    Raises ConfigurationError that begins with the place, as `messages.0.content: ...`.
    """
    if isinstance(given, str) or (isinstance(given, Mapping) and "role" not in given):
        return [{"role": "user", "content": read_content(given, "messages.0.content")}]
    if isinstance(given, Mapping) or hasattr(given, "role") or _names_role(given):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ConfigurationError(f"messages: a text or a list of messages is needed, not {type(given).__name__}")
    return [message for index, one in enumerate(given) for message in _read(one, f"messages.{index}")]


def read_content(content: Any, where: str) -> str:
    """The text of a message's content: None is an empty one, parts are joined by line ends."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping) and "type" not in content:
        _refuse_files(content.get("files"), where)
        content = [{"type": "text", "text": content.get("text")}]
    elif isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise ConfigurationError(f"{where}: a text or a list of parts is needed, {_describe(content)} cannot be read")
    return "\n".join(_part(part, where) for part in content)


def _names_role(given: Any) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str) and given[0] in _ROLES


def _read(one: Any, where: str) -> Iterator[dict[str, Any]]:
    if isinstance(one, tuple | list):
        yield from _read_pair(one, where)
        return
    message = dict(one) if isinstance(one, Mapping) else _attributes(one)
    if not isinstance(message.get("role"), str):
        raise ConfigurationError(f"{where}.role: a message needs a role, such as user or assistant; {_describe(one)} has none")
    message = {name: value for name, value in message.items() if name not in _NOT_FOR_TEMPLATES}
    message["content"] = read_content(message.get("content"), f"{where}.content")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _read_calls(calls, f"{where}.tool_calls")
    yield message


def _read_pair(pair: Sequence[Any], where: str) -> Iterator[dict[str, Any]]:
    if len(pair) != 2:
        raise ConfigurationError(f"{where}: a pair of role and content, or of user and assistant, has 2 items, not {len(pair)}")
    if _names_role(pair):
        yield {"role": _ROLES[pair[0]], "content": read_content(pair[1], f"{where}.content")}
        return
    for role, content in zip(("user", "assistant"), pair, strict=True):
        if content is not None:  # an answer that is still to come
            yield {"role": role, "content": read_content(content, f"{where}.{role}")}


def _attributes(one: Any) -> dict[str, Any]:
    dump = getattr(one, "model_dump", None)  # pydantic's, as the openai package's messages are
    if callable(dump):
        return dict(dump(exclude_none=True))
    return {name: value for name in _ATTRIBUTES if (value := getattr(one, name, None)) is not None}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ConfigurationError(f"{where}: {_describe(part)} cannot be read here, only text can")
    kind = part.get("type", "text" if "text" in part else None)
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise ConfigurationError(f"{where}: a part of type {kind!r}{_file_name(part)} cannot be read here, only text can")
    return text


def _refuse_files(files: Any, where: str) -> None:
    if files:
        first = files[0] if isinstance(files, list | tuple) else files
        raise ConfigurationError(f"{where}: the file {_describe(first)} cannot be read here, only text can")


def _file_name(part: Mapping[str, Any]) -> str:
    file = part.get("file")
    name = file.get("orig_name") or file.get("path") if isinstance(file, Mapping) else part.get("path")
    return f" ({name})" if isinstance(name, str) else ""


def _describe(value: Any) -> str:
    """A file by its name, everything else by its type."""
    path = value.get("path") if isinstance(value, Mapping) else getattr(value, "path", value)
    return path if isinstance(path, str) else f"a value of type {type(value).__name__}"


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise ConfigurationError(f"{where}: a list of calls is needed, not {type(calls).__name__}")
    return [_with_object(call, where) for call in calls]


def _with_object(call: Any, where: str) -> dict[str, Any]:
    """Templates write the arguments themselves, and take them as an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ConfigurationError(f"{where}: a call names its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{where}: the arguments are no JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}
