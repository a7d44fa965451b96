"""What a line says: a command, or something to ask the model."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from rabbit_engine.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Command:
    """How it is called, what may follow, and what it does."""

    name: str
    argument: str
    help: str


COMMANDS = (
    Command("help", "", "show this"),
    Command("system", "[TEXT]", "tell the model what to be; alone, show it; - removes it"),
    Command("reset", "", "forget what was said, but for the system text"),
    Command("save", "FILE", "write the conversation as JSON"),
    Command("save!", "FILE", "the same, over a file that is there"),
    Command("load", "FILE", "go on with a conversation that was saved"),
    Command("plan", "", "what stays in memory, what is streamed, what a pass costs"),
    Command("stats", "", "what was read so far, and how fast tokens came"),
    Command("quit", "", "leave; Ctrl-D does too"),
)

_KEYS = (
    ("Enter", "sends; a backslash before it, or Alt+Enter, begins another line"),
    ("Ctrl-C", "stops an answer, clears a line; twice, leaves"),
    ("//...", "sends a message that begins with one slash"),
)


@dataclass(frozen=True, slots=True)
class Call:
    """A command, by its name, and what followed it."""

    name: str
    argument: str


def parse_line(text: str) -> Call | str:
    """`"/save notes.json" -> Call("save", "notes.json")`; anything else is a message, `"//x"` is `"/x"`.

    Raises ConfigurationError for a command that is none, with the closest one.
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
    return f"there is no command /{name}: {known} A message that begins with a slash is sent as //..."
