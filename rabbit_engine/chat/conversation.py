"""A conversation as a value, and as a JSON file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.storage.tensorfiles import written_whole

FORMAT, VERSION = "rabbit_engine.chat", 1

Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Said:
    """One message; `stopped` marks an answer that the user interrupted."""

    role: Role
    content: str
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """The system message, and the messages so far: questions and answers in turn."""

    system: str = ""
    said: tuple[Said, ...] = ()

    def asked(self, question: str) -> list[dict[str, str]]:
        """The messages of a chat template, with `question` as the last."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [{"role": message.role, "content": message.content} for message in self.said]
        return [*system, *said, {"role": "user", "content": question}]

    def answered(self, question: str, answer: str, *, stopped: bool = False) -> Conversation:
        """The conversation with this question and answer added."""
        return replace(self, said=(*self.said, Said("user", question), Said("assistant", answer, stopped)))


@dataclass(frozen=True, slots=True)
class Saved:
    """The contents of a file: a conversation, and the name of its model."""

    model: str
    conversation: Conversation


def write_conversation(path: Path, model: str, conversation: Conversation, *, overwrite: bool = False) -> None:
    """A JSON file, whole or absent. Raises ConfigurationError if the file exists or cannot be written."""
    messages = [_as_json(message) for message in conversation.said]
    raw = {"format": FORMAT, "version": VERSION, "model": model, "system": conversation.system, "messages": messages}
    try:
        if path.exists() and not overwrite:
            raise ConfigurationError(f"{path} already exists: /save! {path} overwrites it")
        with written_whole(path) as file:
            file.write(json.dumps(raw, indent=1, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror or error}") from error


def read_conversation(path: Path) -> Saved:
    """Read the output of `write_conversation`. Raises ConfigurationError that says what is wrong with the file."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} is not a saved conversation: it is not valid JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ConfigurationError(f'{path} is not a saved conversation: /save writes "format": "{FORMAT}"')
    if raw.get("version") != VERSION:
        raise ConfigurationError(f"{path} has version {raw.get('version')!r} of the format; this program reads version {VERSION}")
    return _parse(path, raw)


def whole_characters(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no tokenizer accepts."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_json(message: Said) -> dict[str, str | bool]:
    return {"role": message.role, "content": message.content, **({"stopped": True} if message.stopped else {})}


def _parse(path: Path, raw: dict[str, Any]) -> Saved:
    model, system, messages = raw.get("model", ""), raw.get("system", ""), raw.get("messages")
    if not isinstance(model, str) or not isinstance(system, str) or not isinstance(messages, list):
        raise ConfigurationError(f'{path} is not a saved conversation: "model" and "system" are texts, "messages" is a list')
    said = tuple(_parse_message(path, index, message) for index, message in enumerate(messages, 1))
    return Saved(model, Conversation(whole_characters(system), said))


def _parse_message(path: Path, index: int, raw: Any) -> Said:
    known = isinstance(raw, dict) and raw.get("role") in get_args(Role) and isinstance(raw.get("content"), str)
    if not known:
        raise ConfigurationError(f'{path}: message {index} needs a "role", which is user or assistant, and a "content", a text')
    return Said(raw["role"], whole_characters(raw["content"]), raw.get("stopped") is True)
