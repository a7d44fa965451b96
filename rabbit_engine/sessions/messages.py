"""Turns messages from clients and chat interfaces into what chat templates take.

A message is `{"role": ..., "content": ...}`, a `(role, content)` pair, an object with these attributes (Gradio's `ChatMessage`,
the openai package's messages), or a `(user, assistant)` pair of an older Gradio history. Its content is a text, a list of
parts such as `{"type": "text", "text": ...}`, or Gradio's `{"text": ..., "files": [...]}`. Images are parts, too, where a model
takes them (`images`). Anything else is rejected by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.sessions.images import image_of_part, read_image
from rabbit_engine.sessions.spelling import nearest

_ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function")} | {
    "human": "user",  # LangChain's role names in pairs
    "ai": "assistant",
}
_OTHER_ROLES = ("human", "ai", "model", "bot", "gpt", "ipython", "tools", "functions")
"""Keys that chat templates may use: they are passed on unchanged."""

_NEED_CONTENT = ("system", "developer", "user", "tool", "function")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that hold text, and the key it is under."""

_ATTRIBUTES = ("role", "content", "tool_calls", "tool_call_id", "name")
_NOT_FOR_TEMPLATES = ("metadata", "options")
"""Keys that Gradio adds to a message for its own display."""

_ONLY_TEXT = "only text is supported here; images of image-text models are parts of the content"
_REFUSED = {
    **dict.fromkeys(("image", "images", "image_url", "audio", "input_audio", "audios", "video", "videos"), _ONLY_TEXT),
    **dict.fromkeys(("file", "files", "attachments"), _ONLY_TEXT),
    **dict.fromkeys(("prefix", "partial"), "use continue_final_message"),
    "function_call": "use tool_calls",
}
"""Keys of a message that would change the answer, and what to do instead. Empty values have no effect."""

_MEANT_FOR_CONTENT = ("text", "parts", "message", "value")
_KNOWN = (
    *(*_ATTRIBUTES, *_NOT_FOR_TEMPLATES, *_REFUSED, "refusal", "annotations"),
    *("reasoning", "reasoning_content", "thinking", "tools", "documents", "citations"),
)
_MOST_UNKNOWN = 64
"""Other known keys and roles."""


def read_messages(given: object, *, with_images: bool = False) -> list[dict[str, object]]:
    """A conversation in any of the forms above; a plain text is a message of the user.

    `with_images` reads images instead of rejecting them; if there are any, the content of every message is a list of parts, as
    processors take it. Raises ConfigurationError that starts with the place, as `messages.0.content: ...`.
    """
    if isinstance(given, str) or (isinstance(given, Mapping) and not {"role", "content"} & set(given)):
        return [{"role": "user", "content": read_content(given, "messages.0.content")}]
    if isinstance(given, Mapping) or hasattr(given, "role") or _names_role(given):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ConfigurationError(f"messages: expected a text or a list of messages, not {type(given).__name__}")
    found = [message for index, one in enumerate(given) for message in _unify(one, f"messages.{index}")]
    _check_spelling(found)
    has_images = with_images and any(_has_image(message.get("content")) for _, message in found)
    return [_read(message, where, as_parts=has_images) for where, message in found]


def has_images(messages: Sequence[Mapping[str, object]]) -> bool:
    """Whether the contents of messages that were read are lists of parts, with an image among them."""
    return any(isinstance(message.get("content"), list) for message in messages)


def _has_image(content: object) -> bool:
    parts = content if isinstance(content, list | tuple) else [content]
    return any(image_of_part(part) is not None for part in parts)


def _read_parts(content: object, where: str) -> list[dict[str, object]]:
    """The content as parts of texts and PIL images."""
    parts = content if isinstance(content, list | tuple) else [content] if content else []
    found: list[dict[str, object]] = []
    for part in parts:
        image = image_of_part(part)
        if image is not None:
            found.append({"type": "image", "image": read_image(image, where)})
        elif text := read_content([part] if isinstance(part, Mapping) else part, where):
            found.append({"type": "text", "text": text})
    return found


def read_content(content: object, where: str) -> str:
    """The text of a message's content: empty for None, parts joined by newlines."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, tuple) and content and isinstance(content[0], str):  # Gradio's (path, alternative text)
        _refuse_files(content, where)
    if isinstance(content, Mapping):
        if "type" not in content:
            _refuse_files(content.get("files"), where)
        content = [content]
    if not isinstance(content, list | tuple):
        raise ConfigurationError(f"{where}: expected a text or a list of parts, but got {_describe(content)}")
    return "\n".join(_part(part, where) for part in content)


def _unify(one: object, where: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Convert messages to dictionaries, each with its place."""
    if isinstance(one, tuple | list):
        yield from ((where, message) for message in _split_pair(one, where))
        return
    message = dict(one) if isinstance(one, Mapping) else _attributes(one)
    yield where, {name: value for name, value in message.items() if name not in _NOT_FOR_TEMPLATES}


def _check_spelling(found: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Reject misspelt keys and roles, each name once at its first place, so that long conversations take no time."""
    keys = {
        str(key): f"{where}.{str(key)[:60]}"
        for where, message in reversed(found)
        for key, value in message.items()
        if value is not None
    }
    _refuse_misspelt(keys, _KNOWN, (*_KNOWN, *_MEANT_FOR_CONTENT, "context"))
    roles = {role: f"{where}.role" for where, message in reversed(found) if isinstance(role := message.get("role"), str)}
    _refuse_misspelt(roles, _ROLES, (*_ROLES, *_OTHER_ROLES))


def _refuse_misspelt(places: Mapping[str, str], meant: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in places if name not in known]
    if len(unknown) > _MOST_UNKNOWN:
        raise ConfigurationError(f"{places[unknown[0]]}: the messages have {len(unknown)} unknown keys or roles")
    for name in unknown:
        if near := nearest(name, meant):
            raise ConfigurationError(f"{places[name]}: {name[:60]!r} is not known: did you mean {near!r}?")


def _read(message: dict[str, object], where: str, *, as_parts: bool) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str):
        raise ConfigurationError(f"{where}.role: a message needs a role, such as user or assistant")
    for name, why in _REFUSED.items():
        if message.get(name):
            raise ConfigurationError(f"{where}.{name}: not supported{_of_file(message[name])}: {why}")
    content = message.get("content")
    if content is None:
        _require_no_content(message, role, where)
        content = message.get("refusal")
    read = _read_parts if as_parts else read_content
    message["content"] = read(content, f"{where}.content")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _read_calls(calls, f"{where}.tool_calls")
    return message


def _require_no_content(message: Mapping[str, object], role: str, where: str) -> None:
    """Only an answer that consists of calls may have no content; any other message needs one, even if empty."""
    elsewhere = next((name for name in _MEANT_FOR_CONTENT if message.get(name)), None)
    if elsewhere is not None:
        raise ConfigurationError(f"{where}.content: missing; did you mean 'content' by {elsewhere!r}?")
    if role in _NEED_CONTENT:
        raise ConfigurationError(f"{where}.content: missing, and a message of role {role} needs one")


def _names_role(given: object) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], str) and given[0] in _ROLES


def _split_pair(pair: Sequence[object], where: str) -> Iterator[dict[str, object]]:
    if len(pair) != 2:
        raise ConfigurationError(f"{where}: a pair of role and content, or of user and assistant, has 2 items, not {len(pair)}")
    if _names_role(pair):
        yield {"role": _ROLES[str(pair[0])], "content": pair[1]}
        return
    for role, content in zip(("user", "assistant"), pair, strict=True):
        if content is not None:  # the answer is still to come
            yield {"role": role, "content": content}


def _attributes(one: object) -> dict[str, object]:
    dump = getattr(one, "model_dump", None)  # Pydantic models, such as the openai package's messages
    if callable(dump):
        return dict(dump(exclude_none=True))
    return {name: value for name in _ATTRIBUTES if (value := getattr(one, name, None)) is not None}


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ConfigurationError(f"{where}: cannot read {_describe(part)}, only text")
    kind = part.get("type", "text" if "text" in part else None)
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise ConfigurationError(f"{where}: cannot read {_name_part(part, kind)}, only text")
    return text


def _name_part(part: Mapping[str, object], kind: object) -> str:
    if kind is not None:
        return f"a part of type {kind!r}{_of_file(part)}"
    if isinstance(component := part.get("component"), str):  # Gradio's
        return f"a component {component!r}{_of_file(part.get('value'))}"
    return f"the file {name}" if (name := _file_name(part)) else f"a part with the keys {', '.join(map(str, part))[:80]}"


def _refuse_files(files: object, where: str) -> None:
    if files:
        first = files[0] if isinstance(files, list | tuple) else files
        raise ConfigurationError(f"{where}: cannot read the file {_describe(first)}, only text")


def _of_file(value: object) -> str:
    name = _file_name(value)
    return f" ({name})" if name else ""


def _file_name(value: object) -> str | None:
    """The name of a file, or of the first in a list, in the forms of Gradio and OpenAI's clients."""
    if isinstance(value, list | tuple) and value:
        return _file_name(value[0])
    if isinstance(value, str):
        return value[:200]
    if not isinstance(value, Mapping):
        return None
    inner = next((value[name] for name in ("orig_name", "filename", "path", "url", "file") if value.get(name)), None)
    return _file_name(inner)


def _describe(value: object) -> str:
    """Describe a file by its name, anything else by its type."""
    path = value.get("path") if isinstance(value, Mapping) else getattr(value, "path", value)
    return path if isinstance(path, str) else f"a value of type {type(value).__name__}"


def _read_calls(calls: object, where: str) -> list[dict[str, object]]:
    if not isinstance(calls, list):
        raise ConfigurationError(f"{where}: expected a list of calls, not {type(calls).__name__}")
    return [_with_object(call, where) for call in calls]


def _with_object(call: object, where: str) -> dict[str, object]:
    """The call with its arguments as an object: templates serialise them themselves."""
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        raise ConfigurationError(f"{where}: a call needs the name of a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{where}: the arguments are not valid JSON: {error}") from error
    return {**call, "function": {**function, "arguments": arguments}}
