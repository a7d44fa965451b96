"""Texts for drafts without a model: what a tree must be, and verdicts of a known continuation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from rabbit_engine.decoding import ROOT, Allowance, Drafter, Tree, Verdict

VOCABULARY = 64


def assert_is_tree(tree: Tree, budget: Allowance | None = None) -> None:
    """`tree` is as its docstring says, and within the budget."""
    assert len(tree.tokens) == len(tree.parents) == len(tree.probabilities)
    assert all(ROOT <= parent < node for node, parent in enumerate(tree.parents))
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree)
    above = {ROOT: 1.0} | dict(enumerate(tree.probabilities))
    assert all(0 < above[node] <= above[parent] for node, parent in enumerate(tree.parents))
    if budget is not None:
        assert len(tree) <= budget.nodes
        assert max(tree.depths, default=0) <= budget.depth


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Up to ten nodes of few tokens."""
    tree = Tree()
    for _ in range(draw(st.integers(0, 10))):
        parent, token = draw(st.integers(ROOT, len(tree) - 1)), draw(st.integers(0, 4))
        if tree.child(parent, token) is not None:
            continue
        above = tree.probabilities[parent] if parent != ROOT else 1.0
        probability = above * draw(st.sampled_from([1.0, 0.75, 0.5, 0.1]))
        tree = Tree((*tree.tokens, token), (*tree.parents, parent), (*tree.probabilities, probability))
    return tree


def verdict_of(tree: Tree, continuation: Sequence[int]) -> Verdict:
    """What a model that says `continuation` makes of `tree`; its logits are largest for the token that it says."""
    path: list[int] = []
    at = ROOT
    while len(path) + 1 < len(continuation) and (child := tree.child(at, continuation[len(path)])) is not None:
        path.append(at := child)
    logits = torch.zeros(1 + len(tree), VOCABULARY)
    for depth, node in enumerate([ROOT, *path]):
        logits[node - ROOT, continuation[depth]] = 1
    return Verdict(tree, tuple(path), logits, continuation[len(path)])


def walk(drafter: Drafter, prompt: Sequence[int], answer: Sequence[int], budget: Allowance) -> list[Verdict]:
    """A verdict a pass, until the answer is said."""
    text, end, verdicts = [*prompt], len(prompt) + len(answer), []
    while len(text) < end:
        tree = drafter.propose(text, budget)
        assert_is_tree(tree, budget)
        verdict = verdict_of(tree, answer[len(text) - len(prompt) :])
        text += [tree.tokens[node] for node in verdict.path] + [verdict.next]
        if len(tree):
            drafter.accepted(verdict)
        verdicts.append(verdict)
    assert text == [*prompt, *answer]
    return verdicts
