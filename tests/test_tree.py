"""A tree of guesses: which nodes its parts keep, and that every part is a tree again."""

from __future__ import annotations

from drafting import assert_is_tree, trees
from hypothesis import given
from hypothesis import strategies as st

from rabbit_engine.decoding import EMPTY, ROOT, Tree

#        ROOT
#       /    \
#    0: 7   1: 8
#    /  \       \
#  2: 7  3: 9   4: 7
#        |
#      5: 7
FORKED = Tree((7, 8, 7, 9, 7, 7), (ROOT, ROOT, 0, 0, 1, 3), (0.6, 0.4, 0.2, 0.4, 0.4, 0.3))


def test_a_chain_is_a_tree_with_one_branch() -> None:
    chain = Tree.chain([4, 5, 6], [0.9, 0.5, 0.1])
    assert chain == Tree((4, 5, 6), (ROOT, 0, 1), (0.9, 0.5, 0.1))
    assert (chain.is_chain, FORKED.is_chain, EMPTY.is_chain) == (True, False, True)
    assert (len(chain), len(EMPTY)) == (3, 0)


def test_depths_count_from_the_first_guess() -> None:
    assert FORKED.depths == (1, 1, 2, 2, 2, 3)
    assert Tree.chain([4, 5, 6], [1, 1, 1]).depths == (1, 2, 3)


def test_a_child_is_found_by_its_parent_and_its_token() -> None:
    assert [FORKED.child(ROOT, token) for token in (7, 8, 9)] == [0, 1, None]
    assert [FORKED.child(0, token) for token in (7, 9, 8)] == [2, 3, None]
    assert [FORKED.child(node, 7) for node in (1, 2, 3)] == [4, None, 5]


def test_the_best_nodes_are_the_likeliest_and_the_earlier_ones_of_equals() -> None:
    assert FORKED.best(1) == Tree((7,), (ROOT,), (0.6,))
    assert FORKED.best(3) == Tree((7, 8, 9), (ROOT, ROOT, 0), (0.6, 0.4, 0.4))
    assert FORKED.best(5) == Tree((7, 8, 9, 7, 7), (ROOT, ROOT, 0, 1, 2), (0.6, 0.4, 0.4, 0.4, 0.3))
    assert FORKED.best(6) == FORKED
    assert FORKED.best(0) == EMPTY


def test_a_tree_within_a_depth_keeps_all_nodes_down_to_it() -> None:
    assert FORKED.within(1) == Tree((7, 8), (ROOT, ROOT), (0.6, 0.4))
    assert FORKED.within(2) == FORKED.best(6).within(2) == Tree((7, 8, 7, 9, 7), (ROOT, ROOT, 0, 0, 1), (0.6, 0.4, 0.2, 0.4, 0.4))
    assert FORKED.within(3) == FORKED
    assert FORKED.within(0) == EMPTY


def test_the_likeliest_chain_follows_the_likeliest_child() -> None:
    assert FORKED.likeliest_chain() == Tree((7, 9, 7), (ROOT, 0, 1), (0.6, 0.4, 0.3))
    assert Tree((5, 6), (ROOT, ROOT), (0.5, 0.5)).likeliest_chain() == Tree((5,), (ROOT,), (0.5,))
    assert EMPTY.likeliest_chain() == EMPTY


@given(trees(), st.integers(0, 12))
def test_every_part_of_a_tree_is_a_tree(tree: Tree, count: int) -> None:
    assert_is_tree(tree)
    for part in (tree.best(count), tree.within(count), tree.likeliest_chain()):
        assert_is_tree(part)
    assert len(tree.best(count)) == min(count, len(tree))
    assert max(tree.within(count).depths, default=0) <= count
    assert tree.likeliest_chain().is_chain


@given(trees(), st.integers(0, 12))
def test_no_other_part_of_that_size_has_a_larger_sum(tree: Tree, count: int) -> None:
    largest = sorted(tree.probabilities, reverse=True)[:count]
    assert sorted(tree.best(count).probabilities, reverse=True) == largest
