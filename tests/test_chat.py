"""A conversation: as a value and a file, on a screen, from a keyboard, and with a real model in a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pyte
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from rabbit_engine.chat import (
    Chat,
    Conversation,
    Interrupt,
    Keyboard,
    Said,
    Saved,
    Screen,
    history_file,
    read_conversation,
    write_conversation,
)
from rabbit_engine.chat.commands import COMMANDS, Call, help_rows, parse_line
from rabbit_engine.chat.following import status
from rabbit_engine.chat.keyboard import CommandCompleter
from rabbit_engine.chat.screen import advance, cut
from rabbit_engine.chat.tally import summary
from rabbit_engine.cli.chat import require_template
from rabbit_engine.errors import ConfigurationError, StreamingError
from rabbit_engine.sessions import Options, Piece, Reply, Request
from rabbit_engine.sessions.prompts import Prompt
from rabbit_engine.streaming import PassProgress

RABBIT = [sys.executable, "-c", "from rabbit_engine.cli import main; main()"]
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


# The screen.


class Terminal(io.StringIO):
    """A terminal with this many columns and rows, as pyte draws it."""

    def __init__(self, columns: int = 40, rows: int = 8) -> None:
        super().__init__()
        self._drawn = pyte.HistoryScreen(columns, rows, history=1000, ratio=0.5)
        self._drawn.set_mode(pyte.modes.LNM)  # the line discipline's work: a newline returns the carriage too
        self._stream = pyte.Stream(self._drawn)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return super().write(text)

    @property
    def rows(self) -> list[str]:
        """What scrolled off, what is seen, without the empty rows at the end."""
        columns = self._drawn.columns
        gone = ["".join(row[x].data for x in range(columns)) for row in self._drawn.history.top]
        return "\n".join(row.rstrip() for row in (*gone, *self._drawn.display)).rstrip().split("\n")


@pytest.fixture
def screen_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Screen, Terminal]]:
    """`screen_of(columns, rows)` is a live screen and the terminal behind it."""

    def make(columns: int = 40, rows: int = 8) -> tuple[Screen, Terminal]:
        terminal = Terminal(columns, rows)
        monkeypatch.setattr(Screen, "width", columns)
        return Screen(terminal, terminal, live=True), terminal

    return make


@pytest.mark.parametrize("seed", range(12))
def test_the_line_below_leaves_no_trace_in_the_text(screen_of: Any, seed: int) -> None:
    random_stream = random.Random(seed)
    alphabet = ["a", "b c", "\n", "\n\n", "word ", "ten chars.", "日本", "字"] if seed % 2 else ["日本", "字", "\n"]
    pieces = [random_stream.choice(alphabet) for _ in range(60)]
    if seed % 2:  # pyte draws half of a wide character that does not fit its row; terminals begin another
        pieces = [piece for piece in pieces if piece.isascii()]
    (screen, terminal), (_, plain) = screen_of(10, 5), screen_of(10, 5)
    for piece in pieces:
        if random_stream.random() < 0.7:
            screen.show(f"layer {random_stream.randrange(80)} of 80")
        screen.write(piece)
        plain.write(piece)
    screen.show("layer 80 of 80")
    screen.end()
    assert terminal.rows == plain.rows


def test_the_line_is_below_the_text_and_cut_to_the_width(screen_of: Any) -> None:
    screen, terminal = screen_of(20, 3)
    for text in ("one\n", "two\n", "three\n", "four"):
        screen.write(text)
    screen.show("layer 37 of 80, 12.30 GB at 1.20 GB/s")
    assert terminal.rows == ["one", "two", "three", "four", "layer 37 of 80, 12…"]
    screen.show("layer 38 of 80")
    assert terminal.rows[-2:] == ["four", "layer 38 of 80"]
    screen.write(" and more")
    assert terminal.rows[-1] == "four and more"


def test_a_full_row_keeps_its_last_character(screen_of: Any) -> None:
    screen, terminal = screen_of(10, 4)
    screen.write("0123456789")
    screen.show("layer 1")
    assert terminal.rows == ["0123456789", "", "layer 1"]
    screen.write("\nnext")
    assert terminal.rows == ["0123456789", "next"]


def test_a_text_does_not_command_the_terminal(screen_of: Any) -> None:
    screen, terminal = screen_of()
    screen.write("a\x1b[2Jb\x07\r\x9bc\n")
    screen.say("d\x1b]0;title\x07")
    assert terminal.rows == ["a[2Jbc", "d]0;title"]


def test_a_screen_that_is_not_live_gets_only_the_text() -> None:
    out, notes = io.StringIO(), io.StringIO()
    screen = Screen(out, notes, live=False)
    screen.show("layer 1 of 2")
    screen.write("text\x1b")
    screen.show("layer 2 of 2")
    screen.end()
    screen.note("a note")
    assert (out.getvalue(), notes.getvalue()) == ("text\x1b\n", "a note\n")


def test_columns_as_terminals_count_them() -> None:
    assert advance(0, "abc", 10) == 3
    assert advance(3, "d\nab", 10) == 2
    assert advance(3, "d\n", 10) == 0
    assert (advance(9, "x", 10), advance(10, "x", 10)) == (10, 1)
    assert (advance(8, "字", 10), advance(9, "字", 10)) == (10, 2)
    assert (advance(1, "\t", 20), advance(9, "\t", 10)) == (8, 9)
    assert advance(1, "e\u0301", 10) == 2
    assert (cut("layer", 5), cut("layer", 4), cut("日本語", 5), cut("x", 0)) == ("layer", "lay…", "日本…", "")


def test_the_status_line_shows_the_token_and_the_progress_of_its_pass() -> None:
    progress = PassProgress(37, 80, 12_300_000_000, 10.0, 21.0)
    assert status(None, 0, 12, 80) == "prompt of 12 tokens ..."
    assert status(progress, 4, 12, 80) == "token 5: layer 37 of 80, 12.30 GB at 1.23 GB/s, token in 11 s"
    assert status(progress, 4, 12, 60) == "layer 37 of 80, 12.30 GB at 1.23 GB/s, token in 11 s"
    assert status(progress, 4, 12, 40) == "layer 37/80, 1.23 GB/s, 11 s left"
    assert status(progress, 4, 12, 30) == "layer 37/80, 11 s left"


# The keyboard.


def typed(*keys: str, history: Path | None = None) -> tuple[list[str], list[str]]:
    """The lines that come of keys, and the notes that were shown."""
    notes: list[str] = []
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text("".join(keys))
        return list(Keyboard(history, notes.append)), notes


ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"


def pasted(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


def test_lines_that_belong_together_are_one_message() -> None:
    lines, _ = typed("one\\", ENTER, "two", ENTER, "three", ALT_ENTER, "four", ENTER, pasted("five\nsix\n"), ENTER, CTRL_D)
    assert lines == ["one\ntwo", "three\nfour", "five\nsix\n"]


def test_ctrl_c_drops_the_line_and_leaves_at_the_second() -> None:
    lines, notes = typed("dropped", CTRL_C, "kept", ENTER, "dropped", CTRL_C, "dropped", CTRL_C, CTRL_C, "never", ENTER)
    assert (lines, len(notes)) == (["kept"], 3)


def test_lines_are_remembered_in_a_file_of_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    assert typed("first", ENTER, "second\\", ENTER, "line", ENTER, CTRL_D, history=path)[0] == ["first", "second\nline"]
    assert typed("\x1b[A", ENTER, CTRL_D, history=path)[0] == ["second\nline"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_place_for_history_lines_are_read_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines, notes = typed("hello", ENTER, CTRL_D, history=tmp_path / "file" / "history")
    assert lines == ["hello"]
    assert "history is not saved" in notes[0]


def test_commands_and_their_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("")

    def completed(text: str) -> list[str]:
        return [found.text for found in CommandCompleter().get_completions(Document(text), CompleteEvent())]

    assert completed("/s") == ["/system", "/save", "/save!", "/stats"]
    assert completed(f"/load {tmp_path}/ta") == ["lk.json"]
    assert completed(f"/system {tmp_path}/ta") == completed("hello /s") == []


def test_history_is_in_the_systems_state_folder() -> None:
    home = Path("/home/u")
    assert history_file("linux", {}, home) == home / ".local/state/rabbit_engine/chat_history"
    assert history_file("linux", {"XDG_STATE_HOME": "/s"}, home) == Path("/s/rabbit_engine/chat_history")
    assert history_file("darwin", {}, home) == home / "Library/Application Support/rabbit_engine/chat_history"
    assert history_file("win32", {"LOCALAPPDATA": "/l"}, home) == Path("/l/rabbit_engine/chat_history")


# What happens to lines, with a session that answers as told.


class Puppet:
    """A session that answers with the next of `answers`: pieces of text, or an error. A piece that is None waits for the end."""

    most_tokens = 100
    progress = PassProgress(1, 2, 1000, 1.0)
    model = SimpleNamespace(plan="the plan", profile="the profile")

    def __init__(self, *answers: list[str | None] | Exception, cut_tokens: int = 0) -> None:
        self._answers = list(answers)
        self._cut_tokens = cut_tokens
        self.asked: list[Any] = []

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
    assert "the profile" in out


def test_the_line_below_an_answer_says_why_it_ended() -> None:
    assert summary(Reply("x", (1,), "length", 3, first_token_s=2.0)) == "1 token, the limit, first after 2 s"
    assert summary(Reply("", (), "cancelled", 3)) == "no token, stopped"


# A real model in a pseudo-terminal.


class Drive:
    """A program in a pseudo-terminal, and what is seen there."""

    def __init__(self, arguments: list[str], environment: dict[str, str], columns: int = 80, rows: int = 60) -> None:
        self._drawn = pyte.Screen(columns, rows)
        self._stream = pyte.Stream(self._drawn)
        self.child = pexpect.spawn(
            RABBIT[0],
            [*RABBIT[1:], *arguments],
            env=os.environ | {"TERM": "xterm-256color"} | environment,
            dimensions=(rows, columns),
            encoding="utf-8",
        )

    @property
    def seen(self) -> str:
        """The rows of the screen that hold anything."""
        return "\n".join(row.rstrip() for row in self._drawn.display if row.strip())

    def type(self, text: str) -> None:
        self.child.send(text)

    def until(self, there: Callable[[str], bool], seconds: float = 60) -> str:
        """What is seen once it is as wanted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if there(self.seen):
                return self.seen
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                break
        raise AssertionError(f"what was waited for did not come; seen:\n{self.seen}")

    def ask(self, line: str) -> str:
        """Clear the screen, type a line, and wait for the next prompt."""
        self._drawn.reset()
        self.type(f"{line}\r")
        return self.until(lambda seen: seen.startswith("> ") and seen.endswith("\n>"))


@pytest.fixture(scope="module")
def arguments(smollm: Path, smollm_shards: Path) -> list[str]:
    memory = ["--device", "cpu", "--max-memory", "350MB", "--max-seq-len", "2048", "--saving-path", str(smollm_shards)]
    return ["chat", str(smollm), "--temperature", "0", "--max-new-tokens", "300", *memory]


@pytest.fixture(scope="module")
def driven(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drive]:
    """A chat with SmolLM2; at the end it quits, and leaves the terminal as it was."""
    state = tmp_path_factory.mktemp("state")
    drive = Drive(arguments, {"XDG_STATE_HOME": str(state), "HOME": str(state)})
    drive.until(lambda seen: seen.endswith("\n>"), 300)
    assert "/help lists the commands" in drive.seen
    yield drive
    drive.type("/quit\r")
    drive.child.expect(pexpect.EOF, timeout=60)
    drive.child.close()
    assert drive.child.exitstatus == 0


posix = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")


@posix
def test_a_conversation_in_a_terminal(driven: Drive, tmp_path: Path) -> None:
    driven.ask("/reset")
    seen = driven.ask("What is the capital of France?")
    rows = seen.splitlines()
    assert rows[:2] == ["> What is the capital of France?", "The capital of France is Paris."]
    assert rows[2].startswith("8 tokens, first after ")
    assert rows[2].endswith(" s a token")
    assert "2 messages written to" in driven.ask(f"/save {tmp_path}/talk.json")  # on whatever row: the path may be long
    assert "2 messages forgotten" in driven.ask("/reset")
    assert "2 messages read from" in driven.ask(f"/load {tmp_path}/talk.json")
    assert "passes " in driven.ask("/stats")
    assert "weights  " in driven.ask("/plan")
    assert "did you mean /stats?" in driven.ask("/stat")


@posix
def test_ctrl_c_in_a_terminal_stops_the_answer_and_keeps_the_session(driven: Drive, tmp_path: Path) -> None:
    driven.ask("/reset")
    driven.type("Tell me a long story about a rabbit.\r")
    driven.until(lambda seen: "There was" in seen)
    driven.type(CTRL_C)
    seen = driven.until(lambda seen: "stopped" in seen and seen.endswith("\n>"), 60)
    assert "tokens, stopped, first after" in seen
    assert "^C" not in seen
    driven.ask(f"/save {tmp_path}/talk.json")
    assert read_conversation(tmp_path / "talk.json").conversation.said[1].stopped
    driven.ask("/reset")
    assert "Paris" in driven.ask("What is the capital of France?")


@posix
def test_a_paste_of_several_lines_is_one_message(driven: Drive, tmp_path: Path) -> None:
    driven.ask("/reset")
    driven.ask(pasted("Answer in one word.\nWhat is the capital of France?"))
    driven.ask(f"/save {tmp_path}/talk.json")
    said = read_conversation(tmp_path / "talk.json").conversation.said
    assert [message.content for message in said[:-1]] == ["Answer in one word.\nWhat is the capital of France?"]


@posix
def test_ctrl_c_at_the_prompt_clears_the_line(driven: Drive) -> None:
    driven.type("unfinished")
    driven.until(lambda seen: seen.endswith("unfinished"))
    driven.type(CTRL_C)
    assert "Ctrl-D, leaves" in driven.until(lambda seen: seen.endswith("\n>"), 30)
    assert "system: Be brief." in driven.ask("/system Be brief.")
    driven.ask("/system -")


def test_through_a_pipe_each_line_is_a_message(arguments: list[str]) -> None:
    lines = "What is the capital of France?\n\n/stat\n"
    done = subprocess.run([*RABBIT, *arguments], capture_output=True, text=True, input=lines, timeout=300, check=False)
    assert done.stdout == "The capital of France is Paris.\n"
    assert "8 tokens, first after" in done.stderr
    assert "did you mean /stats?" in done.stderr
    assert done.returncode == 1, "a line that failed"


def test_a_model_without_a_chat_template_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="some/model has no chat template"):
        require_template(SimpleNamespace(tokenizer=SimpleNamespace(chat_template=None)), "some/model")


def test_a_model_that_cannot_chat_is_refused_before_the_first_question(own_checkpoint: Any) -> None:
    command = [*RABBIT, "chat", str(own_checkpoint("llama")), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, input="Hi\n", timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
