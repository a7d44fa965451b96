"""Whether two models have the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from rabbit_engine.errors import DraftError

logger = logging.getLogger(__name__)

_SHOWN = 4
"""Differing tokens that an error shows."""

_PADDING = 512
"""The most by which the sizes of equal vocabularies differ: each model pads its own to a round number."""


@runtime_checkable
class Vocabulary(Protocol):
    """The part of a tokenizer that says which tokens there are."""

    def get_vocab(self) -> Mapping[str, int]:
        """The id of each token."""

    def get_added_vocab(self) -> Mapping[str, int]:
        """The id of each token that text is not made of: special ones."""


def require_same_tokens(draft: Vocabulary, target: Vocabulary, draft_name: str, target_name: str) -> None:
    """Raise DraftError if an id that both have is another token in each.

    Differing special tokens are allowed: models of one family name their reserved ones differently.
    """
    ours, theirs = _by_id(draft.get_vocab()), _by_id(target.get_vocab())
    common = ours.keys() & theirs.keys()
    differing = sorted(number for number in common if ours[number] != theirs[number])
    special = {*draft.get_added_vocab().values()} & {*target.get_added_vocab().values()}
    serious = [number for number in differing if number not in special]
    if serious:
        listed = "; ".join(f"{number} is {ours[number]!r}, not {theirs[number]!r}" for number in serious[:_SHOWN])
        more = " ..." if len(serious) > _SHOWN else ""
        raise DraftError(
            f"{draft_name} has another tokenizer than {target_name}: {len(serious)} of {len(common)} tokens differ "
            f"({listed}{more}); take a smaller model of the same family, or speculate=SelfDraft()"
        )
    if differing:
        logger.info("%d special tokens of %s have other names in %s", len(differing), draft_name, target_name)


def require_similar_size(draft: int, target: int, draft_name: str, target_name: str) -> None:
    """Raise DraftError if two vocabularies, of which only the sizes are known, cannot be the same."""
    if abs(draft - target) > _PADDING:
        raise DraftError(
            f"{draft_name} has {draft} tokens, {target_name} has {target}: they need the same tokenizer; "
            "take a smaller model of the same family, or speculate=SelfDraft()"
        )


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    return {number: token for token, number in vocabulary.items()}
