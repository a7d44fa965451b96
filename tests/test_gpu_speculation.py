"""On a CUDA device: several tokens a pass give the text of plain decoding there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guessing import Guided
from test_gpu import from_disk
from test_speculation import DRAWN, GREEDY, passes, prompt, seeded

from rabbit_engine import DraftModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3", "mpt", "qwen3_next"])
@pytest.mark.parametrize("how", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_text_is_that_of_plain_decoding_in_fewer_passes(family: str, how: Any, checkpoint: Any, streamed: Any) -> None:
    folder = checkpoint(family)
    model = streamed(folder, device="cuda", dtype="float32", max_memory=from_disk(folder, dtype="float32"))
    expected, plain_passes = passes(model, prompt().cuda(), **how)
    found, fewer = passes(model, prompt().cuda(), speculate=Guided(expected[0].tolist(), branches=2), **how)
    assert torch.equal(found, expected)
    assert fewer < plain_passes - 3


def test_draft_on_the_device_guesses_its_own_text(checkpoint: Any, plain: Any, streamed: Any) -> None:
    folder = checkpoint("llama")
    model = streamed(folder, device="cuda", dtype="float32", max_memory=from_disk(folder, dtype="float32"))
    expected = seeded(model, prompt().cuda(), **GREEDY)
    draft = DraftModel(plain(folder, dtype=torch.float32).cuda(), nodes=8)
    found, fewer = passes(model, prompt().cuda(), speculate=draft, **GREEDY)
    assert torch.equal(found, expected)
    assert fewer < 16
