"""Checks that a model computes the same for several tokens in one pass as for one after the other.

Most do. A class that nobody has tested, or a kind of layer that transformers adds, may not. So the first tokens of such a model's
answer are computed one a pass; then the cache goes back, one pass computes the same tokens among others, and both are compared.
"""

from __future__ import annotations

import torch

from rabbit_engine.decoding.tree import ROOT, Tree
from rabbit_engine.transformers_bridge.caches import States

TOKENS = 3
"""The tokens after the first one that a trial compares."""

_TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-4}
"""The largest difference of two logits, in standard deviations of all, that rounding explains: 2e-5 in 30 layers of fp32."""
_TOLERANCE_16_BIT = 0.5
"""In bfloat16 SmolLM2 differs by up to 0.18, with a wrong mask by 3.6 and more."""


class Trial:
    """What single passes computed, from the moment when the cache held `before`, with the keywords `inputs` of the first.

    The text then had that many `tokens`.
    """

    def __init__(self, before: States, inputs: dict[str, object], tokens: int) -> None:
        self.before, self.inputs, self.tokens = before, inputs, tokens
        self._tokens: list[int] = []
        self._rows: list[torch.Tensor] = []

    def record(self, token: int, row: torch.Tensor) -> None:
        """The logits [vocabulary] that a single pass computed after `token`."""
        self._tokens.append(token)
        self._rows.append(row.clone())

    @property
    def is_ready(self) -> bool:
        """Whether enough tokens were recorded."""
        return len(self._rows) > TOKENS

    def tree(self) -> Tree:
        """The recorded tokens after the first, the likeliest, each with a sibling that it must not see."""
        tokens, parents, at = list[int](), list[int](), ROOT
        for token in self._tokens[1:]:
            tokens += [0 if token else 1, token]
            parents += [at, at]
            at = len(tokens) - 1
        return Tree(tuple(tokens), tuple(parents), tuple(0.5 if index % 2 else 0.25 for index in range(len(tokens))))

    def agrees(self, tree: Tree, rows: torch.Tensor) -> bool:
        """Whether `rows` [1 + nodes, vocabulary] of a pass over the first token and `tree` are the recorded ones, up to rounding.

        `tree` is that of `tree`, or its likeliest chain.
        """
        nodes = [ROOT]
        for token in self._tokens[1:]:
            child = tree.child(nodes[-1], token)
            assert child is not None  # noqa: S101 - both trees contain the recorded tokens
            nodes.append(child)
        return all(_are_close(rows[node - ROOT], row) for node, row in zip(nodes, self._rows, strict=True))


def _are_close(first: torch.Tensor, second: torch.Tensor) -> bool:
    allowed = _TOLERANCE.get(first.dtype, _TOLERANCE_16_BIT)
    first, second = first.float(), second.float()
    finite = torch.isfinite(first) & torch.isfinite(second)
    spread = max(float(second[finite].std()), 1e-6)
    return bool((first[finite] - second[finite]).abs().max() <= allowed * spread)
