"""A conversation as a value and a file, its commands, and a chat with a session that answers as told."""

from __future__ import annotations

import io
import json
import signal
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rabbit_engine.chat import (
    Chat,
    Conversation,
    Interrupt,
    Said,
    Saved,
    Screen,
    read_conversation,
    write_conversation,
)
from rabbit_engine.chat.commands import COMMANDS, Call, help_rows, parse_line
from rabbit_engine.chat.tally import summary
from rabbit_engine.errors import ConfigurationError, StreamingError
from rabbit_engine.sessions import Options, Piece, Reply, Request
from rabbit_engine.sessions.prompts import Prompt
from rabbit_engine.streaming import PassProgress, SpeculationProfile

TALK = Conversation("Be brief.", (Said("user", "Hi"), Said("assistant", "Hello, wor", stopped=True)))


# The conversation.


def test_a_question_follows_the_conversation() -> None:
    assert Conversation().asked("Hi") == [{"role": "user", "content": "Hi"}]
    roles = [message["role"] for message in TALK.asked("And now?")]
    assert roles == ["system", "user", "assistant", "user"]
    assert Conversation("Be brief.").answered("Hi", "Hello, wor", stopped=True) == TALK


def test_a_saved_conversation_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    write_conversation(path, "some/model", TALK)
    assert read_conversation(path) == Saved("some/model", TALK)
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]


def test_a_file_is_not_overwritten_unless_requested(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("precious")
    with pytest.raises(ConfigurationError, match="/save! "):
        write_conversation(path, "some/model", TALK)
    assert path.read_text() == "precious"
    write_conversation(path, "some/model", TALK, overwrite=True)
    assert read_conversation(path).conversation == TALK


def test_an_unwritable_conversation_is_a_rabbit_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such" / "folder.json", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigurationError, match="cannot write"):
            write_conversation(path, "some/model", TALK)
    with pytest.raises(ConfigurationError, match="cannot write"):
        write_conversation(tmp_path, "some/model", TALK, overwrite=True)


GOOD = {"format": "rabbit_engine.chat", "version": 1, "model": "", "system": "", "messages": []}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("{", "not valid JSON"),
        ("\udcff\udcfe", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "is not a saved conversation"),
        (json.dumps({"messages": []}), '"format"'),
        (json.dumps({**GOOD, "version": 2}), "version 2"),
        (json.dumps({**GOOD, "messages": {}}), '"messages" is a list'),
        (json.dumps({**GOOD, "system": None}), '"system"'),
        (json.dumps({**GOOD, "messages": [{"role": "user"}]}), "message 1"),
        (json.dumps({**GOOD, "messages": [{"role": "robot", "content": "x"}]}), "message 1"),
        (json.dumps({**GOOD, "messages": [{"role": ["user"], "content": "x"}]}), "message 1"),
        (json.dumps({**GOOD, "messages": ["x"]}), "message 1"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path: Path, raw: str, words: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(raw, errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=words) as caught:
        read_conversation(path)
    assert str(path) in str(caught.value)


def test_half_a_character_in_a_file_reaches_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({**GOOD, "messages": [{"role": "user", "content": "\ud83d!"}]}))
    assert read_conversation(path).conversation.said == (Said("user", "?!"),)


# Lines.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Hi there ", "Hi there"),
        ("  indented", "  indented"),
        ("two\nlines\n", "two\nlines"),
        ("/quit", Call("quit", "")),
        ("/save  my talk.json ", Call("save", "my talk.json")),
        ("/save! x", Call("save!", "x")),
        ("/system Be brief.\nAnd kind.", Call("system", "Be brief.\nAnd kind.")),
        ("//etc/hosts is what?", "/etc/hosts is what?"),
        ("1/2", "1/2"),
    ],
)
def test_a_line_is_a_command_or_a_message(line: str, said: Call | str) -> None:
    assert parse_line(line) == said


@pytest.mark.parametrize(("line", "words"), [("/stat", "did you mean /stats?"), ("/", "/help lists"), ("/HELP", "/help")])
def test_an_unknown_command_names_the_closest(line: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words.replace("?", r"\?")):
        parse_line(line)


# What happens to lines, with a session that answers as told.


class Puppet:
    """A session that answers with the next of `answers`: pieces of text, or an error. A piece that is None waits for the end."""

    most_tokens = 100
    progress = PassProgress(1, 2, 1000, 1.0)

    def __init__(self, *answers: list[str | None] | Exception, cut_tokens: int = 0, passes: int = 0) -> None:
        self._answers = list(answers)
        self._cut_tokens = cut_tokens
        self._passes = passes
        self._speculation = SpeculationProfile()
        self.asked: list[Any] = []

    @property
    def model(self) -> Any:
        return SimpleNamespace(plan="the plan", profile=SimpleNamespace(speculation=replace(self._speculation)))

    def request(self, messages: Any, **options: Any) -> Request:
        self.asked.append(messages)
        return Request(Prompt([1, 2, 3], 5, self._cut_tokens), Options(**options))

    def ask(self, requests: Any, tell: Any) -> list[Any]:
        cancelled = threading.Event()
        threading.Thread(target=self._answer, args=(self._answers.pop(0), tell, cancelled)).start()
        return [SimpleNamespace(cancel=cancelled.set)]

    def _answer(self, pieces: Any, tell: Any, cancelled: threading.Event) -> None:
        if isinstance(pieces, Exception):
            tell(0, pieces)
            return
        said = [piece for piece in pieces if piece is not None]
        for number, piece in enumerate(said):
            tell(0, Piece(piece, number))
        if None in pieces:
            cancelled.wait(30)
        self._speculation.passes += self._passes
        self._speculation.tokens += len(said) if self._passes else 0
        reason: Any = "cancelled" if None in pieces else "stop"
        tell(0, Reply("".join(said), tuple(range(len(said))), reason, 3, first_token_s=0.5, seconds=1.5))


def talk(puppet: Puppet, *lines: str, interrupt: Interrupt | None = None, **keywords: Any) -> tuple[Chat, str, str]:
    """The chat after these lines, with what it wrote and noted."""
    out, notes = io.StringIO(), io.StringIO()
    chat = Chat(puppet, Screen(out, notes, live=False), "some/model", interrupt=interrupt, **keywords)  # type: ignore[arg-type]
    chat.run(lines)
    return chat, out.getvalue(), notes.getvalue()


def test_an_answer_is_written_remembered_and_summed_up() -> None:
    puppet = Puppet(["Hel", "lo"], ["Bye"])
    chat, out, notes = talk(puppet, "Hi", "", "Go", system="Be brief.")
    assert out == "Hello\nBye\n"
    assert notes == "2 tokens, first after 0.5 s, then 1 s a token\n1 token, first after 0.5 s\n"
    assert [message["content"] for message in puppet.asked[1]] == ["Be brief.", "Hi", "Hello", "Go"]
    assert (len(chat.conversation.said), chat.failures) == (4, 0)


def test_tokens_a_pass_of_each_answer_are_shown_when_speculating() -> None:
    _, _, notes = talk(Puppet(["a", "b", "c"], ["d", "e", "f", "g"], passes=2), "Hi", "Go")
    assert [line.rpartition(", ")[2] for line in notes.splitlines()] == ["1.5 tokens a pass", "2.0 tokens a pass"]


def test_ctrl_c_stops_the_answer_and_keeps_its_text() -> None:
    with Interrupt() as interrupt:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        chat, out, notes = talk(Puppet(["Hel", None], ["Bye"]), "Hi", "Go", interrupt=interrupt)
    assert out == "Hel\nBye\n"
    assert chat.conversation.said[1] == Said("assistant", "Hel", stopped=True)
    assert "1 token, stopped, first after" in notes


def test_a_question_without_any_answer_is_not_kept() -> None:
    with Interrupt() as interrupt:
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        chat, out, notes = talk(Puppet([None]), "Hi", interrupt=interrupt)
    assert (out, chat.conversation.said) == ("", ())
    assert "the question was not kept" in notes


def test_an_error_is_one_line_and_the_session_continues() -> None:
    puppet = Puppet(StreamingError("the disk\nis gone"), MemoryError(), ["Hello"])
    chat, out, notes = talk(puppet, "Hi", "Hi", "Hi")
    assert notes.splitlines()[:2] == ["error: the disk is gone", "error: MemoryError"]
    assert (out, chat.failures, len(chat.conversation.said)) == ("Hello\n", 2, 2)


def test_tokens_dropped_from_a_long_conversation_are_reported() -> None:
    assert "dropped the oldest 7 tokens of the conversation" in talk(Puppet(["x"], cut_tokens=7), "Hi")[2]


def test_commands_do_what_help_says(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    lines = ("Hi", "/system Be brief.", f"/save {path}", f"/save {path}", "/reset", "/system -", f"/load {path}", "/quit", "Hi")
    chat, out, notes = talk(Puppet(["Hello"]), *lines)
    assert chat.conversation == Conversation("Be brief.", (Said("user", "Hi"), Said("assistant", "Hello")))
    assert f"2 messages written to {path}" in out
    assert "already exists" in notes
    assert chat.failures == 1


def test_a_file_that_cannot_be_loaded_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    lines = ("Hi", f"/load {tmp_path}/bad.json", "/load /no/such/file", "/load", "/load ~nobody-of-this-name/x", "/nonsense")
    chat, _, notes = talk(Puppet(["Hello"]), *lines)
    assert len(chat.conversation.said) == 2
    assert (chat.failures, notes.count("error: ")) == (5, 5)


def test_help_plan_and_stats() -> None:
    _, out, _ = talk(Puppet(["Hel", "lo"]), "/stats", "Hi", "/help", "/plan", "/stats")
    assert all(name in out for name, _ in help_rows())
    assert all(f"/{command.name}" in out for command in COMMANDS)
    assert "answers    none yet" in out
    assert "answers    1, 2 tokens in all, to prompts of 3" in out
    assert "first token after 0.5 s, then 1 s a token" in out
    assert "the plan" in out
    assert "speculation=" in out


def test_the_line_below_an_answer_says_why_it_ended() -> None:
    assert summary(Reply("x", (1,), "length", 3, first_token_s=2.0)) == "1 token, the limit, first after 2 s"
    assert summary(Reply("", (), "cancelled", 3)) == "no token, stopped"
