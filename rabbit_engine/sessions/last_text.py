"""The cache of the text that ended last, for a prompt that begins with its tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import DynamicCache

from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.demand import Demand
from rabbit_engine.transformers_bridge.adapters import has_adapter
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.continuing import cut_to, expect, tells_what_it_has

logger = logging.getLogger(__name__)

LEAST_TOKENS = 64
"""Fewer common tokens are not worth that an answer differs by rounding from that of the whole prompt."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """`cache` has the tokens `ids`, computed with an attention, for a text with this demand."""

    ids: list[int]
    cache: DynamicCache
    attention: str | None
    demand: Demand


class LastText:
    """What was computed for the text that ended last: its prompt, and its answer but for the last token.

    The next prompt takes it: it continues the cache if it begins with at least LEAST_TOKENS of the same tokens, and the memory is
    free otherwise.
    """

    def __init__(self, model: SessionModel) -> None:
        self._model = model
        self._kept: _Kept | None = None

    def put(self, ids: Sequence[int], cache: object, demand: Demand, *, is_whole: bool) -> None:
        """Keep what `cache` has of a text that ended with `ids`, whose last token was not computed. Without `is_whole` the
        answer was interrupted, perhaps amid a pass."""
        self._kept = None
        known = len(ids) - 1
        if not isinstance(cache, DynamicCache) or has_adapter(self._model) or not (is_whole or tells_what_it_has(cache)):
            return
        if cut_to(cache, known) and LEAST_TOKENS <= (tokens := cache.get_seq_length()) <= known:
            self._kept = _Kept(list(ids[:tokens]), cache, attention_of(self._model.config), _kind(demand))

    def take(self, ids: Sequence[int], demand: Demand, stored: int = 0) -> tuple[DynamicCache, int] | None:
        """The cache, cut to the tokens with which `ids` begin, and their number: at least one is left to compute. None, with the
        memory freed, for another text, and if more tokens are `stored` elsewhere."""
        kept, self._kept = self._kept, None
        if kept is None or (kept.demand, kept.attention) != (_kind(demand), attention_of(self._model.config)):
            return None
        common = min(_common(kept.ids, ids), len(ids) - 1)
        if common < max(LEAST_TOKENS, stored) or has_adapter(self._model) or not cut_to(kept.cache, common):
            return None
        expect(kept.cache, len(ids), demand.prompt + demand.answer)
        return kept.cache, common

    def drop(self) -> None:
        """Free the memory."""
        self._kept = None


def continues(model: SessionModel) -> bool:
    """Whether the model continues a text that has ended; a line in the log if not."""
    if not runtime_of(model).partition.computes_parts:
        name = type(model).__name__
        logger.info("no text is continued: %s is not known to continue a cache with several tokens as it computes a text", name)
        return False
    return True


def _kind(demand: Demand) -> Demand:
    """Where the cache of a text lies, and in which form."""
    return replace(demand, prompt=0, answer=0, sequences=1, padded=False, chunk=None, is_computed=False, logits=None, begun=0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many of the same tokens both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))
