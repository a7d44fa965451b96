"""Long texts of tiny models: prompts, answers with their scores, and the caches in tiers that `generate` makes for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rabbit_engine.model import mixin, tiered_caches
from rabbit_engine.planning import texts
from rabbit_engine.planning.demand import Demand
from rabbit_engine.streaming import BlockHome
from rabbit_engine.transformers_bridge.tiered import TieredCache, growing_indices

BLOCK = 4


@contextmanager
def made_caches(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[list[TieredCache]]:
    """The caches in tiers that `generate` makes meanwhile, small blocks in `folder`."""
    found: list[TieredCache] = []
    make = tiered_caches.make_cache

    def noted(*args: Any) -> Any:
        cache = make(*args)
        if cache is not None:
            found.append(cache)
        return cache

    monkeypatch.setattr(tiered_caches, "BlockHome", partial(BlockHome, block_tokens=BLOCK))
    monkeypatch.setattr(tiered_caches, "PIECE_TOKENS", 3 * BLOCK)
    monkeypatch.setattr(texts, "cache_folder", lambda: folder)
    monkeypatch.setattr(mixin, "make_cache", noted)
    yield found
    for cache in found:
        cache.text.close()


def have_all_in_tiers(monkeypatch: pytest.MonkeyPatch, *, pieces: bool = False) -> None:
    """Let every text of `generate` have all layers that can be in tiers there, in `pieces` where the class can attend so."""
    admit = mixin.admitted

    def admitted(runtime: Any, ids: Any, given: Any, asked: Any) -> Demand:
        layers = DynamicCache(config=runtime.architecture.config.get_text_config()).layers
        count = len(growing_indices(layers)) if tiered_caches.may_tier(given, asked) else 0
        ways = tiered_caches.ways_of(runtime, parts=False, tiers=count > 0)
        return replace(admit(runtime, ids, given, asked), tiered=count, pieces=pieces and ways.pieces)

    monkeypatch.setattr(mixin, "admitted", admitted)


def prompt(tokens: int = 41, sequences: int = 1) -> torch.Tensor:
    """int64 [sequences, tokens]."""
    return torch.randint(5, 90, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def answer(model: Any, ids: torch.Tensor, **keywords: Any) -> Any:
    """What `generate` returns, with its scores."""
    torch.manual_seed(3)
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    return model.generate(ids, **(settings | keywords))
