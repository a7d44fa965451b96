"""A checkpoint's own multi-token heads as a draft (DeepSeek-V3 technical report, DeepSeek-AI, 2024, section 2.2).

A head is one block that reads the model's last states and the token after each, and predicts the token after that one. The
first head also guesses on from its own states, as EAGLE does (Li et al., 2024), where a checkpoint has no other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from rabbit_engine.decoding.draft import Allowance, Drafter, Heads, TargetModel, Verdict, check_nodes
from rabbit_engine.decoding.model_drafter import RoundCosts
from rabbit_engine.decoding.search import Search, likeliest
from rabbit_engine.decoding.tree import EMPTY, ROOT, Tree
from rabbit_engine.errors import ConfigurationError, DraftError
from rabbit_engine.transformers_bridge.caches import copy_states, crop, restore_states
from rabbit_engine.transformers_bridge.multi_token import heads_in, new_cache

_CHILDREN = 8
"""Guesses after each token, of which the rule takes those that pay."""


NO_HEADS = "its config names none (num_mtp_layers); take Lookup() or DraftModel(...)"


class MultiTokenHeads:
    """A draft that is the checkpoint's own multi-token heads, streamed as the model is: DeepSeek-V3, GLM-4.5, Mellum and others.

    They take the memory of one layer's buffers. `nodes` fixes the number of guesses in each tree; None measures how many pay.
    Guesses are weighed by the heads' probabilities at `temperature`.
    """

    name = "multi-token heads"

    def __init__(self, *, nodes: int | None = None, temperature: float = 1.0) -> None:
        check_nodes(nodes)
        if not temperature > 0:
            raise ConfigurationError(f"temperature={temperature!r} is not a number above 0")
        self.nodes, self._temperature = nodes, temperature
        self._lock = threading.Lock()
        self._target: str | None = None
        self._heads: Heads | None = None
        self._costs = RoundCosts()

    @property
    def nbytes(self) -> int:
        """See `Draft`; 0 until it is attached."""
        return 0 if self._heads is None else self._heads.nbytes

    def attach(self, target: TargetModel) -> None:
        """Set the heads streaming. Raises DraftError for a checkpoint without any, or whose files must be split for them."""
        with self._lock:
            if self._heads is not None and self._target == target.name_or_path and not self._heads.is_closed:
                return
            if not heads_in(target.config):
                raise DraftError(f"{target.name_or_path} has no multi-token heads: {NO_HEADS}")
            self._heads, self._target = target.load_heads(), target.name_or_path

    def start(self) -> Drafter:
        """See `Draft`. Raises DraftError before `attach`."""
        if self._heads is None:
            raise DraftError(f"the {self.name} are not attached to a model: pass them as speculate=")
        if self._heads.is_closed:
            raise DraftError(f"the {self.name} were closed, with the model they belong to: give this one a draft of its own")
        return HeadsDrafter(self._heads, self._costs, self._temperature)


class HeadsDrafter:
    """Guesses for one text: a line of the likeliest tokens, with other likely ones after each of them.

    The first head reads the model's state after each token with the next token; each further one reads the states of the head
    before it, one token on. Of the last rows that all heads but the first have read, the tokens were guesses: they are read
    again once the text has them.
    """

    def __init__(self, heads: Heads, costs: RoundCosts, temperature: float) -> None:
        self._heads, self._costs, self._temperature = heads, costs, temperature
        self._cache = new_cache(heads.config)
        self._unread: list[torch.Tensor] = []
        """States [tokens, width], up to the one after the text's last token but one."""

    def see(self, states: torch.Tensor) -> None:
        """See `StatesReader`."""
        self._unread.append(states)

    def read(self, ids: Sequence[int]) -> None:
        """See `Drafter`. The last state is left for the first guess."""
        states = self._take()
        if len(states) > 1:
            self._guess(ids[:-1], states[:-1], Search(1, 1), 0.0)
        self.see(states[-1:])

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        """See `Drafter`."""
        states = self._take()
        if budget.nodes < 1 or budget.depth < 1 or not len(states):
            self.see(states)
            return EMPTY
        search = Search(budget.nodes, budget.depth)
        self._guess(ids, states, search, budget.token_s)
        return search.tree()

    def accepted(self, verdict: Verdict) -> None:
        """See `Drafter`: the states say what was accepted."""

    def close(self) -> None:
        """See `Drafter`: its cache goes with it."""

    def _take(self) -> torch.Tensor:
        states = torch.cat(self._unread) if self._unread else torch.empty(0, 0)
        self._unread = []
        return states

    def _guess(self, ids: Sequence[int], states: torch.Tensor, search: Search, token_s: float) -> None:
        """Read `states`, which end one token before `ids` do, and guess what follows."""
        count = self._heads.count
        tokens, start, own = list(ids[-len(states) :]), len(ids) - len(states), states
        at: int | None = ROOT
        for depth in range(count):
            logits, own = self._heads(tokens, own, self._cache, start + depth, depth)
            token, at = self._add(search, at, logits)
            tokens = [*tokens[1:], token]
        if count > 1:
            again = min(count - 1, len(states))
            crop(self._cache, again)
            self._unread = [states[-again:]]
        else:
            crop(self._cache, 0)  # sliding layers kept what they no longer see
            self._guess_on(search, at, own, len(ids), token_s)

    def _guess_on(self, search: Search, at: int | None, states: torch.Tensor, position: int, token_s: float) -> None:
        """Let the only head guess on from its own states, as long as another guess pays."""
        before = copy_states(self._cache)
        while at is not None and search.is_open_to_more(at) and self._costs.pays(search.probability(at), token_s):
            began, expected, likely = time.perf_counter(), search.expected(), search.probability(at)
            logits, states = self._heads([search.token(at)], states[-1:], self._cache, position, 0)
            at, position = self._add(search, at, logits)[1], position + 1
            self._costs.count(likely, search.expected() - expected, time.perf_counter() - began)
        restore_states(self._cache, before)

    def _add(self, search: Search, at: int | None, logits: torch.Tensor) -> tuple[int, int | None]:
        """Add what is likely after a node; returns the likeliest token and its node, None if it is too unlikely."""
        (tokens,), (logs,) = likeliest(logits, _CHILDREN, self._temperature)
        if at is not None:
            search.add(at, tokens, logs)
        return tokens[0], None if at is None else search.child(at, tokens[0])
