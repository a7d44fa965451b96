"""Questions to SmolLM2, its answers to each alone, and texts that it is made to write."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2+2?", "Who wrote Hamlet?")


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def encoded(model: Any, text: str) -> torch.Tensor:
    """int64 [1, tokens]: a chat that asks this."""
    found = model.tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return found["input_ids"]


_ANSWERS: WeakKeyDictionary[Any, dict[tuple[int, ...], str]] = WeakKeyDictionary()
"""What each model said to greedy questions, by their ids."""


def alone(model: Any, text: str, **keywords: Any) -> str:
    """The answer of `generate`; a greedy one is computed once for all tests of a process."""
    ids = encoded(model, text)
    if keywords:
        return _answered(model, ids, **keywords)
    known, key = _ANSWERS.setdefault(model, {}), tuple(ids[0].tolist())
    if key not in known:
        known[key] = _answered(model, ids)
    return known[key]


def _answered(model: Any, ids: torch.Tensor, **keywords: Any) -> str:
    tokens = model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, **keywords})[0, ids.shape[1] :]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True))


def saying(model: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the model write a text token by token, and again whenever the list that is returned is cleared. The head, which has
    no say in it, is not computed."""
    lighten(model, monkeypatch)
    tokens = [*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id]
    sent: list[int] = []

    def say(states: torch.Tensor) -> torch.Tensor:
        logits = states.new_zeros(*states.shape[:-1], model.config.vocab_size)
        logits[..., tokens[min(len(sent), len(tokens) - 1)]] = 1e4
        sent.append(1)
        return logits

    monkeypatch.setattr(model.lm_head, "forward", say)
    return sent


def lighten(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the layers' MLPs, three quarters of the work, where it does not matter what the model would say."""
    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp, "forward", torch.zeros_like)
