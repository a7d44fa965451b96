"""How many nodes a tree gets: in simulated models, the time of a text with the rule against that of the best fixed size."""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from rabbit_engine.decoding import EMPTY, ROOT, Allowance, Prior, Rule, Tree, Verdict
from rabbit_engine.decoding.model_drafter import RoundCosts
from rabbit_engine.decoding.search import Search
from rabbit_engine.decoding.seconds import SecondsBySize
from rabbit_engine.decoding.sizing import Outlook
from rabbit_engine.planning.experts import Routing
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.tiers import Budget as DeviceBudget
from rabbit_engine.planning.tiers import UnitSize

NO_LOGITS = torch.zeros(0)
TOKENS, PROMPT = 256, 200
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Curve = Callable[[int], float]
"""Seconds of a pass by its rows."""


def reading(rows: int) -> float:
    """Waits for weights up to 64 rows."""
    return 2.0 * max(1.0, rows / 64)


def reading_for_a_gpu(rows: int) -> float:
    return 0.5 + 0.0005 * rows


def in_memory(rows: int) -> float:
    return 0.020 + 0.002 * (rows - 1)


def in_memory_with_slow_rows(rows: int) -> float:
    return 0.020 + 0.006 * (rows - 1)


def experts_on_demand(rows: int) -> float:
    """Each row uses 8 of 128."""
    return 0.2 + 1.8 * 16 * (1 - (1 - 8 / 128) ** rows)


READING, READING_FOR_A_GPU = Prior(2.0), Prior(0.5)
EXPERTS = Prior(0.2, 1.8, count=128, used=8)
EXPERTS_IN_MEMORY = Prior(1.0, 9.0, count=128, used=8, trusted=False)


@dataclass
class Source:
    """Guesses for a text of which it knows, by position, what really follows. Nodes on the text's path are in `right`."""

    rng: random.Random
    step_s: float
    token_s: float = 0.0
    right: set[int] = field(default_factory=set)

    def propose(self, position: int, nodes: int) -> tuple[Tree, float]:
        raise NotImplementedError


class Model(Source):
    """A draft model: the text takes its first guess with the probability `agreement` on average, and it knows how sure it is."""

    def __init__(self, seed: int, step_s: float, agreement: float) -> None:
        super().__init__(random.Random(seed), step_s)
        self._agreement = agreement
        self._text = [(sure, self._rank(sure)) for sure in (self._sure() for _ in range(2 * TOKENS + 300))]

    def _sure(self) -> float:
        return 0.01 + 0.98 * self.rng.betavariate(2 * self._agreement, 2 * (1 - self._agreement))

    def _rank(self, sure: float) -> int:
        rank, rest, drawn = 0, 1 - sure, self.rng.random() - sure
        while drawn > 0 and rank < 7:
            rank, rest = rank + 1, rest / 2
            drawn -= rest
        return rank

    def propose(self, position: int, nodes: int) -> tuple[Tree, float]:
        tokens, parents, likely = list[int](), list[int](), list[float]()
        self.right, open_nodes = set(), list[tuple[float, int, int, int, bool]]()

        def expand(parent: int, above: float, depth: int, on_path: bool) -> None:
            sure, rank = self._text[position + depth] if on_path else (self._sure(), -1)
            shares = [sure, *((1 - sure) * 0.5**power for power in (1, 2, 3))]
            for token, share in enumerate(shares):
                heapq.heappush(open_nodes, (-above * share, parent, token, depth + 1, on_path and token == rank))

        expand(ROOT, 1.0, 0, True)
        while len(tokens) < nodes:
            negative, parent, token, depth, on_path = heapq.heappop(open_nodes)
            if on_path:
                self.right.add(len(tokens))
            tokens.append(token)
            parents.append(parent)
            likely.append(max(-negative, 1e-9))
            expand(len(tokens) - 1, -negative, depth, on_path)
        return Tree(tuple(tokens), tuple(parents), tuple(likely)), self.step_s * min(nodes + 1, 10)


class Searching(Model):
    """A draft model that stops where another step costs more than it adds, as `ModelDrafter` does."""

    def __init__(self, seed: int, step_s: float, agreement: float) -> None:
        super().__init__(seed, step_s, agreement)
        self._costs = RoundCosts()
        self.token_s = 0.0

    def propose(self, position: int, nodes: int) -> tuple[Tree, float]:
        search, steps = Search(nodes, nodes), 1
        places = {ROOT: (0, True)}  # the depth of what follows, and whether it may be right

        def add(node: int) -> None:
            depth, on_path = places[node]
            sure, rank = self._text[position + depth] if on_path else (self._sure(), -1)
            shares = [sure, *((1 - sure) * 0.5**power for power in (1, 2, 3))]
            search.add(node, range(4), [math.log(share) for share in shares])
            for token in range(4):
                if (child := search.child(node, token)) is not None:
                    places[child] = depth + 1, on_path and token == rank

        add(ROOT)
        while taken := search.take(math.ceil(nodes / 4)):
            probability, before = sum(map(search.probability, taken)), search.expected()
            if not self._costs.pays(probability, self.token_s):
                break
            for node in taken:
                add(node)
            self._costs.count(probability, search.expected() - before, self.step_s)
            steps += 1
        tree = search.tree()
        self.right, at = set(), ROOT
        while (child := tree.child(at, self._text[position + len(self.right)][1])) is not None:
            self.right.add(at := child)
        return tree, steps * self.step_s


class Repeats(Source):
    """Lookup in a text that repeats itself where `kind` says; elsewhere it finds nothing, or something wrong."""

    def __init__(self, seed: int, step_s: float, kind: Callable[[int], bool]) -> None:
        super().__init__(random.Random(seed), step_s)
        self._kind = kind
        self._is_right = [self.rng.random() < (0.93 if kind(position) else 0.04) for position in range(2 * TOKENS + 300)]

    def propose(self, position: int, nodes: int) -> tuple[Tree, float]:
        repeats = self._kind(position)
        if not repeats and self.rng.random() < 0.5:
            self.right = set()
            return EMPTY, self.step_s
        count, sure = (min(nodes, 64), 0.9) if repeats else (min(nodes, 8), 0.5)
        wrong = next((depth for depth in range(count) if not self._is_right[position + depth]), count)
        self.right = set(range(wrong))
        return Tree.chain(range(count), [sure**depth for depth in range(1, count + 1)]), self.step_s


NEVER, ALWAYS = (lambda _: False), (lambda _: True)
LATER, AT_TIMES = (lambda position: position > TOKENS // 2), (lambda position: position // 32 % 2 == 1)


def plain_s(curve: Curve, others: int = 0, tokens: int = TOKENS) -> float:
    return curve(PROMPT) + tokens * curve(1 + others)


def simulate(
    rule: Rule, curve: Curve, source: Source, *, others: int = 0, noise: float = 0.0, tokens: int = TOKENS
) -> tuple[float, list[int]]:
    """Seconds of a text, and the size of each tree. What the rule measures is wrong by up to `noise`."""
    errors, texts = random.Random(7), 1 + others

    def run(rows: int, context: int) -> float:
        rule.count_pass(rows, curve(rows) * errors.uniform(1 - noise, 1 + noise), context)
        return curve(rows)

    total, done, sizes = run(PROMPT, 0), 0, list[int]()
    while done < tokens:
        tree, path, draft_s = EMPTY, list[int](), 0.0
        budget = rule.budget(PROMPT + done, others)
        if budget.nodes:
            source.token_s = budget.token_s
            proposed, draft_s = source.propose(done, budget.nodes)
            rule.count_draft(proposed, draft_s)
            tree = rule.fit(proposed, draft_s, PROMPT + done, others)
            path = path_in(tree, proposed, source.right)
        total += texts * draft_s + run(texts * (1 + len(tree)), PROMPT + done)
        rule.count_verdict(Verdict(tree, tuple(path), NO_LOGITS, 0))
        sizes.append(len(tree))
        done += 1 + len(path)
    return total, sizes


def path_in(tree: Tree, proposed: Tree, right: set[int]) -> list[int]:
    """The nodes of a part of `proposed` that are right there."""
    path, at = list[int](), ROOT
    for node in sorted(right):
        child = tree.child(at, proposed.tokens[node])
        if child is None:
            break
        path.append(child)
        at = child
    return path


@functools.cache
def best_fixed_s(curve: Curve, source: type[Source], *values: object, others: int = 0) -> float:
    """`values` make the source."""
    return min(simulate(Rule(nodes), curve, source(*values), others=others)[0] for nodes in SIZES)


MODELS: dict[str, tuple[Curve, Prior | None]] = {
    "reading": (reading, READING),
    "reading, not told": (reading, None),
    "reading for a GPU": (reading_for_a_gpu, READING_FOR_A_GPU),
    "in memory": (in_memory, None),
    "in memory with slow rows": (in_memory_with_slow_rows, None),
    "experts on demand": (experts_on_demand, EXPERTS),
    "experts in memory": (experts_on_demand, EXPERTS_IN_MEMORY),
}


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("kind", [NEVER, LATER, AT_TIMES, ALWAYS], ids=["never", "later", "at times", "always"])
@pytest.mark.parametrize("model", MODELS)
def test_lookup_is_never_slower_than_plain_and_as_fast_as_the_best_fixed_size(
    model: str, kind: Callable[[int], bool], noise: float
) -> None:
    curve, prior = MODELS[model]
    for seed in (1, 2):
        source = seed, 0.002 * curve(1), kind
        seconds, _ = simulate(Rule(prior=prior), curve, Repeats(*source), noise=noise)
        assert seconds <= 1.03 * plain_s(curve)
        assert seconds <= 1.15 * min(plain_s(curve), best_fixed_s(curve, Repeats, *source))


@pytest.mark.parametrize("model", ["in memory", "in memory with slow rows", "experts in memory"])
def test_a_first_short_answer_of_a_model_in_memory_loses_about_a_pass_at_most(model: str) -> None:
    curve, prior = MODELS[model]
    for seed in range(8):
        source = Repeats(seed, 0.002 * curve(1), NEVER)
        seconds, _ = simulate(Rule(prior=prior), curve, source, tokens=16)
        assert seconds - plain_s(curve, tokens=16) < 1.3 * curve(1)


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("agreement", [0.83, 0.67, 0.2])
@pytest.mark.parametrize("model", MODELS)
def test_a_draft_model_is_never_slower_than_plain_and_as_fast_as_the_best_fixed_size(
    model: str, agreement: float, noise: float
) -> None:
    curve, prior = MODELS[model]
    for step in (0.01, 0.1):
        source = 1, step * curve(1), agreement
        seconds, _ = simulate(Rule(prior=prior), curve, Model(*source), noise=noise)
        assert seconds <= 1.03 * plain_s(curve)
        assert seconds <= 1.15 * min(plain_s(curve), best_fixed_s(curve, Model, *source))


@pytest.mark.parametrize("agreement", [0.83, 0.67, 0.2])
@pytest.mark.parametrize("model", MODELS)
def test_a_draft_that_takes_half_a_pass_a_step_costs_little(model: str, agreement: float) -> None:
    curve, prior = MODELS[model]
    seconds, _ = simulate(Rule(prior=prior), curve, Model(1, 0.5 * curve(1), agreement))
    assert seconds <= 1.03 * plain_s(curve)


@pytest.mark.parametrize("agreement", [0.83, 0.67])
@pytest.mark.parametrize("model", ["reading", "reading, not told", "reading for a GPU"])
def test_a_draft_that_takes_half_a_pass_a_step_is_used_where_it_gains(model: str, agreement: float) -> None:
    curve, prior = MODELS[model]
    for seed in (1, 2, 3):
        source = Searching(seed, 0.5 * curve(1), agreement)
        seconds, _ = simulate(Rule(prior=prior), curve, source)
        assert seconds <= 0.85 * plain_s(curve)


def test_experts_on_demand_end_at_two_nodes_or_less() -> None:
    for agreement in (0.83, 0.67, 0.2):
        _, sizes = simulate(Rule(prior=EXPERTS), experts_on_demand, Model(1, 0.01, agreement))
        assert max(sizes[8:]) <= 2


def test_a_streamed_model_has_large_trees_within_a_few_passes() -> None:
    _, sizes = simulate(Rule(prior=READING), reading, Model(1, 0.02, 0.83))
    assert sizes[0] == 16
    assert min(sizes[4:]) >= 32


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_texts_that_share_passes_get_the_size_that_is_best_for_all(noise: float) -> None:
    for source, values in ((Model, (1, 0.02, 0.83)), (Model, (1, 0.02, 0.2)), (Repeats, (1, 0.004, AT_TIMES))):
        seconds, _ = simulate(Rule(prior=READING), reading, source(*values), others=7, noise=noise)
        assert seconds <= 1.15 * best_fixed_s(reading, source, *values, others=7)
        assert seconds <= 1.03 * plain_s(reading, others=7)


def test_rows_that_attention_makes_slower_in_a_long_context_get_smaller_trees() -> None:
    rule, short, long = Rule(prior=READING), 100, 8000
    for _ in range(20):
        for context in (short, long):
            nodes = rule.budget(context).nodes
            tree = Tree.chain(range(nodes), [0.9**depth for depth in range(1, nodes + 1)])
            rule.count_draft(tree, 0.0)
            tree = rule.fit(tree, 0.0, context)
            rows = 1 + len(tree)
            rule.count_pass(rows, reading(rows) + context / 8000 * 0.5 * rows, context)
            rule.count_verdict(Verdict(tree, tuple(range(min(7, len(tree)))), NO_LOGITS, 0))
    trees = [Tree.chain(range(64), [0.9**depth for depth in range(1, 65)])] * 2
    in_short, in_long = (len(rule.fit(tree, 0.0, context)) for tree, context in zip(trees, (short, long), strict=True))
    assert in_short > 2 * in_long > 0


def test_a_pass_that_texts_share_is_measured_by_one_of_them() -> None:
    rule, other = Rule(prior=READING), Rule(prior=READING)
    for _ in range(4):
        for each in (rule, other):
            each.count_pass(rows=80, seconds=reading(80), context=0)
        other.count_pass(rows=80, seconds=100.0, context=0, measured=False)
    tree = Tree.chain(range(64), [0.9**depth for depth in range(1, 65)])
    assert rule.fit(tree, 0.0, 100) == other.fit(tree, 0.0, 100)
    assert rule.budget(100) == other.budget(100)
    assert other.profile.pass_s == rule.profile.pass_s + 400  # of each text that waits for it


def test_a_fixed_number_of_nodes_is_asked_for_always() -> None:
    rule = Rule(nodes=64)
    assert rule.budget(context=10) == Allowance(64, 64)
    rule.count_pass(rows=10, seconds=1.0, context=0)
    rule.count_pass(rows=1, seconds=1.0, context=10)
    assert rule.budget(context=11) == Allowance(64, 64)  # whatever its draft takes
    unlikely = Tree.chain(range(100), [0.01] * 100)
    assert len(rule.fit(unlikely, draft_s=9.0, context=11)) == 64


def test_free_rows_are_all_used_and_dear_rows_only_if_their_guesses_are_good() -> None:
    chain = [0.9**depth for depth in range(1, 65)]
    sizes = range(65)
    assert Outlook.of(chain, lambda _: 1.0).best_that_pays(sizes) == 64
    assert Outlook.of(chain, lambda rows: 1.0 + 0.4 * (rows - 1)).best_that_pays(sizes) == 4
    assert Outlook.of(chain, lambda rows: float(rows)).best_that_pays(sizes) == 0
    assert Outlook.of([0.3] * 64, lambda rows: 1.0 + 0.4 * (rows - 1)).best_that_pays(sizes) == 0


def test_guesses_that_fail_are_trusted_less_and_those_that_come_true_more() -> None:
    failing, right = Rule(), Rule()
    tree = Tree.chain((1, 2, 3, 4), (0.4, 0.3, 0.2, 0.1))
    for _ in range(50):
        failing.count_verdict(Verdict(tree, (), NO_LOGITS, 0))
        right.count_verdict(Verdict(tree, (0, 1, 2, 3), NO_LOGITS, 0))
    assert failing.trust < 0.2
    assert right.trust > 3


def test_seconds_go_through_the_measured_points_and_never_fall() -> None:
    seconds = SecondsBySize(lambda _: 1.0)
    for size, measured in ((1, 2.0), (8, 1.8), (101, 4.0)):
        seconds.add(size, measured)
    assert seconds.seconds(1) == seconds.seconds(8) == pytest.approx(1.9)
    assert seconds.seconds(101) == pytest.approx(4.0)
    assert seconds.seconds(201) == pytest.approx(4.0 + 2.1 * 100 / 93)
    assert seconds.hope(64) == seconds.seconds(64) == pytest.approx(1.9 + 2.1 * 56 / 93)
    assert seconds.hope(63) == pytest.approx(1.9)


def test_a_plan_tells_what_passes_take_and_how_experts_make_rows_slower() -> None:
    layers = [UnitSize(f"l{index}", "streamed", 100) for index in range(4)]
    experts = [UnitSize(f"e{index}", "experts", 80, routing=Routing(8, 2, 10, 10)) for index in range(4)]
    streamed = place([*layers, *experts], "cpu", DeviceBudget(device_bytes=220))
    prior = Prior.of(streamed)
    assert prior.trusted
    assert prior.seconds(1) == pytest.approx(streamed.pass_s)
    assert prior.experts_s == pytest.approx(prior.shared_s / 5)  # 80 bytes of the 8 experts in use, 400 of the rest
    assert prior.seconds(1000) == pytest.approx(prior.shared_s + 4 * prior.experts_s)  # all of 8 instead of 2
    resident = Prior.of(place([*layers, *experts], "cpu", DeviceBudget()))
    assert not resident.trusted
    assert resident.seconds(1000) / resident.seconds(1) == pytest.approx((400 + 320) / (400 + 80))


def test_the_profile_says_how_many_tokens_a_pass_gives() -> None:
    rule = Rule(prior=READING)
    tree = Tree.chain((5, 6, 7), (0.9, 0.8, 0.7))
    rule.count_pass(rows=20, seconds=2.0, context=0)
    rule.count_draft(tree, 0.5)
    rule.count_pass(rows=4, seconds=2.0, context=20)
    rule.count_verdict(Verdict(tree, (0, 1), NO_LOGITS, 9))
    assert rule.profile.tokens_a_pass == 3
    assert rule.profile.acceptance == pytest.approx(2 / 3)
    assert rule.profile.rows() == [
        ("speculation", "3.00 tokens a pass; 3.0 nodes verified in each, 67% of them accepted; 0.5 s for drafts, 4 s for passes")
    ]
