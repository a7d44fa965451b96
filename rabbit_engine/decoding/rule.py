"""How many nodes a tree gets: as many as give the most tokens a second, by measured passes, drafts and guesses."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

from rabbit_engine.decoding.calibration import Calibration, UsualGain
from rabbit_engine.decoding.draft import Allowance, Verdict
from rabbit_engine.decoding.losses import Losses
from rabbit_engine.decoding.prior import Prior
from rabbit_engine.decoding.seconds import SecondsBySize
from rabbit_engine.decoding.sizing import Outlook, sizes_up_to
from rabbit_engine.decoding.tree import EMPTY, Tree
from rabbit_engine.streaming import SpeculationProfile

MOST_NODES = 256
"""The largest tree that the rule asks for."""

_FIRST_NODES = 16
"""Asked of a draft whose seconds are unknown, if a plan tells that passes hardly take longer for it; otherwise one node is."""

_FREE_SHARE = 0.01
"""Of a pass, what a draft may take to be asked before every pass: its tree then says whether it pays."""

_LEAST_CONTEXT_BITS = 9
"""Contexts below 1024 tokens are one kind, up to four times as many the next, and so on: attention makes rows slower."""

_CLEAR = 1.5
_OLD, _OLD_IF_UNCLEAR = 64, 8
"""Passes after which the seconds of a plain one are measured again: if trees give more than `_CLEAR` times its rate, or if not,
for each measurement so far."""


class Rule:
    """Sizes the trees of one draft for one model, for all its texts. Thread-safe; it reads no clock.

    `nodes` fixes the size. `prior` is what the plan says of a pass, for the first decisions. `profile` is where it counts.
    """

    def __init__(self, nodes: int | None = None, prior: Prior | None = None, profile: SpeculationProfile | None = None) -> None:
        self.profile = profile or SpeculationProfile()
        self._nodes = nodes
        self._is_told = prior is not None and prior.trusted
        self._by_context = [SecondsBySize(prior.seconds if prior else lambda _: 1.0, trusted=self._is_told)]
        self._drafts = SecondsBySize(lambda nodes: 1 + math.log2(nodes), steepens=False)
        self._calibration = Calibration()
        self._usual = UsualGain(MOST_NODES)
        self._losses = Losses(rows_are_free=self._is_told)
        self._advantage = 1.0  # of the last tree over plain decoding, as expected
        self._asked = 0
        self._drafted_s = 0.0  # since the last pass was settled
        self._passes, self._texts = self._by_context[0], 1
        self._lock = threading.Lock()

    def budget(self, context: int, others: int = 0) -> Allowance:
        """What the next tree may cost; with 0 nodes, do not draft now.

        `context` are the tokens before it. `others` are texts that share the pass.
        """
        with self._lock:
            self._turn_to(context, others)
            if self._nodes is not None:
                return Allowance(self._nodes, self._nodes)
            self._asked = self._nodes_to_ask()
            return Allowance(self._asked, self._asked, self._token_s(self._asked))

    def fit(self, tree: Tree, draft_s: float, context: int, others: int = 0) -> Tree:
        """The part of a tree that pays, possibly none of it; `draft_s` are the seconds that it took."""
        with self._lock:
            self._turn_to(context, others)
            nodes = self._nodes if self._nodes is not None else self._nodes_to_verify(tree, draft_s)
            return tree.best(nodes) if nodes else EMPTY

    def count_pass(self, rows: int, seconds: float, context: int, *, measured: bool = True) -> None:
        """Learn from a pass: of a prompt, with a tree, or plain. `rows` are those of all texts that share it.

        Each text counts it, and one of them has `measured` it.
        """
        with self._lock:
            self.profile.pass_s += seconds
            self._turn_to(context, self._texts - 1)
            if measured:
                self._passes.add(rows, seconds)
            if self._passes.is_known:
                self._losses.pass_time(seconds / self._pass_s(0))

    def count_draft(self, tree: Tree, seconds: float) -> None:
        """Learn from a tree as it was proposed, and the seconds that took."""
        with self._lock:
            self.profile.draft_s += seconds
            self.profile.drafted += len(tree)
            self._drafts.add(max(1, len(tree)), seconds)
            self._drafted_s += seconds
            self._usual.add(sorted(self._calibration.corrected(tree.probabilities), reverse=True), self._asked)

    def count_verdict(self, verdict: Verdict) -> None:
        """Learn from what the model made of a tree. Count plain passes of an answer too, with the empty tree."""
        with self._lock:
            self._count(len(verdict.tree), len(verdict.path))
            if verdict.tree:
                self._calibration.add(verdict.tree, verdict.path)

    def count_last(self, nodes: int, accepted: int) -> None:
        """Learn from the pass in whose tree the text ended: whether more than the `accepted` nodes were right is not known."""
        with self._lock:
            self._count(nodes, accepted)

    @property
    def trust(self) -> float:
        """The factor between the draft's probabilities and what came true lately."""
        with self._lock:
            return self._calibration.trust

    # Called with the lock held.

    def _turn_to(self, context: int, others: int) -> None:
        """Choose the measurements for a context; the first ones of a longer context are expected to be as those of a shorter."""
        kind = max(0, context.bit_length() - _LEAST_CONTEXT_BITS) // 2
        while len(self._by_context) <= kind and self._by_context[-1].is_known:
            self._by_context.append(SecondsBySize(self._by_context[-1].seconds, trusted=True))
        self._passes, self._texts = self._by_context[min(kind, len(self._by_context) - 1)], 1 + others

    def _pass_s(self, nodes: int) -> float:
        return self._passes.seconds(self._texts * (1 + nodes))

    def _nodes_to_ask(self) -> int:
        if self._needs_plain_pass() or self._losses.are_high:
            return 0
        most = self._most_nodes()
        if not self._drafts.is_known:
            is_cheap = self._is_told and self._pass_s(_FIRST_NODES) < _CLEAR * self._pass_s(0)
            return min(most, _FIRST_NODES) if is_cheap else 1
        if self._drafts.seconds(most) <= _FREE_SHARE * self._pass_s(0) / self._texts:
            return most
        sizes = [0, *(size for size in self._usual.sizes if size <= most)]
        return self._choose(self._usual_outlook(), self._usual_outlook(hoping=True), sizes, probes=True)

    def _needs_plain_pass(self) -> bool:
        """Whether the seconds of a plain pass must be measured before others can be compared with them."""
        age = self._passes.age(self._texts)
        if age is None:
            return self._passes.needs_least
        return age > (_OLD if self._advantage > _CLEAR else _OLD_IF_UNCLEAR * self._passes.count(self._texts))

    def _most_nodes(self) -> int:
        """The largest size that could pay: its pass takes at most twice as long as the tokens that trees usually bring."""
        most_s = 2 * (1 + max(4.0, self._usual.gains[-1])) * self._pass_s(0)
        sizes = [size for size in self._usual.sizes if self._pass_s(size) <= most_s]
        return max((size for size in sizes if self._passes.is_near(self._texts * (1 + size))), default=1)

    def _nodes_to_verify(self, tree: Tree, draft_s: float) -> int:
        if not tree or self._losses.are_high:
            return 0
        ordered = sorted(tree.probabilities, reverse=True)
        sure = self._outlook(self._calibration.corrected(ordered), self._passes.seconds, draft_s)
        hoped = self._outlook(self._calibration.hopeful(ordered), self._passes.hope, draft_s)
        size = self._choose(sure, hoped, sizes_up_to(len(tree)))
        self._advantage = sure.rate(size) / sure.rate(0)
        return size

    def _outlook(self, probabilities: Sequence[float], seconds: Callable[[float], float], draft_s: float) -> Outlook:
        return Outlook.of(sorted(probabilities, reverse=True), seconds, draft_s, self._texts)

    def _usual_outlook(self, *, hoping: bool = False) -> Outlook:
        """That of a tree which is not drafted yet."""
        passes, drafts = (self._passes.hope, self._drafts.hope) if hoping else (self._passes.seconds, self._drafts.seconds)
        return Outlook(
            lambda size: 1 + self._usual.gain(size),
            lambda size: passes(self._texts * (1 + size)) / self._texts + (drafts(size) if size else 0.0),
        )

    def _choose(self, sure: Outlook, hoped: Outlook, sizes: Sequence[int], *, probes: bool = False) -> int:
        """The size that pays for sure, or a larger one that is hoped to, if its expected loss may be spent.

        `probes`: also one that is not hoped to, because the next tree may be better than the last ones.
        """
        size = sure.best_that_pays(sizes)
        trial = hoped.best(sizes[1:]) if probes else hoped.best_that_pays(sizes)
        while trial > size:
            if self._losses.may_spend((sure.seconds(trial) - sure.tokens(trial) / sure.rate(size)) / self._pass_s(0)):
                return trial
            trial //= 2
        return size

    def _count(self, nodes: int, accepted: int) -> None:
        self.profile.passes += 1
        self.profile.tokens += 1 + accepted
        self.profile.nodes += nodes
        self.profile.accepted += accepted
        if self._passes.is_known:
            self._settle(nodes, accepted)

    def _settle(self, nodes: int, accepted: int) -> None:
        """Count what a pass gained over plain ones, by what both usually take."""
        plain_s = self._pass_s(0)
        self._losses.settle((self._pass_s(nodes) + self._texts * self._drafted_s) / plain_s, 1 + accepted)
        self._drafted_s = 0.0

    def _token_s(self, nodes: int) -> float:
        """Seconds of a token with trees of that size; infinite before the first pass."""
        if not self._passes.is_known:
            return math.inf
        if not nodes or not self._drafts.is_known:
            return self._pass_s(0) / self._texts
        return 1 / self._usual_outlook().rate(nodes)
