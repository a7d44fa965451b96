"""What holds for quantised checkpoints in every format that is joined by names: plans, adapters, sessions, devices, splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import test_bitsandbytes
import test_compressed_tensors
import test_gptq_awq
import torch
from shared_passes import assert_same_texts

from rabbit_engine import AutoModel
from rabbit_engine.checkpoints import HEADERS_ONLY, InPlace, resolve
from rabbit_engine.checkpoints.formats import SafetensorsTensor, TensorSource
from rabbit_engine.checkpoints.reading import Reading
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.quantization import open_packed
from rabbit_engine.transformers_bridge.quantizers import PACKED_METHODS

MAKERS: dict[str, Callable[[Path], Path]] = {
    "bitsandbytes": lambda folder: test_bitsandbytes.save("llama", folder, "nf4, double quantisation"),
    "nf4": lambda folder: test_bitsandbytes.save("llama", folder, "nf4"),
    "int8": lambda folder: test_bitsandbytes.save("llama", folder, "int8"),
    "gptq": lambda folder: test_gptq_awq.save_gptq("llama", folder, desc_act=True)[0],
    "awq": lambda folder: test_gptq_awq.save_awq("llama", folder)[0],
    "compressed-tensors": lambda folder: test_compressed_tensors.save("llama", folder, "int4 groups with zero points")[0],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`saved(kind)` is one Llama's folder, made once; do not change it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = MAKERS[kind](tmp_path_factory.mktemp("saved") / kind)
        return made[kind]

    return folder


def test_every_method_that_is_accepted_has_a_format() -> None:
    configs = {"gptq": {"bits": 4}, "compressed-tensors": {"config_groups": {}, "format": "pack-quantized"}}
    for method in PACKED_METHODS:
        stored = open_packed(method, configs.get(method, {}))
        assert stored is not None
        assert stored.method == method


def elsewhere(kind: str, folder: Path) -> Reading:
    """A reading of headers alone, as of a repository that was not downloaded."""

    def read(*arguments: Any) -> TensorSource:
        tensors = {}
        for name, tensor in HEADERS_ONLY.open(*arguments).tensors.items():
            assert isinstance(tensor, SafetensorsTensor)
            tensors[name] = SafetensorsTensor(replace(tensor.entry, path=folder / kind / tensor.path.name))
        return TensorSource(tensors)

    return replace(HEADERS_ONLY, open=read)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plan_from_headers_alone_has_the_entries_of_the_files(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    here, away = (
        resolve(saved(kind), SourceConfig(), SplitConfig(), reading=reading).source
        for reading in (HEADERS_ONLY, elsewhere(kind, tmp_path))
    )
    assert isinstance(here, InPlace)
    assert isinstance(away, InPlace)
    assert {name: (entry.shape, entry.dtype, entry.nbytes) for name, entry in here.entries.items()} == {
        name: (entry.shape, entry.dtype, entry.nbytes) for name, entry in away.entries.items()
    }
    assert away.download_bytes > 0


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_place_quantised_models(
    kind: str, device_map: Any, saved: Callable[[str], Path], streamed: Any, ids: torch.Tensor
) -> None:
    with torch.no_grad(), AutoModel.from_pretrained(saved(kind), device_map=device_map, max_memory={"cpu": "1GB"}) as model:
        expected = streamed(saved(kind), device=model.device)(ids).logits
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_an_adapter_has_the_bits_of_one_on_decoded_weights(
    kind: str, saved: Callable[[str], Path], tmp_path: Path, streamed: Any, plain: Any, ids: torch.Tensor
) -> None:
    folder = saved(kind)
    model, whole = streamed(folder), plain(folder.parent / "plain")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(plain(folder.parent / "plain"), config).save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        before = model(ids).logits
        for each in (model, whole):
            each.load_adapter(str(tmp_path / "adapter"))
        assert torch.equal(model(ids).logits, whole(ids).logits)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", ["bitsandbytes", "nf4", "compressed-tensors"])
def test_fused_products_differ_by_rounding_alone(
    kind: str, saved: Callable[[str], Path], streamed: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rabbit_engine.quantization import bitsandbytes, compressed_tensors

    used: list[str] = []
    for encoding in (bitsandbytes.Blocks4bit, compressed_tensors.ScaledBlocks):
        native = encoding.linear
        monkeypatch.setattr(encoding, "linear", lambda *given, native=native: used.append(kind) or native(*given))
    model, fused = streamed(saved(kind)), streamed(saved(kind), fused_products=True)
    with torch.no_grad():
        found, expected = (each(ids[:, :2]).logits.float() for each in (fused, model))
        assert used
        used.clear()
        assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
        assert torch.equal(fused(ids).logits, model(ids).logits)  # many rows
        assert used == []


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_texts_of_a_session_are_those_of_the_decoded_model(
    kind: str, saved: Callable[[str], Path], streamed: Any, plain: Any
) -> None:
    assert_same_texts(streamed(saved(kind)), plain(saved(kind).parent / "plain"))


@pytest.mark.parametrize("kind", MAKERS)
def test_sampling_with_a_seed_draws_the_same_from_memory_and_from_disk(
    kind: str, saved: Callable[[str], Path], streamed: Any, ids: torch.Tensor
) -> None:
    texts = []
    for keywords in ({}, {"max_memory": {"cpu": "1GB"}}):
        model = streamed(saved(kind), **keywords)
        torch.manual_seed(7)
        texts.append(model.generate(ids, max_new_tokens=8, do_sample=True, pad_token_id=0))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_files_are_read_as_they_are_stored(kind: str, saved: Callable[[str], Path], rabbit: Any) -> None:
    done = rabbit("plan", saved(kind), "--max-memory", "cpu=1GB")
    assert done.code == 0
    assert "streamed from the original files" in done.out
