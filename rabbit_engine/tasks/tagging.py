"""Entities in texts, from the logits of a head that labels tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.transformers_bridge.entities import strategies


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled part of a text: characters `start` to `end` of it, None if the tokenizer does not tell.

    `word` is the text of its tokens as the tokenizer decodes them; `index` is that of the token, None for joined tokens.
    """

    label: str
    score: float
    word: str
    start: int | None
    end: int | None
    index: int | None = None


def require_strategy(aggregation: str, *, windows: bool) -> None:
    """Raise ConfigurationError for an unknown way to join tokens, or one that cannot join windows."""
    if aggregation not in strategies():
        raise ConfigurationError(f"aggregation={aggregation!r}: expected one of {', '.join(strategies())}")
    if windows and aggregation == "none":
        raise ConfigurationError('windows overlap, so their entities must be joined: give aggregation="simple", or another')


def entities_of(found: Sequence[Mapping[str, Any]]) -> list[Entity]:
    """Entities from those of transformers' pipeline."""
    return [
        Entity(
            each.get("entity_group") or each["entity"],
            float(each["score"]),
            each["word"],
            each["start"],
            each["end"],
            each.get("index"),
        )
        for each in found
    ]
