"""Rows of names and values as people look at them: text, a table in a notebook, a table of rich."""

from __future__ import annotations

from html import escape

from rich.table import Table
from rich.text import Text


class Report:
    """What can be told in rows. A subclass gives `rows()` and a short `__repr__`."""

    __slots__ = ()

    def rows(self) -> list[tuple[str, str]]:
        """What, and how much of it."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _repr_html_(self) -> str:
        """For notebooks; names and values are escaped."""
        cells = "".join(f"<tr>{_cell('th', name)}{_cell('td', value)}</tr>" for name, value in self.rows())
        return f"<table>{cells}</table>"

    def __rich__(self) -> Table:
        return as_table(self.rows())


def as_table(rows: list[tuple[str, str]], title: str | None = None) -> Table:
    """Rows as rich prints them; nothing in them is markup."""
    table = Table(title=None if title is None else Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="text-align: left">{escape(text)}</{tag}>'
