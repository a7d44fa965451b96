"""Several tokens a pass for one text: answers the calls of transformers' own decoding loop from passes over trees of guesses.

The loop runs unchanged. It asks for the logits after each new token; where the last pass verified that token, its row of the
output is the answer, and no pass runs. So processors, sampling, seeds, streamers and criteria are transformers' own, and a
random number is drawn for each token of the text and for nothing else (the walk of SpecExec, Svirschevski et al., 2024).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from rabbit_engine.decoding.draft import Draft, Drafter, StatesReader, Verdict
from rabbit_engine.decoding.findings import PLAIN, Findings
from rabbit_engine.decoding.rule import Rule
from rabbit_engine.decoding.support import ModelTraits, deepest, length_of, proven_length, verifier_for
from rabbit_engine.decoding.tree import EMPTY, ROOT, Tree, why_no_tree
from rabbit_engine.decoding.trial import Trial
from rabbit_engine.decoding.verification import (
    CarryVerifier,
    ChainVerifier,
    Inputs,
    TreeVerifier,
    Verifier,
    output_row,
)
from rabbit_engine.errors import DraftError, RabbitError, first_line
from rabbit_engine.streaming import Trace
from rabbit_engine.transformers_bridge.caches import copy_states, restore_states
from rabbit_engine.transformers_bridge.forwards import cache_of
from rabbit_engine.utils.platform import has_streams

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]

_RAISED_BY_FORWARDS = (ValueError, RuntimeError, TypeError, LookupError, AssertionError, AttributeError)
"""By those that do not know masks of trees, or several tokens behind a cache."""

_MOST_LAG = 32
"""Tokens that passes compute again; beyond, a pass without guesses brings the cache up to date."""


@dataclass(slots=True)
class Speculator:
    """A draft for a model, shared by the texts that use it: what was measured, and what was found out about the model.

    `most_nodes` tells how many nodes the free memory has room for.
    """

    draft: Draft
    rule: Rule
    traits: ModelTraits
    device: torch.device
    trace: Trace
    most_nodes: Callable[[], int]
    findings: Findings = field(default_factory=Findings)
    _told: set[str] = field(default_factory=set)

    def checked(self, tree: Tree) -> Tree:
        """A tree as the draft proposed it, without tokens that the model cannot choose. Raises DraftError if it is none."""
        if reason := why_no_tree(tree):
            raise DraftError(f"{self.draft.name} proposed {reason}: see Tree for what a draft may propose")
        return tree.below(self.traits.config.vocab_size)

    def tell_plain(self, reason: str) -> None:
        """Log once for each reason that a text is decoded one token a pass."""
        self.findings.used = PLAIN + reason
        if reason not in self._told:
            self._told.add(reason)
            logger.info("decoding one token a pass, without speculation: %s", reason)


class PassPart(Protocol):
    """A text's part in passes, which it may share with other texts."""

    @property
    def measures(self) -> bool:
        """Whether it is this text that measures the pass, for all."""

    def await_pass(self) -> int:
        """Wait until the next pass begins, in which all first draft; the number of other texts in it."""

    def await_start(self, rows: int) -> int:
        """Wait until all texts have drafted. This one computes `rows` tokens; returns those of all."""


class Alone:
    """The part of a text that shares no pass."""

    measures = True

    def await_pass(self) -> int:
        """See `PassPart`."""
        return 0

    def await_start(self, rows: int) -> int:
        """See `PassPart`."""
        return rows


class Speculation:
    """One generation of one text: its prompt has `prompt_tokens` known tokens, and `most_tokens` with its answer at most.

    `part` is its part in the passes that it shares with others.
    """

    def __init__(self, speculator: Speculator, prompt_tokens: int, most_tokens: int, part: PassPart | None = None) -> None:
        self._shared = speculator
        self._prompt_tokens, self._most_tokens, self._part = prompt_tokens, most_tokens, part or Alone()
        self._most_nodes = speculator.most_nodes()
        self._drafter: Drafter = speculator.draft.start()
        self._states: torch.Tensor | None = None
        """Of the last pass, [1, tokens, width], if the model shows them."""
        self._verifier: Verifier | None = None
        self._verified: _Verified | None = None
        self._trial: Trial | None = None
        self._ids: list[int] = []
        self._is_asked = False
        self._is_running = False
        self._is_whole = False
        """Whether a pass for a new token was over the whole text."""
        self._has_read = False
        self._learning_s = 0.0
        """What the draft took to learn from its last tree; it counts for the next one."""

    def advance(self, input_ids: torch.Tensor) -> bool:
        """The loop is about to ask for what follows `input_ids` [1, tokens]: the prompt and the answer so far.

        Whether the last pass has the answer. Until it has not, the cache holds guesses too, which no other code should see.
        """
        self._is_asked = input_ids.shape[1] > self._prompt_tokens
        if not self._is_asked:
            return False
        token = int(input_ids[0, -1])
        if self._verified is not None and not self._verified.follow(token):
            self._leave(self._verified, token)
        if self._verified is None:
            self._ids = input_ids[0].tolist()
        return self._verified is not None

    def call(self, forward: Forward, inputs: Inputs) -> Any:
        """The output of the model for the text's newest token, or for (a part of) its prompt."""
        if not self._is_asked:
            return self._run_text(forward, inputs, _rows(inputs))
        self._is_asked = False
        if self._verified is not None:
            return self._verified.row()
        if _rows(inputs) != 1:  # the whole text: once for a new cache, or always without one
            if self._is_whole:
                self._shared.tell_plain("each pass computes the whole text")
            self._is_whole = True
            return self._run_text(forward, inputs, 1)
        verifier = self._current_verifier(inputs)
        if verifier is None:
            return self._run_text(forward, inputs, 1)
        self._check(forward, inputs, verifier)
        tree = self._guess(verifier, length_of(inputs, len(self._ids)))
        if tree:
            self._shared.findings.used = verifier.way
        outputs = self._run(forward, verifier.inputs(inputs, tree), 1 + len(tree))
        self._verified = _Verified(tree, outputs)
        row = self._verified.row()
        if self._trial is not None:
            self._trial.record(self._ids[-1], row["logits"][0, -1])
        return row

    def see(self, states: torch.Tensor) -> None:
        """The last states [1, tokens, width] of the pass that is running."""
        self._states = states

    def _show_states(self, rows: Sequence[int]) -> None:
        """Show the drafter the states of these tokens of the last pass, counted from its end."""
        if self._states is not None and isinstance(self._drafter, StatesReader):
            self._drafter.see(self._states[0, list(rows)])
        self._states = None

    def close(self, forward: Forward, *, cache_is_returned: bool) -> None:
        """End the text. The cache then holds what plain decoding would have left in it."""
        self._drafter.close()
        if self._verifier is None or self._is_running:  # an interrupted pass left the layers of the cache at different lengths
            return
        if self._verified is not None:
            self._verifier.settle(self._verified.path)
            self._shared.rule.count_last(len(self._verified.tree), len(self._verified.path))
        if cache_is_returned and isinstance(self._verifier, CarryVerifier) and self._verifier.lag:
            forward(**self._verifier.catch_up())
        self._verifier.finish()

    def _current_verifier(self, inputs: Inputs) -> Verifier | None:
        """What verifies the next pass; None if nothing can."""
        if self._verifier is not None and type(self._verifier) in self._shared.findings.refused:
            self._verifier.finish()
            self._verifier = None
        if self._verifier is not None and self._verifier.cache is not cache_of(inputs):
            self._verifier = self._trial = None  # some models start another when the text passes a length
        if self._verifier is None:
            self._verifier, reason = verifier_for(inputs, self._shared.traits, self._shared.findings.refused)
            if self._verifier is None:
                self._shared.tell_plain(reason)
        return self._verifier

    def _guess(self, verifier: Verifier, length: int) -> Tree:
        """The tree that pays for the next pass, for a text of that length; empty if none does."""
        context, others = len(self._ids), self._part.await_pass()
        budget = self._shared.rule.budget(context, others)
        proven = self._shared.findings.proven.get(type(verifier), 0)
        room = min(self._most_tokens - context, proven - max(context, length)) - 1
        config = self._shared.traits.config
        depth = min(room, budget.depth, deepest(config, length), deepest(config, context))  # some classes count padding too
        nodes = min(budget.nodes, self._most_nodes)
        if depth < 1 or nodes < 1 or verifier.lag > _MOST_LAG:
            return EMPTY
        with self._shared.trace.span("draft", self._shared.draft.name), torch.no_grad():
            if not self._has_read:
                self._drafter.read(self._ids)
                self._has_read = True
            began = time.perf_counter()
            tree = self._shared.checked(self._drafter.propose(self._ids, replace(budget, nodes=nodes, depth=depth)))
            seconds = time.perf_counter() - began + self._learning_s
        tree = verifier.shaped(tree.within(depth)).best(nodes)
        self._shared.rule.count_draft(tree, seconds)
        return self._shared.rule.fit(tree, seconds, context, others)

    def _run(self, forward: Forward, inputs: Inputs, rows: int) -> Any:
        """Run a pass, and count its seconds: those of drafts of other texts are not among them."""
        of_all = self._part.await_start(rows)
        began = time.perf_counter()
        measures = self._part.measures
        self._is_running = True
        outputs = forward(**inputs)
        self._is_running = False
        if has_streams(self._shared.device):
            torch.accelerator.synchronize(self._shared.device)
        seconds = time.perf_counter() - began
        self._shared.rule.count_pass(of_all, seconds, len(self._ids), measured=measures)
        return outputs

    def _run_text(self, forward: Forward, inputs: Inputs, new: int) -> Any:
        """Run a pass over text alone, of which the last `new` tokens were not computed before."""
        outputs = self._run(forward, inputs, _rows(inputs))
        self._show_states(range(-new, 0))
        return outputs

    def _leave(self, verified: _Verified, token: int) -> None:
        """The text went on with a token that the last pass did not verify."""
        assert self._verifier is not None  # noqa: S101 - it made the pass
        self._verified = None
        self._verifier.settle(verified.path)
        self._show_states([row - 1 - len(verified.tree) for row in (0, *(1 + node for node in verified.path))])
        verdict = verified.verdict(token)
        self._shared.rule.count_verdict(verdict)
        began = time.perf_counter()
        if verified.tree:
            self._drafter.accepted(verdict)
        self._learning_s = time.perf_counter() - began

    def _check(self, forward: Forward, inputs: Inputs, verifier: Verifier) -> None:
        """Unless this way is proven: record what single passes compute, then try a pass over several tokens."""
        tokens = max(len(self._ids), length_of(inputs, len(self._ids)))
        if tokens < self._shared.findings.proven.get(type(verifier), 0):
            return
        cache = cache_of(inputs)
        if self._trial is None:
            self._trial = Trial(copy_states(cache), inputs, tokens)
        elif self._trial.is_ready:
            now, trial, self._trial = copy_states(cache), self._trial, None
            restore_states(cache, trial.before)
            try:
                reason = self._why_refused(forward, type(verifier), trial)
            finally:
                restore_states(cache, now)
            if reason:
                logger.info("no speculation as a %s: %s", verifier.way, reason)
                self._shared.findings.refused.add(type(verifier))
            else:
                self._shared.findings.proven[type(verifier)] = proven_length(self._shared.traits.config, trial.tokens)

    def _why_refused(self, forward: Forward, way: type[Verifier], trial: Trial) -> str:
        """Run the pass of a trial. Empty if its numbers are those of single passes."""
        refused = {*self._shared.findings.refused, *({TreeVerifier} if way is ChainVerifier else ())}
        verifier, reason = verifier_for(trial.inputs, self._shared.traits, refused)
        if verifier is None:
            return reason
        tree = verifier.shaped(trial.tree())
        try:
            logits = forward(**verifier.inputs(dict(trial.inputs), tree))["logits"]
        except RabbitError:
            raise
        except _RAISED_BY_FORWARDS as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return "" if trial.agrees(tree, logits[0, -1 - len(tree) :]) else "it computes other numbers than with one token a pass"


@dataclass(slots=True)
class _Verified:
    """The last pass, over the text's last token of then and a tree, and how far the text has followed it."""

    tree: Tree
    outputs: Any
    path: list[int] = field(default_factory=list)

    @property
    def at(self) -> int:
        return self.path[-1] if self.path else ROOT

    def follow(self, token: int) -> bool:
        """Go on with the text's next token; False if it was not verified."""
        child = self.tree.child(self.at, token)
        if child is not None:
            self.path.append(child)
        return child is not None

    def row(self) -> Any:
        """The output for the text so far, as of a pass over one token."""
        return output_row(self.outputs, self.at - ROOT, 1 + len(self.tree))

    def verdict(self, token: int) -> Verdict:
        logits = self.outputs["logits"][0, -1 - len(self.tree) :]
        return Verdict(self.tree, tuple(self.path), logits, token)


def _rows(inputs: Inputs) -> int:
    """The number of tokens in a pass."""
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return 1 if given is None else int(given.shape[1])
