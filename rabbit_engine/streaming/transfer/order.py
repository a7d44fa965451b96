"""Predicts the next unit of a pass: in the given order at first, then as observed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class PassOrder:
    """The cyclic order of a pass over `names`. Those in `rare` are only predicted after one another."""

    def __init__(self, names: Sequence[str], rare: Collection[str] = ()) -> None:
        first = next((name for name in names if name not in rare), names[0] if names else "")
        self._successor = dict(zip(names, [*names[1:], first], strict=True)) if names else {}
        self._rare = frozenset(rare)
        self.latest: str | None = None
        """The last unit requested."""

    def ask(self, name: str) -> None:
        """Record that `name` is requested now, as the successor of the last one."""
        if self.latest is not None and (name not in self._rare or self.latest in self._rare):
            self._successor[self.latest] = name
        self.latest = name

    def after(self, name: str) -> str:
        """The expected successor of `name`."""
        return self._successor[name]
