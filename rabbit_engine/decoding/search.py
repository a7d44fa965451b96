"""Best-first search for the likeliest guesses, several branches a round (SpecExec, Svirschevski et al., 2024)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from rabbit_engine.decoding.tree import ROOT, Tree

_LEAST = math.log(1e-9)
"""Guesses less likely than that are left out."""


def likeliest(logits: torch.Tensor, count: int, temperature: float) -> tuple[list[list[int]], list[list[float]]]:
    """The `count` likeliest tokens of each row of logits [rows, vocabulary], and the logarithms of their probabilities."""
    scaled = logits.float() / temperature
    values, tokens = scaled.topk(min(count, logits.shape[-1]))
    return tokens.tolist(), (values - scaled.logsumexp(-1, keepdim=True)).tolist()


class Search:
    """Guesses down to `depth`, of which the `nodes` likeliest are wanted.

    A node is opened by adding what may follow it; only nodes among the wanted ones are worth opening.
    """

    def __init__(self, nodes: int, depth: int) -> None:
        self._nodes, self._depth = nodes, depth
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._logs: list[float] = []
        self._depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self._closed: list[tuple[float, int]] = []
        """A heap of the nodes that may be opened, the likeliest first."""

    def add(self, parent: int, tokens: Sequence[int], logs: Sequence[float]) -> None:
        """Open `parent`: each of `tokens` follows it with the probability of which `logs` has the logarithm."""
        before, depth = (0.0, 1) if parent == ROOT else (self._logs[parent], self._depths[parent] + 1)
        for token, log in zip(tokens, logs, strict=True):
            likelihood = before + min(0.0, log)
            if likelihood > _LEAST:  # NaN is not
                node = self._children[parent, token] = len(self._tokens)
                self._tokens.append(token)
                self._parents.append(parent)
                self._logs.append(likelihood)
                self._depths.append(depth)
                if depth < self._depth:
                    heapq.heappush(self._closed, (-likelihood, node))

    def _least_wanted(self) -> float:
        return heapq.nlargest(self._nodes, self._logs)[-1] if len(self._logs) >= self._nodes else -math.inf

    def is_open_to_more(self, node: int) -> bool:
        """Whether what follows the node may be wanted, as far as is known."""
        return self._depths[node] < self._depth and self._logs[node] >= self._least_wanted()

    def take(self, count: int) -> list[int]:
        """The nodes to open next: the likeliest `count` that are wanted as far as is known, or fewer; none at the end."""
        least = self._least_wanted()
        taken: list[int] = []
        while self._closed and len(taken) < count and -self._closed[0][0] > least:
            taken.append(heapq.heappop(self._closed)[1])
        return taken

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` (or of ROOT) with that token."""
        return self._children.get((node, token))

    def token(self, node: int) -> int:
        """What the node guesses."""
        return self._tokens[node]

    def parent(self, node: int) -> int:
        """The node, or ROOT, that the node follows."""
        return self._parents[node]

    def depth(self, node: int) -> int:
        """1 for a first guess."""
        return self._depths[node]

    def probability(self, node: int) -> float:
        """Of the whole path to the node."""
        return math.exp(self._logs[node])

    def expected(self) -> float:
        """The expected number of accepted nodes, of those wanted so far: the sum of their probabilities."""
        return sum(map(math.exp, heapq.nlargest(self._nodes, self._logs)))

    def tree(self) -> Tree:
        """The wanted nodes."""
        probabilities = tuple(map(math.exp, self._logs))
        return Tree(tuple(self._tokens), tuple(self._parents), probabilities).best(self._nodes)
