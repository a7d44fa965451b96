"""Which blocks to delete so that others fit: pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BlockFile:
    """A block's file, as a listing shows it: `used_ns` is when it was last used, or written."""

    path: Path
    space: str
    index: int
    name: str
    parent: str
    nbytes: int
    used_ns: int


def choose_victims(
    files: Iterable[BlockFile], excess_bytes: int, parent: tuple[str, str] | None = None
) -> list[BlockFile] | None:
    """The files to delete, in order, so that at least `excess_bytes` are freed.

    Blocks that no lookup can reach, as one before them is missing, are deleted first; then the least recently used, where a
    block is used with every one that follows it, so that the end of a text goes before its beginning. `parent`, a space and a
    name, stays with all before it; None if that leaves too little.
    """
    ordered = sorted(files, key=lambda file: file.index)
    used = _last_uses(ordered)
    kept = _ancestry(ordered, parent)
    able = [file for file in ordered if (file.space, file.name) not in kept]
    able.sort(key=lambda file: (used[file.space, file.name], -file.index))
    victims, freed = [], 0
    for file in able:
        if freed >= excess_bytes:
            break
        victims.append(file)
        freed += file.nbytes
    return victims if freed >= excess_bytes else None


def _last_uses(ordered: Sequence[BlockFile]) -> dict[tuple[str, str], int]:
    """The last use of each block or of one that follows it; -1 for blocks that cannot be reached."""
    reachable: set[tuple[str, str]] = set()
    for file in ordered:
        if file.index == 0 or (file.space, file.parent) in reachable:
            reachable.add((file.space, file.name))
    used: dict[tuple[str, str], int] = {}
    for file in reversed(ordered):
        own, before = (file.space, file.name), (file.space, file.parent)
        if own not in reachable:
            used[own] = -1
            continue
        used[own] = max(used.get(own, 0), file.used_ns)
        used[before] = max(used.get(before, 0), used[own])
    return used


def _ancestry(ordered: Sequence[BlockFile], parent: tuple[str, str] | None) -> set[tuple[str, str]]:
    """`parent` and all blocks before it."""
    kept: set[tuple[str, str]] = set() if parent is None else {parent}
    for file in reversed(ordered):
        if (file.space, file.name) in kept:
            kept.add((file.space, file.parent))
    return kept
