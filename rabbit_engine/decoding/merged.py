"""Several drafts that guess together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from rabbit_engine.decoding.draft import Allowance, Draft, Drafter, StatesReader, TargetModel, Verdict, check_nodes
from rabbit_engine.decoding.tree import ROOT, Tree

_RESERVED = 4
"""A quarter of the nodes is shared out equally: a draft that thinks too little of its guesses still learns how they do."""


class Merged:
    """Drafts whose trees are joined where they agree: `Merged(Lookup(), DraftModel(...))`.

    Each is asked for a whole tree. `nodes` fixes the size of the joined one; None: the largest size that one of the drafts fixes,
    else as many as pay.
    """

    def __init__(self, first: Draft, second: Draft, *more: Draft, nodes: int | None = None) -> None:
        check_nodes(nodes)
        self.drafts = (first, second, *more)
        self.nodes = nodes or max((draft.nodes for draft in self.drafts if draft.nodes), default=None)

    @property
    def name(self) -> str:
        """Those of its drafts."""
        return " + ".join(draft.name for draft in self.drafts)

    @property
    def nbytes(self) -> int:
        """Of all its drafts."""
        return sum(draft.nbytes for draft in self.drafts)

    def attach(self, target: TargetModel) -> None:
        """Attach all. Raises DraftError if one of them cannot guess for `target`."""
        for draft in self.drafts:
            draft.attach(target)

    def start(self) -> MergedDrafter:
        """Begin a text with all."""
        with ExitStack() as opened:
            drafters = []
            for draft in self.drafts:
                drafters.append(draft.start())
                opened.callback(drafters[-1].close)
            return MergedDrafter(tuple(drafters), opened.pop_all())


@dataclass(slots=True)
class MergedDrafter:
    """Several drafts in one text."""

    _drafters: tuple[Drafter, ...]
    _opened: ExitStack
    _proposed: tuple[Tree, ...] = field(default=())

    def read(self, ids: Sequence[int]) -> None:
        """Show all the text so far."""
        for drafter in self._drafters:
            drafter.read(ids)

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        """The likeliest guesses of all drafts, and a few of each."""
        self._proposed = tuple(drafter.propose(ids, budget) for drafter in self._drafters)
        reserved = budget.nodes // _RESERVED // len(self._drafters)
        return merge(self._proposed, budget.nodes, reserved)

    def accepted(self, verdict: Verdict) -> None:
        """Tell each draft what became of those of its guesses that were verified."""
        for drafter, tree in zip(self._drafters, self._proposed, strict=True):
            own = part_of(verdict, tree)
            if own.tree:
                drafter.accepted(own)

    def see(self, states: torch.Tensor) -> None:
        """Show those that read them the model's states."""
        for drafter in self._drafters:
            if isinstance(drafter, StatesReader):
                drafter.see(states)

    def close(self) -> None:
        """Close all."""
        self._opened.close()


def merge(trees: Sequence[Tree], nodes: int, reserved: int = 0) -> Tree:
    """One tree of up to `nodes` nodes: the likeliest of all, among them the `reserved` likeliest of each tree.

    A node's probability is its parent's times the largest estimate of a tree that has it: P(path to it) / P(path to its parent).
    Where the estimates for a node's children add up to more than 1, they are divided by their sum.
    """
    joined = _Joined()
    places = [joined.add(tree) for tree in trees]
    likely = joined.probabilities()
    kept: set[int] = set()
    for tree, place in zip(trees, places, strict=True):
        best = heapq.nlargest(reserved, range(len(tree)), key=lambda node: (tree.probabilities[node], -node))
        kept.update(place[node] for node in best)
    by_rank = sorted(range(len(likely)), key=lambda node: (node not in kept, -likely[node], node))
    return Tree(tuple(joined.tokens), tuple(joined.parents), tuple(likely)).only(sorted(by_rank[:nodes]))


def part_of(verdict: Verdict, tree: Tree) -> Verdict:
    """The verdict on those nodes of `tree` that were verified, by their tokens and their parents'."""
    verified = {pair: node for node, pair in enumerate(zip(verdict.tree.parents, verdict.tree.tokens, strict=True))}
    place = {ROOT: ROOT}
    for node, (parent, token) in enumerate(zip(tree.parents, tree.tokens, strict=True)):
        found = verified.get((place[parent], token)) if parent in place else None
        if found is not None:
            place[node] = found
    del place[ROOT]
    own = {verified_node: index for index, verified_node in enumerate(place.values())}
    path = [node for node in verdict.path if node in own]
    said = [*(verdict.tree.tokens[node] for node in verdict.path), verdict.next]
    rows = [0, *(node - ROOT for node in place.values())]
    return Verdict(tree.only(list(place)), tuple(own[node] for node in path), verdict.logits[rows], said[len(path)])


class _Joined:
    """Nodes of several trees, the same path once."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._estimates: list[float] = []
        self._children: dict[int, dict[int, int]] = {ROOT: {}}

    def add(self, tree: Tree) -> list[int]:
        """Join a tree; returns the node here of each of its nodes."""
        place: dict[int, int] = {ROOT: ROOT}
        above = {ROOT: 1.0}
        for node, (token, parent, likely) in enumerate(zip(tree.tokens, tree.parents, tree.probabilities, strict=True)):
            place[node] = self._join(place[parent], token, likely / above[parent])
            above[node] = likely
        del place[ROOT]
        return list(place.values())

    def _join(self, parent: int, token: int, estimate: float) -> int:
        node = self._children[parent].get(token)
        if node is None:
            node = self._children[parent][token] = len(self.tokens)
            self._children[node] = {}
            self.tokens.append(token)
            self.parents.append(parent)
            self._estimates.append(estimate)
        self._estimates[node] = max(self._estimates[node], estimate)
        return node

    def probabilities(self) -> list[float]:
        """Of each node's path."""
        sums = {node: sum(self._estimates[child] for child in children.values()) for node, children in self._children.items()}
        found: list[float] = []
        for parent, estimate in zip(self.parents, self._estimates, strict=True):
            found.append((1.0 if parent == ROOT else found[parent]) * estimate / max(1.0, sums[parent]))
        return found
