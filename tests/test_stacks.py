"""Models of several stacks: what a pass runs and needs is known of each, and each is streamed as finely as the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_tasks import BART, IDS, PIXELS, SIZES, SOUND, T5, TEXT, differing, own, save

from rabbit_engine.config import Cut
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.partition import partition_model, unread_entries
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.probe import Curve, Probe, run_probe
from rabbit_engine.planning.tiers import Budget

KEYS_AND_VALUES = 3 * 2 * 32 * 4
"""Bytes of a token in three layers of BART, in float32."""
FINE = Cut(least_bytes=1)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SOUND),
}


def on_meta(cls: str, config: str, sizes: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()


def probe(cls: str, config: str, sizes: dict[str, Any]) -> Probe:
    return run_probe(on_meta(cls, config, sizes))


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_a_decoder_keeps_keys_and_values_of_its_own_tokens_and_of_the_encoders(name: str) -> None:
    found = probe(*MODELS[name])
    assert (found.cache_token_bytes, found.cache_fixed_bytes) == (KEYS_AND_VALUES, 0)
    assert found.layers.at(100) > 0


def test_a_sound_takes_the_same_of_the_cache_at_any_length_of_text() -> None:
    found = probe(*MODELS["whisper"])
    assert found.cache_token_bytes == KEYS_AND_VALUES
    assert found.cache_fixed_bytes == SOUND["max_source_positions"] * KEYS_AND_VALUES


@pytest.mark.parametrize("name", MODELS)
def test_the_modules_of_an_encoder_run_for_a_prompt_only(name: str) -> None:
    found = probe(*MODELS[name])
    assert not found.failure
    stacks = {"encoder" if "encoder." in leaf and "encoder_attn" not in leaf else "decoder" for leaf in found.prompt_only}
    assert "encoder" in stacks
    # keys and values of what the encoder gave are computed once
    decoder = {leaf for leaf in found.prompt_only if ".decoder." in f".{leaf}"}
    assert {leaf.rpartition(".")[2] for leaf in decoder} == ({"k", "v"} if name == "t5" else {"k_proj", "v_proj"})
    assert len(decoder) == 6


def test_an_image_takes_the_same_whatever_the_text() -> None:
    found = probe("ViTForImageClassification", "ViTConfig", PIXELS)
    assert found.layers == Curve(found.layers.fixed)
    assert found.layers.fixed > 0
    assert found.alone


def test_a_text_of_several_choices_is_measured() -> None:
    found = probe("BertForMultipleChoice", "BertConfig", SIZES)
    assert found.layers == probe("BertForSequenceClassification", "BertConfig", SIZES).layers


def smallest(model: Any) -> int:
    """The smallest budget that the model's shapes could run in."""
    partition = partition_model(model, *unread_entries(model))
    with pytest.raises(BudgetError) as raised:
        place(partition.sizes, "cpu", Budget(device_bytes=1))
    return raised.value.smallest_bytes


def test_both_stacks_are_cut_within_their_layers() -> None:
    wide = {"d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "vocab_size": 96}
    model = on_meta("BartForConditionalGeneration", "BartConfig", {**BART, **wide}).to(torch.bfloat16)
    largest = 2 * 1024 * 4096 + 2 * 4096  # a matrix and its bias
    assert 2 * largest <= smallest(model) < 3 * largest  # a whole layer of the decoder has four of them


@pytest.mark.parametrize("name", MODELS)
def test_stacks_that_are_cut_finely_give_equal_bits(name: str, tmp_path: Path, streamed: Any) -> None:
    cls, config, sizes = MODELS[name]
    expected = own(save(cls, config, sizes, tmp_path), cls)
    sound = {"input_features": torch.randn(2, 8, 20)}
    inputs = {**(sound if name == "whisper" else TEXT), "decoder_input_ids": IDS[:, :5]}
    model = streamed(tmp_path, cut=FINE)
    assert sum("encoder.block" in unit or "encoder.layers" in unit for unit in model.plan.streamed) >= 18
    with torch.no_grad():
        assert [differing(model(**inputs), expected(**inputs)) for _ in range(2)] == [[], []]


def test_the_plan_has_the_encoder_once_a_text(tmp_path: Path, streamed: Any) -> None:
    model = streamed(save(*MODELS["bart"], tmp_path), cut=FINE)
    plan = model.plan
    sizes = {size.name: size.disk_bytes for size in plan.units if size.name in plan.streamed}
    once = {name for name in sizes if ".encoder." in name or "encoder_attn.k_" in name or "encoder_attn.v_" in name}
    assert plan.encoder_bytes == sum(sizes[name] for name in once)
    assert plan.pass_bytes == sum(sizes[name] for name in sizes.keys() - once)
    assert plan.prompt_bytes == plan.pass_bytes + plan.encoder_bytes
    assert dict(plan.rows())["encoder"].endswith("more from disk, once a text")
    assert "for images" not in dict(plan.rows())


def test_the_encoder_is_read_once_a_text(tmp_path: Path, streamed: Any) -> None:
    model = streamed(save(*MODELS["bart"], tmp_path), cut=FINE, prefetching=False)
    model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert model.profile.bytes_read == 6 * model.plan.pass_bytes + model.plan.encoder_bytes


def test_a_list_of_lists_of_blocks_is_streamed(tmp_path: Path, streamed: Any) -> None:
    sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [2, 1, 1, 1], "num_encoder_blocks": 4}
    expected = own(
        save("PoolFormerForImageClassification", "PoolFormerConfig", sizes, tmp_path), "PoolFormerForImageClassification"
    )
    model = streamed(tmp_path)
    assert {name for name in model.plan.streamed if name.startswith("poolformer.encoder.block.0.")} == {
        "poolformer.encoder.block.0.0",
        "poolformer.encoder.block.0.1",
    }
    with torch.no_grad():
        assert [differing(model(**image), expected(**image)) for image in [{"pixel_values": torch.randn(1, 3, 32, 32)}]] == [[]]


def test_stages_are_streamed_by_their_large_parts(tmp_path: Path, streamed: Any) -> None:
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4, "patch_size": 4}
    expected = own(save("SwinForImageClassification", "SwinConfig", sizes, tmp_path), "SwinForImageClassification")
    model = streamed(tmp_path, cut=FINE)
    assert len(model.plan.streamed) > 10
    image = {"pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        assert differing(model(**image), expected(**image)) == []
