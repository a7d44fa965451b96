"""Tiny models of tasks with a tokenizer of words, in a session and as transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_tasks import own, save
from tiny import pieces_of_words

TEXTS = ["w5 w6 w7", "w9", "w10 w11 w12 w13 w14 w15 w16", "w20 w21 w22", "w30 w31 w32 w33 w34", "w40 w41", "w50 w51 w52 w53"]
LONG = " ".join(f"w{5 + index % 80}" for index in range(60))


def encoded(*texts: str, **given: Any) -> dict[str, torch.Tensor]:
    """A text or a pair as a model takes it, [1, tokens]."""
    found = pieces_of_words(96)(*texts, return_tensors="pt", **given)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def open_both(
    folder: Path, streamed: Any, row: tuple[str, str, dict[str, Any]], files: dict[str, Any] | None = None, tokenizer: Any = None
) -> tuple[Any, Any]:
    """The model of a row `(class, config, sizes)` in the smallest budget, and transformers' own."""
    cls, config, sizes = row
    save(cls, config, sizes, folder)
    (tokenizer or pieces_of_words(96)).save_pretrained(folder)
    for name, content in (files or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return streamed(folder), own(folder, cls)
