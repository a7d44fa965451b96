"""Texts that a session computes together, against those of a model that computes each alone."""

from __future__ import annotations

from typing import Any

import torch
from tiny import words

from rabbit_engine import Session

_PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def assert_same_texts(model: Any, whole: Any) -> None:
    """Greedy tokens of three texts at once."""
    model.tokenizer = words(96)
    with Session(model) as session:
        replies = session.generate(_PROMPTS, max_new_tokens=5, temperature=0)
    for prompt, reply in zip(_PROMPTS, replies, strict=True):
        tokens = whole.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0, len(prompt) :]
        assert list(reply.tokens) == tokens.tolist()
