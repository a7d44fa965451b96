"""Renders rows of names and values as text, as an HTML table for notebooks, or as a rich table."""

from __future__ import annotations

from html import escape

from rich.table import Table
from rich.text import Text


class Report:
    """A report made of rows. A subclass defines `rows()` and a short `__repr__`."""

    __slots__ = ()

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs."""
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
    """The rows as a rich table; markup in them is not interpreted."""
    table = Table(title=None if title is None else Text(title), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def _cell(tag: str, text: str) -> str:
    return f'<{tag} style="text-align: left">{escape(text)}</{tag}>'
