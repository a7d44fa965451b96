"""Every row of COMPATIBILITY.md's table, run. `--record FILE` writes what was seen, which the table is made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import matrix
import pytest
import torch
from families import IMAGE_TEXT
from guessing import Guided
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, HeliumConfig, HeliumForCausalLM

from rabbit_engine.architectures import KNOWN
from rabbit_engine.checkpoints.shards import read_entries, verify_shard
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.speculating import findings_of
from rabbit_engine.storage.tensorfiles import read_tensor
from rabbit_engine.transformers_bridge.experts import has_experts_interface
from rabbit_engine.transformers_bridge.faults import fix_known_bugs

STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
LONGER = {"max_new_tokens": 20, "min_new_tokens": 20, "pad_token_id": 0}
GUESSED = (
    {**LONGER, "do_sample": False},
    {**LONGER, "do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 0.95},
)
ROUNDING = 5e-5
"""Differences in logits that other numbers of rows explain. A forgotten state of a tiny model is more, but changes no token."""
Record = Callable[..., None]


def oracle(folder: Path, image: bool = False) -> Any:
    """transformers' own load, its weights in their own memory (see conftest's `plain`)."""
    auto = AutoModelForImageTextToText if image else AutoModelForCausalLM
    model = auto.from_pretrained(folder).eval()
    fix_known_bugs(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def split_is_whole(model: Any, plain: Any) -> str:
    """Every shard verifies and holds transformers' own weights."""
    prepared = runtime_of(model).checkpoint
    for shard in prepared.manifest.shards:
        verify_shard(prepared.folder, shard)
    state = plain.state_dict()
    for name, entry in read_entries(prepared.folder, prepared.manifest).items():
        assert torch.equal(read_tensor(entry), state[name]), name
    return "equal"


def logits_are_equal(model: Any, plain: Any, inputs: dict[str, torch.Tensor]) -> str:
    with torch.no_grad():
        got, expected = model(**inputs).logits, plain(**inputs).logits
    assert torch.equal(got, expected), (got - expected).abs().max()
    return "equal"


def tokens_are_equal(model: Any, plain: Any, inputs: dict[str, torch.Tensor], **mode: Any) -> str:
    got, expected = (each.generate(**inputs, **{**STEPS, **mode}) for each in (model, plain))
    assert torch.equal(got, expected), mode
    return "equal"


def cache_is_filled(model: Any, plain: Any, inputs: dict[str, torch.Tensor]) -> str:
    """Greedy tokens are equal, and after the prompt each pass takes one token."""
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        result = tokens_are_equal(model, plain, inputs)
    finally:
        hook.remove()
    assert set(lengths[1:]) == {1}, lengths
    return result


def beam_over_images(model: Any, plain: Any, inputs: dict[str, torch.Tensor]) -> str:
    try:
        plain.generate(**inputs, **STEPS, num_beams=3)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).split(",")[0]):
            model.generate(**inputs, **STEPS, num_beams=3)
        return "not in transformers"
    return tokens_are_equal(model, plain, inputs, num_beams=3)


def is_assisted(model: Any, plain: Any, inputs: dict[str, torch.Tensor], assistant: Any, stateful: bool) -> str:
    if stateful:
        with pytest.raises(ValueError, match=r"stateful|not supported"):
            plain.generate(**inputs, **STEPS, assistant_model=assistant)
        return "not in transformers"
    return tokens_are_equal(model, plain, inputs, assistant_model=assistant)


def experts_of(model: Any) -> str:
    """Whether the experts are read as they are routed to; that of a class with the interface they are is asserted."""
    routed = [name for name, module in model.named_modules() if has_experts_interface(module)]
    assert routed == [layer.name for layer in model.plan.experts.layers]
    if routed:
        assert all(layer.bytes_read > 0 for layer in model.profile.experts.values())
        return "on demand"
    return "whole" if runtime_of(model).partition.whole_experts else "none"


def speculation_of(model: Any, inputs: dict[str, torch.Tensor]) -> str:
    """How guesses are verified, which trials find out: the text is that of plain decoding, from fewer passes unless "plain"."""
    findings = findings_of(model)
    findings.proven.clear()
    findings.refused.clear()
    findings.plain = ""
    for mode in GUESSED:
        expected, passes = drawn(model, inputs, **mode)
        draft = Guided(expected.sequences[0].tolist(), branches=2)
        found, fewer = drawn(model, inputs, **mode, speculate=draft)
        assert torch.equal(found.sequences, expected.sequences), (findings, mode)
        assert largest_difference(found.logits, expected.logits) < ROUNDING, findings
        assert findings.used.startswith("plain: ") or fewer < passes, findings
    return findings.used


def drawn(model: Any, inputs: dict[str, torch.Tensor], **mode: Any) -> tuple[Any, int]:
    """The text of a seed with its logits, and the passes that it took."""
    before = model.profile.passes
    torch.manual_seed(3)
    text = model.generate(**inputs, **mode, return_dict_in_generate=True, output_logits=True)
    return text, model.profile.passes - before


def largest_difference(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Of the logits after each token, in standard deviations."""
    both = torch.stack(found), torch.stack(expected)
    return float((both[0] - both[1]).abs().max() / both[1].std())


@pytest.mark.parametrize("row", matrix.NATIVE, ids=lambda row: row.models)
def test_family_is_equal_to_transformers(
    row: matrix.Row, tmp_path: Path, checkpoint: Any, streamed: Any, ids: Any, padded: Any, record: Record
) -> None:
    folder = checkpoint(row.family)
    plain = oracle(folder)
    model = streamed(folder, layer_shards_saving_path=tmp_path)
    assert runtime_of(model).architecture.cls.__name__ == row.cls == type(plain).__name__
    assert len(model.plan.streamed) > 2, model.plan
    prompt = {"input_ids": ids}
    record(
        row.models,
        row.cls,
        runs_as=row.cls,
        oracle="transformers",
        split=split_is_whole(model, plain),
        logits=logits_are_equal(model, plain, prompt),
        cache=cache_is_filled(model, plain, prompt),
        batch=tokens_are_equal(model, plain, padded),
        beam=tokens_are_equal(model, plain, prompt, num_beams=3),
        assisted=is_assisted(model, plain, prompt, oracle(checkpoint("llama")), row.family in families.STATEFUL),
        experts=experts_of(model),
        speculation=speculation_of(model, prompt),
        tokenizer="transformers",
    )


@pytest.mark.parametrize("row", matrix.IMAGE_TEXT, ids=lambda row: row.models)
def test_image_text_family_is_equal_to_transformers(
    row: matrix.Row, tmp_path: Path, checkpoint: Any, streamed: Any, padded: Any, record: Record
) -> None:
    folder = checkpoint(row.family)
    plain = oracle(folder, image=True)
    model = streamed(folder, layer_shards_saving_path=tmp_path)
    assert type(model).__name__ == row.cls
    tower = [name for name in model.plan.streamed if "vis" in name]
    assert len(tower) >= 2, "the vision tower's blocks are streamed in the smallest budget"
    prompt = families.picture(row.family)
    result = {
        "split": split_is_whole(model, plain),
        "logits": logits_are_equal(model, plain, prompt),
        "cache": tokens_are_equal(model, plain, prompt),
        "batch": tokens_are_equal(model, plain, padded),
        "beam": beam_over_images(model, plain, prompt),
        "experts": experts_of(model),
        "speculation": speculation_of(model, prompt),
    }
    text = {"input_ids": prompt["input_ids"][:, :5]}
    reads = [unit.loads for name, unit in model.profile.units.items() if name in tower]
    logits_are_equal(model, plain, text)
    assert [unit.loads for name, unit in model.profile.units.items() if name in tower] == reads, "text reads no tower"
    record(row.models, row.cls, runs_as=row.cls, oracle="transformers", **result, assisted="not run", tokenizer="transformers")


def test_image_text_models_stay_equal_as_the_budget_grows(checkpoint: Any, streamed: Any) -> None:
    folder = checkpoint("qwen2_5_vl")
    plain, prompt = oracle(folder, image=True), families.picture("qwen2_5_vl")
    smallest = streamed(folder).plan
    seen = set()
    for budget in range(
        smallest.budget.device_bytes, smallest.budget.device_bytes + smallest.weights_bytes, smallest.weights_bytes // 8
    ):
        model = streamed(folder, max_memory={"cpu": budget})
        seen.add(model.plan.rare_bytes)
        assert not model.plan.rare_bytes or model.plan.rare_bytes == smallest.rare_bytes or not model.plan.pass_bytes
        logits_are_equal(model, plain, prompt)
    assert {0, smallest.rare_bytes} <= seen


def read_of(model: Any, words: str) -> int:
    return sum(unit.bytes_read for name, unit in model.profile.units.items() if words in name)


def test_the_plan_includes_the_cost_of_an_image(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("gemma3_image"))
    tower = sum(
        unit.nbytes for name, unit in runtime_of(model).partition.units.items() if "vision_tower" in name and "layers" in name
    )
    assert model.plan.rare_bytes == tower
    assert dict(model.plan.rows())["for images"].endswith("more from disk")
    model(input_ids=families.picture("gemma3_image")["input_ids"][:, :5])
    assert read_of(model, "vision_tower") == 0
    model(**families.picture("gemma3_image"))
    assert read_of(model, "vision_tower") == tower


def test_a_class_missing_in_the_registry_is_searched_and_logged(tmp_path: Path, streamed: Any, ids: Any, caplog: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = HeliumConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    HeliumForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="rabbit_engine"):
        model = streamed(tmp_path)
    assert "HeliumForCausalLM is not in the registry; found 3 layers in its module tree: model.layers" in caplog.text
    logits_are_equal(model, oracle(tmp_path), {"input_ids": ids})


def test_only_text_layers_for_a_text_checkpoint(checkpoint: Any, streamed: Any) -> None:
    assert type(streamed(checkpoint("gemma3"))).__name__ == "Gemma3ForCausalLM"


def test_every_class_of_the_table_is_in_the_registry() -> None:
    known = {entry.cls for entry in KNOWN}
    assert {row.cls for row in (*matrix.NATIVE, *matrix.IMAGE_TEXT)} <= known


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.MORE, *IMAGE_TEXT])
def test_the_registry_and_the_search_find_the_same_layers(family: str) -> None:
    from rabbit_engine.architectures.layout import find_layout, known_list, largest_list

    model = families.build(family)
    assert known_list(model) == largest_list(model, find_layout(model).embedding)
