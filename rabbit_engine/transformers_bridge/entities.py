"""Entities from the logits of tokens, as transformers' token-classification pipeline finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.pipelines.token_classification import AggregationStrategy, TokenClassificationPipeline


def strategies() -> list[str]:
    """The names of its ways to join tokens: "none", "simple", "first" ..."""
    return [strategy.value for strategy in AggregationStrategy]


class EntityReader:
    """The pipeline's own reading of a model's logits, without its forward."""

    def __init__(self, model: Any, tokenizer: Any, strategy: str, ignored: Sequence[str]) -> None:
        self._pipeline = TokenClassificationPipeline(model=model, tokenizer=tokenizer, device=model.device)
        self._strategy, self._ignored = AggregationStrategy(strategy), list(ignored)

    def read(self, text: str, windows: Sequence[tuple[Mapping[str, Any], torch.Tensor]]) -> list[dict[str, Any]]:
        """Entities of a text: of each window the tokenizer's output, with its mask of special tokens and, of a fast one, its
        offsets, and logits [tokens, labels]."""
        outputs = [
            {
                "sentence": text,
                "input_ids": torch.tensor([found["input_ids"]]),
                "logits": logits[None],
                "special_tokens_mask": torch.tensor([found["special_tokens_mask"]]),
                "offset_mapping": torch.tensor([found["offset_mapping"]]) if "offset_mapping" in found else None,
                "word_ids": None,
                "word_to_chars_map": None,
            }
            for found, logits in windows
        ]
        entities: list[dict[str, Any]] = self._pipeline.postprocess(outputs, self._strategy, self._ignored)
        return entities
