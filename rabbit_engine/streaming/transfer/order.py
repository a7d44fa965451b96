"""Which unit follows which: as the caller says at first, then as passes have shown. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence


class PassOrder:
    """The order of a pass over `names`, which begins again behind its end. Those in `rare` are foreseen only behind one
    another."""

    def __init__(self, names: Sequence[str], rare: Collection[str] = ()) -> None:
        first = next((name for name in names if name not in rare), names[0] if names else "")
        self._successor = dict(zip(names, [*names[1:], first], strict=True)) if names else {}
        self._rare = frozenset(rare)
        self.latest: str | None = None
        """What was asked for last."""

    def ask(self, name: str) -> None:
        """It is asked for now: learn whose successor it is."""
        if self.latest is not None and (name not in self._rare or self.latest in self._rare):
            self._successor[self.latest] = name
        self.latest = name

    def after(self, name: str) -> str:
        """What is asked for next, if nothing has changed."""
        return self._successor[name]
