"""Questions to SmolLM2, and its answers to each alone."""

from __future__ import annotations

from typing import Any

import torch

QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2+2?", "Who wrote Hamlet?")


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def encoded(model: Any, text: str) -> torch.Tensor:
    """int64 [1, tokens]: a chat that asks this."""
    found = model.tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return found["input_ids"]


def alone(model: Any, text: str, **keywords: Any) -> str:
    """The answer of `generate`."""
    ids = encoded(model, text)
    tokens = model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, **keywords})[0, ids.shape[1] :]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))
