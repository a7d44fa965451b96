"""Texts as a forward takes them: grouped by length, and padded on the right if their lengths differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

_LEAST_FILLED = 0.8
"""The fraction of a padded batch's longest text that its shortest must have."""

_MOST_TEXTS = 64


@dataclass(frozen=True, slots=True)
class Inputs:
    """A text for a forward: `input_ids` and whatever else its tokenizer gives, each [tokens]."""

    fields: Mapping[str, Sequence[int]]

    @property
    def ids(self) -> Sequence[int]:
        """Its token ids."""
        return self.fields["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one forward: int64 [texts, tokens] each; `attention_mask` is 1 for a token and 0 for padding."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def mask(self) -> torch.Tensor:
        """int64 [texts, tokens]."""
        return self.tensors["attention_mask"]

    def arguments(self, forward: Callable[..., object]) -> dict[str, torch.Tensor]:
        """Those of its tensors that a forward takes."""
        names = inspect.signature(forward).parameters
        return {name: tensor for name, tensor in self.tensors.items() if name in names}


def collate(texts: Sequence[Inputs], device: torch.device, padding: int = 0) -> Batch:
    """A batch of texts, padded on the right with token `padding`: positions count from each text's first token."""
    longest = max(map(len, texts))

    def padded(name: str, value: int) -> torch.Tensor:
        rows = [[*text.fields[name], *[value] * (longest - len(text))] for text in texts]
        return torch.tensor(rows, dtype=torch.long, device=device)

    names = [name for name, values in texts[0].fields.items() if name != "attention_mask" and len(values) == len(texts[0])]
    mask = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
    tensors = {name: padded(name, padding if name == "input_ids" else 0) for name in names}
    return Batch({**tensors, "attention_mask": torch.tensor(mask, dtype=torch.long, device=device)})


def group(lengths: Sequence[int], fits: Callable[[int, int], bool] | None) -> list[list[int]]:
    """Indices of the texts of each forward, the longest first.

    One each, or, with `fits(texts, longest)`, as many of about the same length as fit.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        last = groups[-1] if groups else []
        longest = lengths[last[0]] if last else 0
        joins = fits is not None and 0 < len(last) < _MOST_TEXTS and lengths[index] >= _LEAST_FILLED * longest
        if joins and fits is not None and fits(len(last) + 1, longest):
            last.append(index)
        else:
            groups.append([index])
    return groups


def can_pad(config: PretrainedConfig) -> bool:
    """Whether texts of a batch may be padded on the right: heads that find a text's last token need its padding token, and
    those that take the last position never find it."""
    text = config.get_text_config()
    return getattr(text, "pad_token_id", None) is not None and getattr(text, "summary_type", "first") != "last"
