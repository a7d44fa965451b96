"""The position limit of converted models, past which they differ from their family's code: answers end there."""

from __future__ import annotations

import logging
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.errors import TextTooLongError
from rabbit_engine.transformers_bridge.generation import Asked
from rabbit_engine.transformers_bridge.rotary import on_positions

logger = logging.getLogger(__name__)

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def stated_positions(config: PretrainedConfig) -> int | None:
    """The number of positions of the config's text model, or None if the config does not state it."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in _POSITIONS]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)


def capped_length(positions: int, prompt_tokens: int, asked: Asked) -> dict[str, int]:
    """The keywords that end an answer at `positions`; empty if it ends earlier anyway.

    Padding counts as part of the prompt: in a padded batch, short prompts end with the longest. `asked` tells the settings of
    the call.
    """
    left = max(1, positions - prompt_tokens)  # the token after a prompt that fills all positions is still correct
    new = asked("max_new_tokens")
    if new is None:
        length = asked("max_length")
        wanted = None if length is None else length - prompt_tokens
    else:
        wanted = new
    if wanted is not None and wanted <= left:
        return {}
    if wanted is not None:
        logger.warning("the answer ends at %d tokens: this model is exact only up to there", positions)
    return {"max_new_tokens": left} if new is not None else {"max_length": prompt_tokens + left}


def refuse_past(model: PreTrainedModel, architecture: Architecture) -> None:
    """Make `model` raise TextTooLongError, before its first layer, for a position past the architecture's limit."""
    if architecture.positions is not None:
        on_positions(model, partial(_check, architecture))


def _check(architecture: Architecture, position_ids: torch.Tensor) -> None:
    last = int(position_ids.max())
    if architecture.positions is not None and last >= architecture.positions:
        raise TextTooLongError(
            f"the text has {last + 1} tokens, but {architecture.family} is exact only up to {architecture.positions}: "
            f"{architecture.positions_reason}; shorten it, or use a newer model"
        )
