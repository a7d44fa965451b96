"""Models whose layers are divided among several devices: the answers of transformers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import smallest
from long_texts import answer, prompt

from rabbit_engine.model.auto import read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.stages import LocalStage, Opened, load_in_stages
from rabbit_engine.streaming.stages import runner

Staged = Callable[..., Any]


@pytest.fixture
def staged() -> Iterator[Staged]:
    """A model whose layers from the second on are two stages, all in the smallest budget that the whole model runs in."""
    models: list[Any] = []

    def load(folder: Path, bounds: tuple[int, ...] | None = None, **keywords: Any) -> Any:
        settings = read_settings({"device": "cpu", "max_memory": smallest(folder), **keywords})

        def open_stages(partition: Any, _: Any) -> Opened:
            layers = len(partition.layout.layers)
            cuts = bounds or (1, (layers + 1) // 2 if layers > 3 else 2, layers)
            ranges = [range(first, stop) for first, stop in itertools.pairwise(cuts) if stop > first]
            return Opened([LocalStage(folder, settings, each) for each in ranges])

        models.append(load_in_stages(folder, settings, open_stages))
        return models[-1]

    yield load
    for model in models:
        model.close()


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.MORE])
def test_families(checkpoint: Any, staged: Staged, plain: Any, family: str) -> None:
    folder = checkpoint(family)
    model = staged(folder)
    found, expected = (answer(one, prompt(19)) for one in (model, plain(folder)))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.scores, expected.scores, strict=True))
    stages = runtime_of(model).assembly.stages
    assert all(stage.model.profile.passes >= 2 for stage in stages)


def test_texts_that_come_soon_after_share_a_pass(checkpoint: Any, staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that reads weights waits for them; the first pass tells it for how long."""
    monkeypatch.setattr(runner, "_LINGER", 1e9)
    model = staged(checkpoint("gemma3"), (1, 7))
    answer(model, prompt(5), max_new_tokens=2)
    stage = runtime_of(model).assembly.stages[0]
    requests: list[Any] = []
    monkeypatch.setattr(stage, "submit", lambda request: requests.append(request) or stage._runner.submit(request))
    answer(model, prompt(5), max_new_tokens=1, use_cache=False)
    passes = stage.model.profile.passes
    futures = []
    for _ in range(2):
        futures.append(stage._runner.submit(requests[0]))
        time.sleep(0.05)
    assert all(future.result() is not None for future in futures)
    assert stage.model.profile.passes == passes + 1
