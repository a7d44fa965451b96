"""Guesses for one text by a model: a tree found best first, in rounds of several branches, as long as another round pays."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.decoding.draft import Allowance, Verdict
from rabbit_engine.decoding.draft_context import Context
from rabbit_engine.decoding.search import Search, likeliest
from rabbit_engine.decoding.tree import EMPTY, ROOT, Tree

_ROUNDS = 4
"""Rounds in which a tree would be opened if all of its nodes were."""

_CHILDREN = 8
"""Guesses after each opened node."""

_RECENT = 1 / 8
"""The weight of the newest round in what was measured of rounds."""


@dataclass(slots=True)
class RoundCosts:
    """What a round of guesses takes and adds, as measured over all texts of a draft.

    `share` are the expected tokens that a round adds to the tree, divided by the probability of the nodes that it opens.
    """

    round_s: float = 0.0
    share: float = 1.0

    def pays(self, probability: float, token_s: float) -> bool:
        """Whether a round that opens nodes of that summed probability saves more than it takes."""
        return probability * self.share * token_s > self.round_s

    def count(self, probability: float, added: float, seconds: float) -> None:
        """A round opened nodes of that probability, and `added` expected tokens in that time."""
        self.share += _RECENT * (added / probability - self.share)
        self.round_s = seconds if not self.round_s else self.round_s + _RECENT * (seconds - self.round_s)


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a model can guess: texts up to `positions`, one branch only if it cannot do `trees`, at a `temperature`."""

    positions: float
    trees: bool
    temperature: float


class ModelDrafter:
    """Guesses for one text."""

    def __init__(self, context: Context, reach: Reach, costs: RoundCosts) -> None:
        self._context, self._reach, self._costs = context, reach, costs
        self._search = Search(1, 1)
        self._opened: dict[int, int] = {}
        """The number in the context of each node that was opened."""

    def read(self, ids: Sequence[int]) -> None:
        """See `Drafter`."""
        if 1 < len(ids) <= self._reach.positions:
            self._read(ids[:-1])

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        """See `Drafter`."""
        depth = min(budget.depth, self._reach.positions - len(ids))
        if budget.nodes < 1 or depth < 1:
            return EMPTY
        logits = self._read(ids)
        self._search, self._opened = Search(budget.nodes, int(depth)), {}
        self._add([ROOT], logits)
        width = math.ceil(budget.nodes / _ROUNDS) if self._reach.trees else 1
        while taken := self._search.take(width):
            probability = sum(map(self._search.probability, taken))
            if not self._costs.pays(probability, budget.token_s):
                break
            began, before = time.perf_counter(), self._search.expected()
            self._open(taken)
            self._costs.count(probability, self._search.expected() - before, time.perf_counter() - began)
        return self._search.tree()

    def accepted(self, verdict: Verdict) -> None:
        """See `Drafter`: the next text says what was accepted."""

    def close(self) -> None:
        """See `Drafter`: its cache goes with it."""

    def _read(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [1, vocabulary] after `ids`. What the text took of the last guesses is kept, the rest of it is read."""
        line, at = list[int](), ROOT
        for token in ids[self._context.past : -1]:
            child = self._search.child(at, token)
            if child is None or child not in self._opened:
                break
            line.append(self._opened[child])
            at = child
        self._context.settle(line)
        return self._context.read(ids[self._context.past :])

    def _open(self, nodes: Sequence[int]) -> None:
        """Ask the model what follows each of these nodes."""
        lines = [self._line(node) for node in nodes]
        logits = self._context.guess([self._search.token(node) for node in nodes], lines)
        for node in nodes:
            self._opened[node] = len(self._opened)
        self._add(nodes, logits)

    def _line(self, node: int) -> list[int]:
        """The numbers in the context of the nodes above."""
        found: list[int] = []
        while (node := self._search.parent(node)) != ROOT:
            found.append(self._opened[node])
        return found[::-1]

    def _add(self, nodes: Sequence[int], logits: torch.Tensor) -> None:
        """What the model predicts after each of `nodes` by `logits` [nodes, vocabulary]."""
        tokens, logs = likeliest(logits, _CHILDREN if self._reach.trees else 1, self._reach.temperature)
        for node, each, log in zip(nodes, tokens, logs, strict=True):
            self._search.add(node, each, log)
