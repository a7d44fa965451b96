"""Lookup: guesses from the text itself, and how likely it thinks they are."""

from __future__ import annotations

import random

import pytest
import torch
from drafting import VOCABULARY, assert_is_tree, verdict_of, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine import Lookup
from rabbit_engine.decoding import EMPTY, ROOT, Allowance, Draft, Tree, Verdict
from rabbit_engine.errors import ConfigurationError

BUDGET = Allowance(nodes=64, depth=64)
SENTENCE = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]


def random_text(length: int, seed: int = 0) -> list[int]:
    """Tokens above those of the sentence."""
    return random.Random(seed).choices(range(30, VOCABULARY), k=length)


def expected(tree: Tree) -> float:
    """Tokens that the draft expects to be accepted."""
    return sum(tree.probabilities)


def propose(text: list[int], budget: Allowance = BUDGET) -> Tree:
    """The first tree of a text."""
    return Lookup().start().propose(text, budget)


def test_the_end_of_a_text_goes_on_as_it_did_before() -> None:
    tree = propose([1, *SENTENCE, 2, *SENTENCE[:4]])
    assert [tree.tokens[node] for node in range(6)] == SENTENCE[4:]
    assert tree.parents[:6] == (ROOT, 0, 1, 2, 3, 4)


def test_different_continuations_are_branches_and_the_longer_match_is_likelier() -> None:
    tree = propose([5, 6, 7, 21, 1, 6, 7, 22, 2, 7, 23, 3, 5, 6, 7], Allowance(nodes=64, depth=1))
    assert (tree.tokens, tree.parents) == ((21, 22, 23), (ROOT, ROOT, ROOT))
    assert tree.probabilities[0] > tree.probabilities[1] > tree.probabilities[2]


def test_a_text_that_repeats_itself_is_followed_around() -> None:
    tree = propose([1, *[7, 8, 9] * 3, 7], Allowance(nodes=20, depth=20))
    chain = tree.likeliest_chain()
    assert chain.tokens == ((8, 9, 7) * 7)[:20]


@pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3, 4, 5]])
def test_nothing_is_guessed_where_nothing_repeats(text: list[int]) -> None:
    assert propose(text) == EMPTY


@pytest.mark.parametrize("budget", [Allowance(nodes=0, depth=64), Allowance(nodes=64, depth=0)])
def test_no_budget_no_guesses(budget: Allowance) -> None:
    assert propose([7, 8] * 9, budget) == EMPTY


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=60),
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_tree_is_a_tree_within_the_budget(
    prompt: list[int], answer: list[int], nodes: int, depth: int, recycling: bool
) -> None:
    walk(Lookup(recycling=recycling).start(), prompt, answer, Allowance(nodes, depth))


def test_a_copied_text_takes_few_passes() -> None:
    source = random_text(200)
    verdicts = walk(Lookup().start(), [*source, 1], source, BUDGET)
    assert len(verdicts) < 20


def test_it_expects_as_many_tokens_as_it_gets() -> None:
    """An answer that copies pieces of the prompt, with random tokens between them."""
    source, choose = random_text(600), random.Random(1)
    answer: list[int] = []
    while len(answer) < 600:
        start = choose.randrange(len(source) - 40)
        answer += source[start : start + choose.randrange(5, 40)] + choose.choices(range(30), k=3)
    verdicts = walk(Lookup().start(), source, answer, BUDGET)[20:]
    got = sum(len(verdict.path) for verdict in verdicts)
    assert sum(expected(verdict.tree) for verdict in verdicts) == pytest.approx(got, rel=0.35)


def test_a_match_is_followed_past_a_token_that_differs() -> None:
    """As in rows of a table; no other part of the text ends as it does there."""
    drafter, text = Lookup().start(), [1, *SENTENCE, 2, *SENTENCE[:4]]
    drafter.propose(text, BUDGET)
    tree = drafter.propose([*text, 50], BUDGET)
    assert tree.likeliest_chain().tokens[:5] == tuple(SENTENCE[5:])
    tree = drafter.propose([*text, 50, 51], BUDGET)
    assert tree.likeliest_chain().tokens[:4] == tuple(SENTENCE[6:])
    assert drafter.propose([*text, 50, 51, 52], BUDGET) == EMPTY  # it is another text by then


def test_a_text_that_never_repeats_is_given_up_and_taken_up_again() -> None:
    source, noise = random_text(200, seed=2), random_text(300, seed=3)
    verdicts = walk(Lookup().start(), source, [*noise, *source, *source], BUDGET)
    in_noise = [expected(verdict.tree) for verdict in verdicts[50:150]]
    assert sum(in_noise) / len(in_noise) < 0.8
    assert expected(verdicts[-2].tree) > 10


def test_it_learns_from_guesses_that_were_not_verified() -> None:
    """As where drafting is off: no verdict is ever told, but the text shows what was right."""
    noise = random_text(400, seed=4)
    watching, fresh = Lookup(recycling=False).start(), Lookup(recycling=False).start()
    for length in range(1, len(noise)):
        watching.propose(noise[:length], BUDGET)
    assert expected(watching.propose(noise, BUDGET)) < expected(fresh.propose(noise, BUDGET)) / 2


def test_the_text_may_grow_by_any_number_of_tokens() -> None:
    text = [1, *SENTENCE, 2, *SENTENCE[:4]]
    once, often = Lookup().start(), Lookup().start()
    for length in (3, 4, 9, 14):
        often.propose(text[:length], Allowance(nodes=0, depth=0))
    assert often.propose(text, BUDGET) == once.propose(text, BUDGET)


def test_recycling_guesses_what_the_model_found_likely_after_a_token() -> None:
    drafter = Lookup().start()
    text = [3, 4, 3]
    tree = drafter.propose(text, BUDGET)
    logits = torch.zeros(1 + len(tree), VOCABULARY)
    logits[0, torch.tensor([50, 51, 52])] = torch.tensor([3.0, 2.0, 1.0])  # after 3
    drafter.accepted(Verdict(tree, (), logits, 50))
    tree = drafter.propose([*text, 50, 9, 3], BUDGET)
    assert {50, 51, 52, 4} <= {token for token, parent in zip(tree.tokens, tree.parents, strict=True) if parent == ROOT}
    assert_is_tree(tree, BUDGET)


def test_without_recycling_the_model_s_logits_count_for_nothing() -> None:
    drafter = Lookup(recycling=False).start()
    text = [*SENTENCE, *SENTENCE[:3]]
    drafter.accepted(verdict_of(drafter.propose(text, BUDGET), [40]))
    assert 40 not in drafter.propose([*text, 41, SENTENCE[2]], BUDGET).tokens


def test_texts_share_what_the_model_found_likely_and_nothing_else() -> None:
    draft = Lookup()
    first = draft.start()
    tree = first.propose([7, 8, 7], BUDGET)
    first.accepted(verdict_of(tree, [8, 9]))
    second = draft.start().propose([1, 2, 7], BUDGET)
    assert second.likeliest_chain().tokens[:2] == (8, 9)  # after 7, and after 8
    assert draft.start().propose([1, 2, 3], BUDGET) == EMPTY


def test_one_lookup_serves_models_of_different_vocabularies() -> None:
    draft = Lookup()
    for vocabulary in (64, 100, 4):
        drafter = draft.start()
        tree = drafter.propose([1, 2, 1], BUDGET)
        drafter.accepted(Verdict(tree, (), torch.arange(vocabulary).repeat(1 + len(tree), 1).float(), 3))
    assert draft.start().propose([1], Allowance(nodes=8, depth=1)).tokens == (99, 98, 97, 96, 95, 94, 93, 92)


def test_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    walk(Lookup().start(), SENTENCE, SENTENCE * 2, BUDGET)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_a_draft_with_a_fixed_size_where_one_is_given() -> None:
    assert isinstance(Lookup(), Draft)
    assert (Lookup().nodes, Lookup(16).nodes, Lookup(nodes=16).nbytes, Lookup().name) == (None, 16, 0, "lookup")
    for nodes in (0, -1, 2.5):
        with pytest.raises(ConfigurationError, match=rf"nodes={nodes} is not a number of guesses"):
            Lookup(nodes)  # type: ignore[arg-type]
