"""Parses a line: a command, or a message to the model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rabbit_engine.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Command:
    """A command's name, its argument, and what it does."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("help", "", "show this"),
    Command("system", "[TEXT]", "set the system message; without TEXT, show it; - removes it"),
    Command("reset", "", "forget the conversation, but keep the system message"),
    Command("save", "FILE", "write the conversation as JSON"),
    Command("save!", "FILE", "the same, and overwrite an existing file"),
    Command("load", "FILE", "continue a saved conversation"),
    Command("plan", "", "what stays in memory, what is streamed, what a pass costs"),
    Command("stats", "", "bytes read so far, and the speed of tokens"),
    Command("quit", "", "leave, as Ctrl-D does"),
)

_KEYS = (
    ("Enter", "sends; a backslash before it, or Alt+Enter, begins another line"),
    ("Ctrl-C", "stops an answer or clears a line; twice, leaves"),
    ("//...", "sends a message that begins with one slash"),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A command's name and its argument."""

    name: str
    argument: str


def parse_line(text: str) -> Call | str:
    """`"/save notes.json" -> Call("save", "notes.json")`; anything else is a message, `"//x"` is `"/x"`.

    Raises ConfigurationError for an unknown command; the message names the closest one.
    """
    if text.startswith("//"):
        return text[1:].rstrip()
    if not text.startswith("/"):
        return text.rstrip()
    name, *rest = text[1:].split(maxsplit=1) or [""]
    if any(name == command.name for command in COMMANDS):
        return Call(name, rest[0].strip() if rest else "")
    raise ConfigurationError(_unknown(name))


def help_rows() -> list[tuple[str, str]]:
    """Commands and keys, each with what it does."""
    return [(f"/{command.name} {command.argument}".strip(), command.help) for command in COMMANDS] + list(_KEYS)


def _unknown(name: str) -> str:
    names = [command.name for command in COMMANDS]
    close = difflib.get_close_matches(name.lower(), names, n=1)
    known = f"did you mean /{close[0]}?" if close else "/help lists them."
    return f"there is no command /{name}: {known} To send a message that begins with a slash, write //..."
