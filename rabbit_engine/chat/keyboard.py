"""Terminal input: multi-line messages, history, and completion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app_session
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.vt100 import Vt100_Output

from rabbit_engine.chat.commands import COMMANDS
from rabbit_engine.chat.conversation import whole_characters

_PROMPT = FormattedText([("bold", "> ")])
_HINT = "Ctrl-C again, or Ctrl-D, leaves"


class Keyboard:
    """Reads what is typed at a terminal; `note` shows a hint. Iteration ends when the user leaves."""

    def __init__(self, history: Path | None, note: Callable[[str], None]) -> None:
        self._note = note
        self._session: PromptSession[str] = PromptSession(
            message=_PROMPT,
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=_open_history(history, note),
            completer=CommandCompleter(),
            complete_while_typing=Condition(self._is_command),
            enable_suspend=True,
            output=_output(),
        )

    def __iter__(self) -> Iterator[str]:
        """Each message or command; Ctrl-C clears the line, or leaves if it is empty."""
        warned = False
        while True:
            try:
                line = self._session.prompt()
            except KeyboardInterrupt:
                if warned and not self._session.default_buffer.text:
                    return
                self._note(_HINT)
                warned = True
            except EOFError:
                return
            else:
                warned = False
                yield whole_characters(line)

    def _is_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


class CommandCompleter(Completer):
    """Completes commands after a slash, and paths after commands that take a file."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Called by prompt_toolkit."""
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            for command in COMMANDS:
                if command.name.startswith(name[1:]):
                    yield Completion(f"/{command.name}", -len(name), display_meta=command.help)
        elif any(f"/{command.name}" == name and command.argument == "FILE" for command in COMMANDS):
            yield from self._paths.get_completions(Document(rest.lstrip()), complete_event)


def history_file(platform: str, environ: Mapping[str, str], home: Path) -> Path:
    """The history file, in the system's directory for application state.

    `platform` is a value of `sys.platform`. Linux and others: XDG base directories, version 0.8.
    """
    if platform == "win32":
        folder = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        folder = home / "Library" / "Application Support"
    else:
        folder = Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return folder / "rabbit_engine" / "chat_history"


class _History(FileHistory):
    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):  # a full disk does not end a conversation
            super().store_string(string)


def _open_history(path: Path | None, note: Callable[[str], None]) -> History:
    """The history, in a file that only its owner can read."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.close(handle)
        path.chmod(0o600)
    except OSError as error:
        note(f"the history is not saved: {path}: {error.strerror or error}")
        return InMemoryHistory()
    return _History(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _output() -> Output:
    """The terminal, without cursor position requests: a late response would look like typed keys."""
    output = get_app_session().output
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False
    return output
