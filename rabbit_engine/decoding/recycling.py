"""Token recycling: what a model found likely after a token, the last time that it read it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rabbit_engine.decoding.draft import Verdict
from rabbit_engine.decoding.tree import ROOT

_KEPT = 8
"""Successors of a token, as in "Turning Trash into Treasure: Accelerating Inference with Token Recycling" (2024)."""


class Successors:
    """The likeliest successors of tokens by the newest logits after each: some 200 bytes for each different token."""

    def __init__(self) -> None:
        self._newest: dict[int, array[int]] = {}

    def after(self, token: int) -> Sequence[int]:
        """Likeliest first; none for a token that no verdict had."""
        return self._newest.get(token, ())

    def learn(self, last: int, verdict: Verdict) -> None:
        """Keep the successors of `last`, the token that the tree follows, and of the tree's tokens.

        Nodes that the text did not take count too; of several with a token that of the text does.
        """
        rows = verdict.logits.topk(min(_KEPT, verdict.logits.shape[-1])).indices.tolist()
        nodes = [*range(len(verdict.tree)), ROOT, *verdict.path]
        for node in nodes:
            token = last if node == ROOT else verdict.tree.tokens[node]
            self._newest[token] = array("i", rows[node - ROOT])
