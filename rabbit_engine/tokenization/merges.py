"""Converts pieces with priorities to the ranked merges of a `tokenizers` BPE. Pure: no files, no libraries.

Both sentencepiece and tiktoken merge the adjacent pair whose *concatenation* ranks first, ties from the left; `tokenizers`
ranks *pairs*. Merges within two adjacent symbols L, R are those that happen when the string LR is merged alone, and that
run has one two-symbol state: so each piece is made by at most one pair, and ranking those pairs is exact.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Merge:
    """Symbols `left` and `right` become one; the larger `priority` merges first."""

    left: str
    right: str
    priority: float

    @property
    def made(self) -> str:
        """The resulting symbol."""
        return self.left + self.right


def merged(text: str, priorities: Mapping[str, float]) -> list[str]:
    """The symbols left of `text` when no adjacent pair makes a piece of `priorities`."""
    symbols = list(text)
    while (best := _best_pair(symbols, priorities)) is not None:
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
    return symbols


def derive_merges(priorities: Mapping[str, float]) -> list[Merge] | None:
    """The merge that makes each piece, in rank order; None if no order of pairs gives the same ties."""
    found = [merge for piece in priorities if len(piece) > 1 and (merge := _last_merge(piece, priorities))]
    found.sort(key=lambda merge: -merge.priority)
    used: dict[str, float] = {}
    for merge in found:  # the first to name a symbol is the first to consume it
        used.setdefault(merge.left, merge.priority)
        used.setdefault(merge.right, merge.priority)
    ordered: list[Merge] = []
    for tied in _tied(found):
        group = tied if len(tied) == 1 else _order_ties(tied, used)
        if group is None:
            return None
        ordered += group
    return ordered


def _best_pair(symbols: list[str], priorities: Mapping[str, float]) -> int | None:
    best, best_priority = None, 0.0
    for index in range(len(symbols) - 1):
        priority = priorities.get(symbols[index] + symbols[index + 1])
        if priority is not None and (best is None or priority > best_priority):
            best, best_priority = index, priority
    return best


def _last_merge(piece: str, priorities: Mapping[str, float]) -> Merge | None:
    """The last pair to merge when `piece` is merged alone; None if that does not result in `piece`."""
    symbols = list(piece)
    while len(symbols) > 2 and (best := _best_pair(symbols, priorities)) is not None:
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
    return Merge(symbols[0], symbols[1], priorities[piece]) if len(symbols) == 2 else None


def _tied(ordered: list[Merge]) -> Iterable[list[Merge]]:
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end].priority != ordered[start].priority:
            yield ordered[start:end]
            start = end


def _order_ties(tied: list[Merge], used: Mapping[str, float]) -> list[Merge] | None:
    """`tied` sorted so that, of two that want the same symbol, the left one comes first; None if that is circular.

    Also None if the result of one is used by another merge at once: then their order would show.
    `used`: symbol -> priority of the first merge that consumes it.
    """
    if any(used.get(merge.made, -math.inf) >= merge.priority for merge in tied):
        return None
    by_left = defaultdict(list)
    for merge in tied:
        by_left[merge.left].append(merge)
    waiting = Counter(other.made for merge in tied for other in by_left[merge.right] if other is not merge)
    ready = [merge for merge in tied if not waiting[merge.made]]
    for merge in ready:
        for other in by_left[merge.right]:
            waiting[other.made] -= 1
            if not waiting[other.made] and other is not merge:
                ready.append(other)
    return ready if len(ready) == len(tied) else None
