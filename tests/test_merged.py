"""Several drafts in one tree: what they agree on is joined, and each learns what became of its own guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from drafting import assert_is_tree, trees, verdict_of, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from rabbit_engine import Lookup, Merged
from rabbit_engine.decoding import EMPTY, ROOT, Allowance, Draft, Drafter, TargetModel, Tree, Verdict
from rabbit_engine.decoding.merged import merge, part_of
from rabbit_engine.errors import ConfigurationError, DraftError

BUDGET = Allowance(nodes=64, depth=64)


@dataclass
class Fixed:
    """A draft that always proposes the same tree."""

    tree: Tree
    nodes: int | None = None
    nbytes: int = 0
    name: str = "fixed"
    told: list[Verdict] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def attach(self, target: TargetModel) -> None:
        self.events.append(f"attach {target}")

    def start(self) -> Drafter:
        self.events.append("start")
        return self

    def read(self, ids: Sequence[int]) -> None:
        pass

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        return self.tree.best(budget.nodes).within(budget.depth)

    def accepted(self, verdict: Verdict) -> None:
        self.told.append(verdict)

    def close(self) -> None:
        self.events.append("close")


LEFT = Tree((5, 6, 7), (ROOT, 0, ROOT), (0.5, 0.25, 0.25))
RIGHT = Tree((8, 5, 9, 6), (ROOT, ROOT, 1, 1), (0.25, 0.125, 0.0625, 0.015625))


def test_shared_paths_are_joined_and_the_larger_estimate_counts() -> None:
    tree = merge([LEFT, RIGHT], 64)
    assert tree == Tree((5, 6, 7, 8, 9), (ROOT, 0, ROOT, ROOT, 0), (0.5, 0.25, 0.25, 0.25, 0.25))


def test_estimates_that_contradict_each_other_are_scaled_to_one() -> None:
    tree = merge([Tree((5, 6), (ROOT, 0), (0.75, 0.75)), Tree((7,), (ROOT,), (0.75,))], 64)
    assert tree == Tree((5, 6, 7), (ROOT, 0, ROOT), (0.5, 0.5, 0.5))


def test_a_draft_with_low_estimates_keeps_a_share() -> None:
    sure, shy = Tree.chain([1] * 8, [1.0] * 8), Tree.chain([2] * 8, [0.01] * 8)
    drafter = Merged(Fixed(sure), Fixed(shy)).start()
    tree = drafter.propose([1], Allowance(nodes=8, depth=8))
    assert tree.tokens == (1,) * 7 + (2,)


@settings(max_examples=60, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=3), st.integers(0, 20), st.integers(0, 3))
def test_every_merged_tree_is_a_tree_within_the_budget(given_trees: list[Tree], nodes: int, reserved: int) -> None:
    tree = merge(given_trees, nodes, reserved)
    assert_is_tree(tree, Allowance(nodes, depth=10))
    if nodes >= sum(map(len, given_trees)):
        assert all(part_of(verdict_of(tree, [0]), part).tree == part for part in given_trees)


def test_each_draft_is_told_what_became_of_its_own_guesses() -> None:
    left, right = Fixed(LEFT), Fixed(RIGHT)
    drafter = Merged(left, right).start()
    verdict = verdict_of(drafter.propose([1], BUDGET), [5, 9, 3])
    drafter.accepted(verdict)
    (of_left,), (of_right,) = left.told, right.told
    assert (of_left.tree, of_left.path, of_left.next) == (LEFT, (0,), 9)
    assert (of_right.tree, of_right.path, of_right.next) == (RIGHT, (1, 2), 3)
    assert [int(of_left.row_of(node).argmax()) for node in (ROOT, 0)] == [5, 9]
    assert [int(of_right.row_of(node).argmax()) for node in (ROOT, 1, 2)] == [5, 9, 3]


def test_a_draft_is_told_of_the_part_that_was_verified() -> None:
    left, right = Fixed(LEFT), Fixed(RIGHT)
    drafter = Merged(left, right).start()
    tree = drafter.propose([1], BUDGET)
    drafter.accepted(verdict_of(tree.best(1), [5, 6]))
    assert [(told.tree.tokens, told.path, told.next) for told in left.told] == [((5,), (0,), 6)]
    assert [(told.tree.tokens, told.path, told.next) for told in right.told] == [((5,), (0,), 6)]
    drafter.accepted(verdict_of(tree.only([3]), [4]))
    assert len(left.told) == 1  # no guess of it was verified
    assert (right.told[-1].tree, right.told[-1].path, right.told[-1].next) == (Tree((8,), (ROOT,), (0.25,)), (), 4)


def test_lookup_and_another_draft_take_no_more_passes_than_lookup_alone() -> None:
    source = [*range(10, 40)] * 2
    alone = walk(Lookup().start(), [1], source, BUDGET)
    merged = walk(Merged(Lookup(), Fixed(Tree.chain([10, 11, 12], [0.9, 0.8, 0.7]))).start(), [1], source, BUDGET)
    assert len(merged) < len(alone)


def test_all_drafts_are_attached_started_and_closed() -> None:
    parts = Fixed(LEFT, nbytes=3, name="one"), Fixed(RIGHT, nbytes=4, name="two")
    merged = Merged(*parts)
    assert isinstance(merged, Draft)
    assert (merged.nbytes, merged.name) == (7, "one + two")
    merged.attach("target")  # type: ignore[arg-type]
    merged.start().close()
    assert [part.events for part in parts] == [["attach target", "start", "close"]] * 2


def test_what_was_started_is_closed_if_another_draft_cannot_start() -> None:
    class Broken(Fixed):
        def start(self) -> Drafter:
            raise DraftError("no memory")

    whole = Fixed(LEFT)
    with pytest.raises(DraftError, match="no memory"):
        Merged(whole, Broken(LEFT)).start()
    assert whole.events == ["start", "close"]


def test_a_fixed_size_is_its_own_or_the_largest_of_its_drafts() -> None:
    assert Merged(Lookup(), Lookup()).nodes is None
    assert Merged(Lookup(16), Lookup(), Lookup(64)).nodes == 64
    assert Merged(Lookup(16), Lookup(64), nodes=8).nodes == 8
    with pytest.raises(ConfigurationError, match="nodes=0"):
        Merged(Lookup(), Lookup(), nodes=0)


def test_nothing_is_proposed_where_no_draft_has_a_guess() -> None:
    assert Merged(Lookup(), Lookup()).start().propose([1, 2, 3], BUDGET) == EMPTY
