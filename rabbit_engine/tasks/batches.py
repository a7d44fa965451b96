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
    """A text for a forward: `input_ids` and whatever else its tokenizer gives, each [tokens].

    The logits over the vocabulary of its last `logits` positions are needed; `targets` are the tokens that follow these.
    Pooling leaves out its first `skipped` tokens.
    """

    fields: Mapping[str, Sequence[int]]
    logits: int = 0
    targets: tuple[int, ...] = ()
    skipped: int = 0

    @property
    def ids(self) -> Sequence[int]:
        """Its token ids."""
        return self.fields["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts of one forward: int64 [texts, tokens] each; `attention_mask` is 1 for a token and 0 for padding."""

    texts: Sequence[Inputs]
    tensors: Mapping[str, torch.Tensor]

    @property
    def mask(self) -> torch.Tensor:
        """int64 [texts, tokens]."""
        return self.tensors["attention_mask"]

    @property
    def pooled(self) -> torch.Tensor:
        """int64 [texts, tokens]: 1 for a token that pooling counts."""
        first = torch.tensor([[text.skipped] for text in self.texts], device=self.mask.device)
        return self.mask * (torch.arange(self.mask.shape[1], device=self.mask.device) >= first)

    @property
    def logits(self) -> int:
        """The number of last positions that contain all whose logits are needed."""
        return logits_rows(self.texts)

    def rows(self, logits: torch.Tensor) -> list[torch.Tensor]:
        """The needed rows [its own `logits`, vocabulary] of each text, of logits [texts, last positions or all, vocabulary]."""
        longest, ends = max(map(len, self.texts)), logits.shape[1]
        found = []
        for text, own in zip(self.texts, logits, strict=True):
            end = ends - (longest - len(text))
            found.append(own[end - text.logits : end])
        return found

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
    return Batch(texts, {**tensors, "attention_mask": torch.tensor(mask, dtype=torch.long, device=device)})


def logits_rows(texts: Sequence[Inputs]) -> int:
    """The number of last positions of a padded batch that contain all whose logits are needed."""
    longest = max(map(len, texts))
    return max((longest - len(text) + text.logits for text in texts if text.logits), default=0)


def group(texts: Sequence[Inputs], fits: Callable[[Sequence[Inputs]], bool] | None) -> list[list[int]]:
    """Indices of the texts of each forward, the longest first.

    One each, or, with `fits(texts)`, as many of about the same length as fit.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        last = groups[-1] if groups else []
        joins = fits is not None and 0 < len(last) < _MOST_TEXTS and len(texts[index]) >= _LEAST_FILLED * len(texts[last[0]])
        if joins and fits is not None and fits([texts[other] for other in (*last, index)]):
            last.append(index)
        else:
            groups.append([index])
    return groups


def can_pad(config: PretrainedConfig) -> bool:
    """Whether texts of a batch may be padded on the right: heads that find a text's last token need its padding token, and
    those that take the last position never find it."""
    text = config.get_text_config()
    return getattr(text, "pad_token_id", None) is not None and getattr(text, "summary_type", "first") != "last"
