"""Lines that a person types: several at once if need be, remembered, and completed."""

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
    """Reads what is typed at a terminal; `note` shows a hint. Iterating ends when the person leaves."""

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
        """Each message or command; Ctrl-C drops a line, and leaves where there is none."""
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
    """Commands after a slash, paths after those that take a file."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """As prompt_toolkit asks for them."""
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
    """Where lines are remembered: the place that the system has for what a program notes by itself.

    `platform` as `sys.platform` has it. Linux and others: XDG base directories, version 0.8.
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
    """Lines of earlier times, in a file that only its owner reads."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.close(handle)
        path.chmod(0o600)
    except OSError as error:
        note(f"lines are not remembered: {path}: {error.strerror or error}")
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
    """The terminal, without questions where its cursor is: an answer that comes late looks as if it were typed."""
    output = get_app_session().output
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False
    return output
