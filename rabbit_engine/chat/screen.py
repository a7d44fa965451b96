"""What is shown: text as it comes, notes, and a line below them that says what is going on and leaves no trace."""

from __future__ import annotations

import os
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

_ERASE = "\x1b[J"  # from the cursor on: what is below the text is ours
_LINE_BELOW = "\x1bD\x1b[A"  # down and up again: where the text is on the last row of the screen, all moves up by one
_SAVE, _RESTORE = "\x1b7", "\x1b8"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's text does not move the cursor, ring, or rename the window."""


class Screen:
    """Writes to `out`; notes that nobody asked for go to `notes`.

    While an answer comes the cursor stays at its end. On a `live` screen `show` puts a line below it, and whatever is
    written next takes its place.
    """

    def __init__(self, out: TextIO, notes: TextIO, *, live: bool) -> None:
        self._out, self._live = out, live
        self._column = 0  # cells that the row of the cursor holds; as many as the screen is wide before it wraps
        self._ended_row = False
        self.shows = False
        self._console = Console(file=out, highlight=False, soft_wrap=not out.isatty())
        self._notes = Console(file=notes, highlight=False, soft_wrap=not notes.isatty())

    def write(self, text: str) -> None:
        """More of an answer, as it comes."""
        if self._live:
            text = text.translate(_CONTROLS)
        if self._ended_row and text:
            text = text.removeprefix("\n")
            self._ended_row = False
        self._put((_ERASE if self.shows else "") + text)
        self.shows = False
        self._column = advance(self._column, text, self.width)

    def show(self, line: str) -> None:
        """A line below the text, cut to the width of the screen; nothing on a screen that is not live."""
        if not self._live:
            return
        width, below = self.width, ""
        if self._column >= width:  # the cursor is beyond the last column, where no terminal can bring it back to
            below, self._column, self._ended_row = "\n", 0, True
        below = (_ERASE if self.shows else "") + below
        self._put(f"{below}{_LINE_BELOW}{_SAVE}\x1b[B\r{_DIM}{cut(line, width - 1)}{_PLAIN}{_RESTORE}")
        self.shows = True

    def end(self) -> None:
        """No more of this answer: the cursor goes to a row of its own."""
        if self.shows or self._column:
            self.write("\n" if self._column else "")
        self._column, self._ended_row = 0, False

    def say(self, what: RenderableType) -> None:
        """What was asked for by a command."""
        self._console.print(_plain(what) if isinstance(what, str) else what)

    def note(self, text: str) -> None:
        """What nobody asked for."""
        self._notes.print(_plain(text, "dim"))

    def warn(self, text: str) -> None:
        """What went wrong, in one line."""
        self._notes.print(Text.assemble(("error", "bold red"), ": ", _plain(text)))

    @property
    def width(self) -> int:
        """Columns of the terminal now; 80 where it does not say."""
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def advance(column: int, text: str, width: int) -> int:
    """The column of the cursor, 0 to `width`, when `text` has been written from `column` on."""
    if "\n" in text:
        column, text = 0, text[text.rfind("\n") + 1 :]
    for character in text:
        cells = min(8 - column % 8, max(0, width - 1 - column)) if character == "\t" else cell_len(character)
        column = cells if column + cells > width else column + cells
    return column


def _plain(text: str, style: str = "") -> Text:
    return Text(text.translate(_CONTROLS), style=style)


def cut(line: str, width: int) -> str:
    """As much of one line as fits `width` columns, with dots where some does not."""
    if cell_len(line) <= width:
        return line
    while line and cell_len(line) > width - 1:
        line = line[:-1]
    return f"{line}…" if width > 0 else ""
