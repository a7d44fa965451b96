"""The screen: text as it is generated, notes, and a status line below them that is erased afterwards."""

from __future__ import annotations

import os
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.text import Text

_ERASE = "\x1b[J"  # from the cursor on: the status line below the text
_LINE_BELOW = "\x1bD\x1b[A"  # down and up again: if the text is on the last row of the screen, everything scrolls up by one
_SAVE, _RESTORE = "\x1b7", "\x1b8"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model's text must not move the cursor, ring the bell, or rename the window."""


class Screen:
    """Writes to `out`; unsolicited notes go to `notes`.

    During an answer the cursor stays at its end. On a `live` screen `show` puts a status line below it, which the next write
    replaces.
    """

    def __init__(self, out: TextIO, notes: TextIO, *, live: bool) -> None:
        self._out, self._live = out, live
        self._column = 0  # cells that the row of the cursor holds; as many as the screen is wide before it wraps
        self._ended_row = False
        self.shows = False
        self._console = Console(file=out, highlight=False, soft_wrap=not out.isatty())
        self._notes = Console(file=notes, highlight=False, soft_wrap=not notes.isatty())

    def write(self, text: str) -> None:
        """Write more of an answer."""
        if self._live:
            text = text.translate(_CONTROLS)
        if self._ended_row and text:
            text = text.removeprefix("\n")
            self._ended_row = False
        self._put((_ERASE if self.shows else "") + text)
        self.shows = False
        self._column = advance(self._column, text, self.width)

    def show(self, line: str) -> None:
        """Show a line below the text, cut to the width of the screen; nothing on a screen that is not live."""
        if not self._live:
            return
        width, below = self.width, ""
        if self._column >= width:  # the cursor is past the last column, and cannot be restored there
            below, self._column, self._ended_row = "\n", 0, True
        below = (_ERASE if self.shows else "") + below
        self._put(f"{below}{_LINE_BELOW}{_SAVE}\x1b[B\r{_DIM}{cut(line, width - 1)}{_PLAIN}{_RESTORE}")
        self.shows = True

    def end(self) -> None:
        """End the answer: the cursor goes to a new row."""
        if self.shows or self._column:
            self.write("\n" if self._column else "")
        self._column, self._ended_row = 0, False

    def say(self, what: RenderableType) -> None:
        """The output of a command."""
        self._console.print(_plain(what) if isinstance(what, str) else what)

    def note(self, text: str) -> None:
        """An unsolicited note."""
        self._notes.print(_plain(text, "dim"))

    def warn(self, text: str) -> None:
        """An error, in one line."""
        self._notes.print(Text.assemble(("error", "bold red"), ": ", _plain(text)))

    @property
    def width(self) -> int:
        """The terminal's current width in columns; 80 if unknown."""
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
    """The line cut to `width` columns, with an ellipsis if it is longer."""
    if cell_len(line) <= width:
        return line
    while line and cell_len(line) > width - 1:
        line = line[:-1]
    return f"{line}…" if width > 0 else ""
