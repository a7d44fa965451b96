"""How many nodes a tree gets."""

from __future__ import annotations

import pytest
import torch

from rabbit_engine.decoding import Allowance, Prior, Rule, Tree, Verdict
from rabbit_engine.decoding.rule import best_size

NO_LOGITS = torch.zeros(0)


def test_a_fixed_number_of_nodes_is_asked_for_always():
    rule = Rule(nodes=64)
    assert rule.budget(context=10) == Allowance(64, 64)
    rule.count_pass(rows=10, seconds=1.0, context=0)
    rule.count_pass(rows=1, seconds=1.0, context=10)
    assert rule.budget(context=11) == Allowance(64, 64)  # whatever its draft takes
    unlikely = Tree.chain(range(100), [0.01] * 100)
    assert len(rule.fit(unlikely, draft_s=9.0, context=11)) == 64


def test_free_rows_are_all_used_and_dear_rows_only_if_their_guesses_are_good():
    chain = [0.9**depth for depth in range(1, 65)]
    assert best_size(chain, lambda _: 1.0) == 64
    assert best_size(chain, lambda rows: 1.0 + 0.4 * (rows - 1)) == 4
    assert best_size(chain, lambda rows: float(rows)) == 0
    assert best_size([0.3] * 4, lambda rows: 1.0 + 0.4 * (rows - 1)) == 0


def test_the_profile_says_how_many_tokens_a_pass_gives():
    rule = Rule(prior=Prior(2.0))
    tree = Tree.chain((5, 6, 7), (0.9, 0.8, 0.7))
    rule.count_pass(rows=20, seconds=2.0, context=0)
    rule.count_draft(tree, 0.5)
    rule.count_pass(rows=4, seconds=2.0, context=20)
    rule.count_verdict(Verdict(tree, (0, 1), NO_LOGITS, 9))
    assert rule.profile.tokens_a_pass == 3
    assert rule.profile.acceptance == pytest.approx(2 / 3)
    assert rule.profile.rows() == [
        (
            "speculation",
            "3.00 tokens a pass; 3.0 nodes verified in each, 67% of them accepted; 0.5 s for drafts, 4 s for passes",
        )
    ]
