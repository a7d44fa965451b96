"""`Chat`: sends a person's messages to a session, keeps the conversation, and runs the commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rabbit_engine.chat.commands import Call, help_rows, parse_line
from rabbit_engine.chat.conversation import Conversation, read_conversation, write_conversation
from rabbit_engine.chat.following import follow
from rabbit_engine.chat.interrupt import Interrupt
from rabbit_engine.chat.screen import Screen
from rabbit_engine.chat.tally import Tally, summary
from rabbit_engine.errors import ConfigurationError, RabbitError
from rabbit_engine.sessions import Session


class Chat:
    """One conversation with the model `name` of a session. No error in an answer or a command ends it.

    `options` go with every question; an answer ends when `interrupt` is pressed.
    """

    def __init__(
        self,
        session: Session,
        screen: Screen,
        name: str,
        *,
        system: str = "",
        options: Mapping[str, Any] | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        self._session, self._screen, self._name = session, screen, name
        self._options = dict(options or {})
        self._interrupt = interrupt or Interrupt()
        self._tally = Tally()
        self.conversation = Conversation(system)
        self.failures = 0

    def run(self, lines: Iterable[str]) -> None:
        """Handle lines until they end or one quits."""
        for line in lines:
            if not self.take(line):
                return

    def take(self, line: str) -> bool:
        """Handle a line; False if it quits. An error is shown in one line and counted."""
        try:
            said = parse_line(line)
            if isinstance(said, Call):
                return self._call(said)
            if said.strip():
                self._answer(said)
        except (RabbitError, MemoryError, torch.OutOfMemoryError) as error:
            self.failures += 1
            self._screen.warn(" ".join(str(error).split()) or type(error).__name__)
        return True

    def _answer(self, question: str) -> None:
        request = self._session.request(self.conversation.asked(question), **self._options)
        if request.prompt.cut_tokens:
            self._screen.note(
                f"dropped the oldest {request.prompt.cut_tokens} tokens of the conversation: prompt and answer together may have "
                f"{self._session.most_tokens} tokens (/reset forgets all of it)"
            )
        self._interrupt.pressed = False
        before = self._session.model.profile.speculation
        reply = follow(self._session, request, self._screen, self._interrupt)
        self._tally.add(reply)
        if reply.tokens:
            self.conversation = self.conversation.answered(question, reply.text, stopped=reply.finish_reason == "cancelled")
        speculated = self._session.model.profile.speculation.since(before)
        self._screen.note(summary(reply, speculated.tokens_a_pass) + ("" if reply.tokens else ": the question was not kept"))

    def _call(self, call: Call) -> bool:
        if call.name == "quit":
            return False
        commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "save!": self._save_over,
            "load": self._load,
            "plan": self._plan,
            "stats": self._stats,
        }
        commands[call.name](call.argument)
        return True

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for row in help_rows():
            table.add_row(*row)
        self._screen.say(table)

    def _system(self, text: str) -> None:
        if text:
            self.conversation = replace(self.conversation, system="" if text == "-" else text)
        told = self.conversation.system
        self._screen.say(f"system: {told}" if told else "no system message is set")

    def _reset(self, _: str) -> None:
        forgotten = len(self.conversation.said)
        self.conversation = replace(self.conversation, said=())
        self._screen.say(f"{_messages(forgotten)} forgotten")

    def _save(self, name: str, *, overwrite: bool = False) -> None:
        path = _file(name, "/save")
        write_conversation(path, self._name, self.conversation, overwrite=overwrite)
        self._screen.say(f"{_messages(len(self.conversation.said))} written to {path}")

    def _save_over(self, name: str) -> None:
        self._save(name, overwrite=True)

    def _load(self, name: str) -> None:
        path = _file(name, "/load")
        saved = read_conversation(path)
        self.conversation = saved.conversation
        other = f", had with {saved.model}" if saved.model != self._name else ""
        self._screen.say(f"{_messages(len(self.conversation.said))} read from {path}{other}")

    def _plan(self, _: str) -> None:
        self._screen.say(str(self._session.model.plan))

    def _stats(self, _: str) -> None:
        self._screen.say(f"{self._tally}\n{self._session.model.profile}")


def _messages(count: int) -> str:
    return f"{count} message" + ("" if count == 1 else "s")


def _file(name: str, command: str) -> Path:
    """Raises ConfigurationError if no file is named."""
    if not name:
        raise ConfigurationError(f"{command} needs a file: {command} conversation.json")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{name}: {error}") from error
