"""Where a converted model stops computing what its family's own code computes: there it ends its answer, or refuses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.errors import TextTooLongError
from rabbit_engine.transformers_bridge.rotary import on_positions

logger = logging.getLogger(__name__)

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def stated_positions(config: PretrainedConfig) -> int | None:
    """How many positions the config says its text model has; None where it says nothing of them."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _POSITIONS]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)


def capped_length(positions: int, prompt_tokens: int, given: Mapping[str, Any], config: GenerationConfig) -> dict[str, int]:
    """The keywords that end an answer behind a prompt at `positions`; empty where it ends before that anyway.

    Padding counts as a part of the prompt: of a padded batch the short prompts end with the longest. `given` are the
    caller's keywords, `config` what holds where they say nothing.
    """
    left = max(1, positions - prompt_tokens)  # a prompt that fills them all has its next token computed right
    new = given.get("max_new_tokens", config.max_new_tokens)
    if new is None:
        length = given.get("max_length", config.max_length)
        wanted = None if length is None else length - prompt_tokens
    else:
        wanted = new
    if wanted is not None and wanted <= left:
        return {}
    if wanted is not None:
        logger.warning("the answer ends at %d tokens: this model's text is right up to there only", positions)
    return {"max_new_tokens": left} if new is not None else {"max_length": prompt_tokens + left}


def refuse_past(model: PreTrainedModel, architecture: Architecture) -> None:
    """Have `model` raise TextTooLongError, before its first layer, for a position that it would compute differently."""
    if architecture.positions is not None:
        on_positions(model, partial(_check, architecture))


def _check(architecture: Architecture, position_ids: torch.Tensor) -> None:
    last = int(position_ids.max())
    if architecture.positions is not None and last >= architecture.positions:
        raise TextTooLongError(
            f"a text of {last + 1} tokens, and {architecture.family} is computed right up to {architecture.positions}: "
            f"{architecture.positions_reason}; shorten it, or take a newer model"
        )
