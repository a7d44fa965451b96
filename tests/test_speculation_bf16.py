"""In 16 bits passes of other sizes round otherwise; streaming adds nothing to that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guessing import Guided
from transformers import PreTrainedModel

from rabbit_engine.model.speculating import findings_of

RETURNED = {"max_new_tokens": 24, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
FAMILIES = {"llama": "tree", "gemma3": "tree", "qwen3_moe": "tree", "deepseek_v3": "tree", "mpt": "chain", "qwen3_next": "carry"}


def answer(model: PreTrainedModel, ids: torch.Tensor, **keywords: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **RETURNED, **keywords)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "temperature": 0.9}], ids=["greedy", "drawn"])
def test_streamed_bf16_is_the_model_in_memory_bit_for_bit_with_the_same_guesses(
    family: str, how: dict[str, Any], checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    folder = checkpoint(family)
    models = streamed(folder, dtype="bfloat16"), streamed(folder, dtype="bfloat16", max_memory={"cpu": "1GiB"})
    assert models[0].plan.streamed
    assert not models[1].plan.streamed
    text = answer(models[1], ids, **how).sequences[0].tolist()
    drafts = [Guided(text, branches=2), Guided(text, branches=2)]
    found, expected = (answer(model, ids, speculate=draft, **how) for model, draft in zip(models, drafts, strict=True))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(*step) for step in zip(found.logits, expected.logits, strict=True))
    assert [verdict.path for verdict in drafts[0].verdicts] == [verdict.path for verdict in drafts[1].verdicts]
    assert any(verdict.path for verdict in drafts[0].verdicts)
    assert findings_of(models[0]).used == FAMILIES[family]
