"""How many nodes a tree gets: as many as give the most tokens a second, by measured passes, drafts and guesses."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate

from rabbit_engine.decoding.calibration import Calibration, UsualGain
from rabbit_engine.decoding.draft import Allowance, Verdict
from rabbit_engine.decoding.prior import Prior
from rabbit_engine.decoding.seconds import SecondsBySize
from rabbit_engine.decoding.tree import EMPTY, Tree
from rabbit_engine.streaming import SpeculationProfile

MOST_NODES = 256
"""The largest tree that the rule asks for."""

LEAST_GAIN = 1.05
"""A tree must promise this many times the tokens a second of plain decoding: less is within the error of the measurements."""

TRIAL_SHARE = 0.01
"""Of the time, what trials may cost: larger trees than those measured, and guesses that failed lately."""

_FIRST_NODES = 4
"""Asked of a draft whose seconds are unknown."""

_FREE_SHARE = 0.01
"""Of a pass, what a draft may take to be asked for every pass: its tree then says whether it pays."""

_OLD = 64
"""Passes after which the seconds of a plain one are measured again."""

_LEAST_CONTEXT_BITS = 9
"""Contexts up to 1024 tokens are one kind, up to four times as many the next, and so on: attention makes rows slower."""

_GROWTH = 4
"""Times the largest pass that was measured: larger ones are not tried yet."""

_CLEAR = 1.5
"""Times plain decoding's rate: below it, the seconds of a plain pass must be known well."""


def best_size(
    probabilities: Sequence[float], seconds_of_rows: Callable[[int], float], draft_s: float = 0.0, others: int = 0
) -> int:
    """The number of nodes with the most expected tokens a second; 0 if none promises LEAST_GAIN times plain decoding.

    `probabilities` are of the nodes, the likeliest first, and corrected: n nodes are expected to add the sum of the first n to
    the one token of a pass. The `others` that share it are expected to bring as many nodes and to gain as much.
    """
    gains = [0.0, *accumulate(probabilities)]
    rates = {size: rate(size, gains[size], seconds_of_rows, draft_s, others) for size in _sizes_up_to(len(probabilities))}
    best = max(rates, key=lambda size: (rates[size], -size))
    return best if rates[best] >= LEAST_GAIN * rates[0] else 0


def rate(size: int, gain: float, seconds_of_rows: Callable[[int], float], draft_s: float, others: int) -> float:
    """Tokens a second of 1 + `others` texts that each bring `size` nodes, which add `gain` tokens and take `draft_s`."""
    texts = 1 + others
    return texts * (1 + gain) / (seconds_of_rows(texts * (1 + size)) + texts * draft_s)


def _sizes_up_to(most: int) -> list[int]:
    """0 to 16, then about every eighth further: near the best, rates differ little."""
    found = list(range(min(most, 16) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] * 9 // 8))
    return found


class Rule:
    """Sizes the trees of one draft for one model, for all its texts. Thread-safe; it reads no clock.

    `nodes` fixes the size. `prior` is what the plan says of a pass, for the first decisions. `profile` is where it counts.
    """

    def __init__(self, nodes: int | None = None, prior: Prior | None = None, profile: SpeculationProfile | None = None) -> None:
        self.profile = profile or SpeculationProfile()
        self._nodes = nodes
        self._by_context = [SecondsBySize(prior.seconds if prior else lambda _: 1.0, trusted=prior is not None)]
        self._passes = self._by_context[0]
        self._drafts = SecondsBySize(lambda nodes: 1 + math.log2(nodes))
        self._calibration = Calibration()
        self._usual = UsualGain(MOST_NODES)
        self._asked = 0
        self._allowance = 1.0  # what trials may still cost, in plain passes
        self._balance = 1.0  # what was gained over plain decoding, in plain passes, as far as it is remembered
        self._advantage = 1.0
        self._others = 0
        self._drafted_s = 0.0
        self._lock = threading.Lock()

    def budget(self, context: int, others: int = 0) -> Allowance:
        """What the next tree may cost; with 0 nodes, do not draft now. `others` are texts that share the pass."""
        with self._lock:
            self._passes = self._passes_at(context)
            nodes = self._nodes if self._nodes is not None else self._nodes_to_ask(others)
            self._asked, self._others = nodes, others
            return Allowance(nodes, nodes, math.inf if self._nodes is not None else self._token_s(nodes, others))

    def fit(self, tree: Tree, draft_s: float, context: int, others: int = 0) -> Tree:
        """The part of a tree that pays, possibly none of it; `draft_s` are the seconds that it took."""
        if self._nodes is not None:
            return tree.best(self._nodes)
        if not tree:
            return EMPTY
        with self._lock:
            self._passes = self._passes_at(context)
            return tree.best(self._size(sorted(tree.probabilities, reverse=True), draft_s, others))

    def count_pass(self, rows: int, seconds: float, context: int) -> None:
        """Learn from a pass: of a prompt, with a tree, or plain. Count one that texts share once, with the rows of all."""
        with self._lock:
            self.profile.pass_s += seconds
            self._passes = self._passes_at(context)
            self._passes.add(rows, seconds)
            regained = TRIAL_SHARE * seconds / self._passes.seconds(1)
            self._allowance = min(1.0, self._allowance + regained)
            self._balance = min(1.0, self._balance + regained)

    def count_draft(self, tree: Tree, seconds: float) -> None:
        """Learn from a tree as it was proposed, and the seconds that took."""
        with self._lock:
            self.profile.draft_s += seconds
            self.profile.drafted += len(tree)
            self._drafts.add(max(1, len(tree)), seconds)
            self._drafted_s += seconds
            self._usual.add(sorted(self._calibration.corrected(tree.probabilities), reverse=True), self._asked)

    def count_verdict(self, verdict: Verdict) -> None:
        """Learn from what the model made of a tree. Count plain passes too, with the empty tree."""
        with self._lock:
            self.profile.passes += 1
            self.profile.tokens += 1 + len(verdict.path)
            self.profile.nodes += len(verdict.tree)
            self.profile.accepted += len(verdict.path)
            if verdict.tree:
                self._calibration.add(verdict.tree, verdict.path)
            self._settle(len(verdict.tree), len(verdict.path))

    @property
    def trust(self) -> float:
        """The factor between the draft's probabilities and what came true lately."""
        with self._lock:
            return self._calibration.trust

    # Called with the lock held.

    def _settle(self, nodes: int, accepted: int) -> None:
        """Count what a pass gained over a plain one."""
        texts, plain = 1 + self._others, self._pass_s(0, self._others)
        gain = (1 + accepted - self._pass_s(nodes, self._others) / plain) / texts - self._drafted_s / plain
        self._balance, self._drafted_s = min(1.0, self._balance + gain), 0.0

    def _passes_at(self, context: int) -> SecondsBySize:
        """The seconds of passes behind about that many tokens: the first ones of a longer context are as those of a shorter."""
        kind = max(0, context.bit_length() - _LEAST_CONTEXT_BITS) // 2
        while len(self._by_context) <= kind and self._by_context[-1].is_known:
            self._by_context.append(SecondsBySize(self._by_context[-1].seconds, trusted=True))
        return self._by_context[min(kind, len(self._by_context) - 1)]

    def _nodes_to_ask(self, others: int) -> int:
        if self._needs_plain_pass(others):
            return 0
        if not self._drafts.is_known:
            return _FIRST_NODES
        most = self._largest(others)
        if self._drafts.seconds(most) <= _FREE_SHARE * self._plain_s(others):
            return most
        sizes = [0, *(size for size in self._usual.sizes if size <= most)]
        gains = dict(zip(sizes, [0.0, *self._usual.gains], strict=False))
        surely = {size: self._usual_rate(size, gains[size], others) for size in sizes}
        hopes = {
            size: rate(size, gains[size], self._passes.hope, self._draft_s(size, self._drafts.hope), others) for size in sizes
        }
        sure = max(sizes, key=lambda size: (surely[size], -size))
        if surely[sure] < LEAST_GAIN * surely[0]:
            sure = 0
        hoped = max(sizes[1:], key=lambda size: (hopes[size], -size))
        while hoped > sure:
            if self._may_spend(1 + gains[hoped], surely[hoped], surely[sure], others):
                return hoped
            hoped //= 2
        return sure if self._balance > 0 else 0

    def _draft_s(self, size: int, seconds: Callable[[int], float]) -> float:
        return seconds(size) if size else 0.0

    def _usual_rate(self, size: int, gain: float, others: int) -> float:
        return rate(size, gain, self._passes.seconds, self._draft_s(size, self._drafts.seconds), others)

    def _needs_plain_pass(self, others: int) -> bool:
        """Whether the seconds of a plain pass must be measured before others can be compared with them."""
        age = self._passes.age(1 + others)
        if age is None:
            return self._passes.needs_least
        return age > (_OLD if self._advantage > _CLEAR else 8 * self._passes.count(1 + others))

    def _largest(self, others: int) -> int:
        """The most nodes that could pay: their pass takes at most twice as long as the tokens that trees usually bring."""
        tokens = 1 + max(_FIRST_NODES, *self._usual.gains)
        rows = _GROWTH * self._passes.largest
        sizes = [size for size in self._usual.sizes if self._pass_s(size, others) <= 2 * tokens * self._pass_s(0, others)]
        return max((size for size in sizes if (1 + others) * (1 + size) <= rows), default=1)

    def _pass_s(self, nodes: int, others: int) -> float:
        return self._passes.seconds((1 + others) * (1 + nodes))

    def _size(self, probabilities: Sequence[float], draft_s: float, others: int) -> int:
        """The size that pays for sure, or a larger or more hopeful one if its risk is small."""
        corrected = self._calibration.corrected(probabilities)
        gains = [0.0, *accumulate(corrected)]

        def surely(size: int) -> float:
            return rate(size, gains[size], self._passes.seconds, draft_s, others)

        sure = best_size(corrected, self._passes.seconds, draft_s, others)
        hoped = best_size(self._calibration.hopeful(probabilities), self._passes.hope, draft_s, others)
        self._advantage = surely(sure) * self._plain_s(others)
        while hoped > sure:
            if self._may_spend(1 + gains[hoped], surely(hoped), surely(sure), others):
                return hoped
            hoped //= 2
        return sure if self._balance > 0 else 0

    def _may_spend(self, tokens: float, tried: float, otherwise: float, others: int) -> bool:
        """Whether the time that `tokens` may take longer at the rate `tried` than at another is allowed; it is then spent."""
        loss = max(0.0, tokens / tried - tokens / otherwise) / self._pass_s(0, others)
        if loss > self._allowance:
            return False
        self._allowance -= loss
        return True

    def _plain_s(self, others: int) -> float:
        """Seconds of a token without a tree."""
        return self._pass_s(0, others) / (1 + others)

    def _token_s(self, nodes: int, others: int) -> float:
        """Seconds of a token with trees of about that size; infinite before the first pass."""
        if not self._passes.is_known:
            return math.inf
        index = max(0, nodes).bit_length() - 1
        if index < 0 or not self._drafts.is_known:
            return self._plain_s(others)
        size = self._usual.sizes[min(index, len(self._usual.sizes) - 1)]
        return 1 / self._usual_rate(size, self._usual.gains[self._usual.sizes.index(size)], others)
