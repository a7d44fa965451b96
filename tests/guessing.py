"""A draft that knows the text: its true continuation with faults, among branches that are wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rabbit_engine.decoding import ROOT, Allowance, TargetModel, Tree, Verdict


class Guided:
    """A draft that knows texts: right with probability `agreement` at each step, with `branches` wrong siblings."""

    name = "guided"
    nbytes = 0

    def __init__(
        self, ids: Sequence[int], *, agreement: float = 0.85, branches: int = 1, nodes: int = 12, vocabulary: int = 96
    ) -> None:
        self.text, self.nodes = list(ids), nodes
        self.others: list[list[int]] = []
        self._agreement, self._branches, self._vocabulary = agreement, branches, vocabulary
        self.verdicts: list[Verdict] = []

    def attach(self, target: TargetModel) -> None:
        pass

    def start(self) -> Guided:
        self._random = random.Random(5)
        return self

    def read(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        tokens, parents, probabilities, at = list[int](), list[int](), list[float](), ROOT
        texts = [self.text, *self.others]
        known = next((text[len(ids) :] for text in texts if list(ids) == text[: len(ids)]), [])
        for depth, true in enumerate(known[: budget.depth], 1):
            wrong = [token for token in self._random.sample(range(self._vocabulary), self._branches + 1) if token != true]
            siblings = wrong[: self._branches]
            right = self._random.random() < self._agreement
            for token in [*siblings, true if right else wrong[-1]]:
                tokens.append(token)
                parents.append(at)
                probabilities.append(0.1 * 0.9**depth)
            at = len(tokens) - 1
            probabilities[at] = 0.9**depth
            if len(tokens) + self._branches + 1 > budget.nodes:
                break
        return unique(Tree(tuple(tokens), tuple(parents), tuple(probabilities)))

    def accepted(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def close(self) -> None:
        pass


def unique(tree: Tree) -> Tree:
    """Without nodes whose sibling has the same token, nor anything behind them."""
    seen: dict[tuple[int, int], int] = {}
    place = {ROOT: ROOT}
    tokens, parents, probabilities = list[int](), list[int](), list[float]()
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        if parent in place and (place[parent], token) not in seen:
            seen[place[parent], token] = place[node] = len(tokens)
            tokens.append(token)
            parents.append(place[parent])
            probabilities.append(tree.probabilities[node])
    return Tree(tuple(tokens), tuple(parents), tuple(probabilities))
