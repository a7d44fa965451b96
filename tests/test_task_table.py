"""Every row of COMPATIBILITY.md's table of tasks, run. `--record-tasks FILE` writes what was seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_matrix import split_is_whole
from test_tasks import CLASSES, IDS, differing, own, save

import rabbit_engine
from rabbit_engine import AutoModel, capabilities
from rabbit_engine.model.runtime import runtime_of

STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def outputs_are_equal(model: Any, plain: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Every tensor that the class returns, twice: what one pass leaves behind does not reach the next."""
    for _ in range(2):
        with torch.no_grad():
            found, expected = model(**inputs), plain(**inputs)
        assert found.keys() == expected.keys()
        assert differing(found, expected) == []
    return f"equal: {next(name for name, value in expected.items() if isinstance(value, torch.Tensor))}"


def text_is_equal(model: Any, plain: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Greedy tokens and those of three beams."""
    assert model.can_generate() == plain.can_generate()
    if not model.can_generate():
        return "none"
    prompt = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    for mode in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(**prompt, **STEPS, **mode), plain.generate(**prompt, **STEPS, **mode))
    return "equal"


def blocks_of(model: Any) -> str:
    """How many blocks, of all stacks, are read in a pass; a single one that all layers share stays in memory."""
    layout = runtime_of(model).partition.layout
    blocks = [*layout.towers, *layout.layers]
    streamed = [block for block in blocks if any(f"{unit}.".startswith(f"{block}.") for unit in model.plan.streamed)]
    assert len(streamed) == len(blocks) or len(blocks) == 1
    return f"{len(streamed)} of {len(blocks)}"


@pytest.mark.parametrize(("cls", "config", "sizes", "inputs"), CLASSES, ids=[row[0] for row in CLASSES])
def test_class_is_equal_to_transformers(
    cls: str,
    config: str,
    sizes: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    tmp_path: Path,
    streamed: Any,
    record_task: Callable[..., None],
) -> None:
    folder = save(cls, config, sizes, tmp_path / "model")
    plain, told = own(folder, cls), capabilities(folder)
    if plain.config.is_encoder_decoder and cls != "T5EncoderModel":
        inputs = {"decoder_input_ids": IDS[:, :5], **inputs}
    model = streamed(folder)
    assert type(model).__name__ == cls
    with AutoModel.from_pretrained(folder, device="cpu", layer_shards_saving_path=tmp_path / "shards") as from_shards:
        split = split_is_whole(from_shards, plain)
        outputs_are_equal(from_shards, plain, inputs)
    record_task(
        task=told.task,
        loaded_by=told.auto_class if told.auto_class in rabbit_engine.__all__ else "AutoModel",
        runs_as=cls,
        streamed_blocks=blocks_of(model),
        outputs=outputs_are_equal(model, plain, inputs),
        generate=text_is_equal(model, plain, inputs),
        split=split,
    )
