"""A tree of guesses for the tokens that follow a text."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

ROOT = -1
"""The parent of a first guess: the last token of the text."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Node i guesses `tokens[i]` after node `parents[i]` < i, or after the text where that is ROOT.

    `probabilities[i]` in (0, 1] is the draft's estimate that the text goes on along the whole path to node i; no node has a
    larger one than its parent, and no two children of a node have the same token.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Iterable[float]) -> Self:
        """One guess after another."""
        return cls(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)), tuple(probabilities))

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child."""
        return all(parent == child - 1 for child, parent in enumerate(self.parents))

    @property
    def depths(self) -> tuple[int, ...]:
        """Of each node: 1 for a first guess."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent == ROOT else found[parent] + 1)
        return tuple(found)

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` (or of ROOT) with that token."""
        for child in range(node + 1, len(self.tokens)):
            if self.parents[child] == node and self.tokens[child] == token:
                return child
        return None

    def best(self, count: int) -> Self:
        """The `count` likeliest nodes, which are a tree as well; earlier ones of equals."""
        if count >= len(self):
            return self
        return self.only(sorted(heapq.nlargest(count, range(len(self)), key=lambda node: (self.probabilities[node], -node))))

    def within(self, depth: int) -> Self:
        """The nodes down to that depth."""
        depths = self.depths
        return self.only([node for node in range(len(self)) if depths[node] <= depth])

    def below(self, vocabulary: int) -> Self:
        """Without tokens outside of the vocabulary, and what follows them."""
        if all(0 <= token < vocabulary for token in self.tokens):
            return self
        kept = {ROOT}
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent in kept and 0 <= token < vocabulary:
                kept.add(node)
        return self.only(sorted(kept - {ROOT}))

    def likeliest_chain(self) -> Self:
        """From the root down, always the likeliest child."""
        path: list[int] = []
        at = ROOT
        while children := [node for node in range(at + 1, len(self)) if self.parents[node] == at]:
            at = max(children, key=lambda node: (self.probabilities[node], -node))
            path.append(at)
        return self.only(path)

    def only(self, nodes: Sequence[int]) -> Self:
        """These nodes, in ascending order; the parent of each is one of them, or ROOT."""
        place = {node: index for index, node in enumerate(nodes)} | {ROOT: ROOT}
        return type(self)(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] for node in nodes),
            tuple(self.probabilities[node] for node in nodes),
        )


EMPTY = Tree()


def why_no_tree(found: object) -> str:
    """Which promise of `Tree` a value breaks; empty if it keeps all of them."""
    if not isinstance(found, Tree):
        return f"a value of type {type(found).__name__}, not a Tree"
    lengths = {len(found.tokens), len(found.parents), len(found.probabilities)}
    if len(lengths) > 1:
        return f"{len(found.tokens)} tokens with {len(found.parents)} parents and {len(found.probabilities)} probabilities"
    children = set[tuple[int, int]]()
    for node, (token, parent, likely) in enumerate(zip(found.tokens, found.parents, found.probabilities, strict=True)):
        if not ROOT <= parent < node:
            return f"node {node} after node {parent}, which does not come before it"
        above = 1.0 if parent == ROOT else found.probabilities[parent]
        if not 0 < likely <= above:
            return f"node {node} with probability {likely}, which is not above 0 and up to that of its parent, {above}"
        if (parent, token) in children:
            return f"token {token} twice after node {parent}"
        children.add((parent, token))
    return ""
