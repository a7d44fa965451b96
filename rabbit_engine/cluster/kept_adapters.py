"""The adapters that a new worker needs: those of now, and those that texts were computed with."""

from __future__ import annotations

from rabbit_engine.streaming import ActiveAdapters


class KeptAdapters:
    """Packed modules of adapters by name. What texts are forgotten in any thread, also amid another call: nothing waits."""

    def __init__(self) -> None:
        self._modules: dict[str, bytes] = {}
        self._withdrawn: set[str] = set()
        self._uses: dict[str, frozenset[str]] = {}
        """The names that each text was computed with."""

    def add(self, name: str, modules: bytes) -> None:
        """Keep modules."""
        self._modules[name] = modules

    def all(self) -> list[tuple[str, bytes]]:
        """The names and modules that are kept."""
        return list(self._modules.items())

    def note(self, text: str, adapters: ActiveAdapters | None) -> None:
        """A text was computed with them."""
        if adapters is not None:
            self._uses[text] = self._uses.get(text, frozenset()) | {adapters.modules}

    def copy(self, text: str, copied: str) -> None:
        """`copied` was computed as `text` was."""
        if text in self._uses:
            self._uses[copied] = self._uses[text]

    def forget(self, text: str) -> None:
        """A text has ended."""
        self._uses.pop(text, None)

    def withdraw(self, name: str) -> list[str]:
        """No pass names these again. Drops all such that no text was computed with, and returns their names."""
        self._withdrawn.add(name)
        needed = {used for uses in list(self._uses.values()) for used in uses}
        unused = sorted(self._withdrawn - needed)
        self._withdrawn.difference_update(unused)
        for one in unused:
            self._modules.pop(one, None)
        return unused
