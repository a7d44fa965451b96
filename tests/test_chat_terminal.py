"""A chat from its keyboard, and with a real model in a pseudo-terminal and through a pipe."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
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

from rabbit_engine.chat import Keyboard, history_file, read_conversation
from rabbit_engine.chat.keyboard import CommandCompleter
from rabbit_engine.cli.chat import require_template
from rabbit_engine.errors import ConfigurationError

RABBIT = [sys.executable, "-c", "from rabbit_engine.cli import main; main()"]


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
