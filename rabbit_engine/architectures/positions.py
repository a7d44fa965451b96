"""Where a converted model stops computing what its family's own code computes: there it ends its answer, or refuses."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.errors import TextTooLongError

logger = logging.getLogger(__name__)


class EndOfPositions(StoppingCriteria):
    """Ends an answer whose next token would stand past the last position that is computed right."""

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """bool [batch]: all of it, once `input_ids` [batch, tokens] is that long."""
        del scores
        full = input_ids.shape[1] >= self.positions
        if full:
            logger.warning("the answer ends here: this model's text is right up to %d tokens only", self.positions)
        return torch.full((input_ids.shape[0],), full, dtype=torch.bool, device=input_ids.device)


def refuse_past(model: PreTrainedModel, architecture: Architecture) -> None:
    """Have `model` raise TextTooLongError, before its first layer, for a position that it would compute differently."""
    if architecture.positions is not None:
        rotary: Any = model.base_model.rotary_emb
        rotary.register_forward_pre_hook(partial(_check, architecture), with_kwargs=True)


def _check(architecture: Architecture, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
    last = int(position_ids.max())
    if architecture.positions is not None and last >= architecture.positions:
        raise TextTooLongError(
            f"a text of {last + 1} tokens, and {architecture.family} is computed right up to {architecture.positions}: "
            f"{architecture.positions_reason}; shorten it, or take a newer model"
        )
