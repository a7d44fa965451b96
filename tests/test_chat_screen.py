"""The screen of a chat, as pyte draws it: the text whole, and a status line below it that leaves no trace."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import pyte
import pytest

from rabbit_engine.chat import Screen
from rabbit_engine.chat.following import status
from rabbit_engine.chat.screen import advance, cut
from rabbit_engine.streaming import PassProgress


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
