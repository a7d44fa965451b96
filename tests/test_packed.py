"""Weights that are multiplied by in their stored form: few rows by the encoding's product, many by the decoded weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from rabbit_engine.config import Cut, SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.model.assembly import assemble
from rabbit_engine.model.loading import load
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.storage.encoding import Described
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded, read_header, read_tensor
from rabbit_engine.streaming import EmbeddingRows, LinearBlocks
from rabbit_engine.utils.sizes import format_bytes, format_seconds

MOST_ROWS = 3
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FINE = Cut(least_bytes=100, most_bytes=1500, rest_share=0.5)


@dataclass(frozen=True)
class Bytes:
    """int8 [..., columns] with a float32 scale for each row; products of few rows, counted in `log`."""

    log: Callable[[str], None]
    fused_by_default: bool = True
    by_rows: bool = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        self.log("decode")
        values, scales = stored
        out.copy_(values.float() * scales[..., None])

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        return 4 * math.prod(out.shape)

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        return rows <= MOST_ROWS

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        self.log("linear")
        values, scales = stored
        assert values.shape == tuple(shape)
        assert states.dim() == 2
        return states @ (values.float() * scales[..., None]).T


def quantised_entries(entries: Mapping[str, TensorEntry], file: Path, encoding: Bytes) -> dict[str, TensorEntry]:
    """Every matrix and stack of matrices but routers, stored in `file` as `encoding` says."""
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        if len(entry.shape) > 1 and not name.endswith(".gate.weight"):
            weight = read_tensor(entry).float()
            scales = weight.abs().amax(-1) / 127
            tensors[f"{name}.values"] = (weight / scales[..., None]).round().to(torch.int8)
            tensors[f"{name}.scales"] = scales
    save_file(tensors, file)
    stored = {entry.name: entry for entry in read_header(file).tensors}
    return {
        name: encoded(name, entry.dtype, entry.shape, encoding, [stored[f"{name}.values"], stored[f"{name}.scales"]])
        if f"{name}.values" in stored
        else entry
        for name, entry in entries.items()
    }


class Packer:
    """Loads a checkpoint with its matrices in bytes, and says which products and decodings ran."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.calls: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.models: list[Any] = []

    def load(self, checkpoint: Path, *, room: int = 0, by_default: bool = True, **keywords: Any) -> Any:
        """In `room` more bytes than the smallest budget."""

        def assemble_quantised(model: Any, entries: Any, ties: Any, stream: StreamConfig) -> Any:
            file = self._folder / f"{len(self.models)}.safetensors"
            entries = quantised_entries(entries, file, Bytes(self.calls.append, by_default))
            self.weights = {name: read_tensor(entry) for name, entry in entries.items()}
            return assemble(model, entries, ties, stream)

        def try_with(budget: int) -> Any:
            stream = StreamConfig(device=torch.device("cpu"), device_budget_bytes=budget, **keywords)
            return load(checkpoint, LoadSettings(SourceConfig(), SplitConfig(), stream), assemble_quantised)

        with pytest.raises(BudgetError) as caught:
            try_with(1)
        model = try_with(caught.value.smallest_bytes + room)
        self.models.append(model)
        self.calls.clear()
        return model


@pytest.fixture
def packer(tmp_path: Path) -> Iterator[Packer]:
    made = Packer(tmp_path)
    with torch.no_grad():
        yield made
    for model in made.models:
        model.close()


def dequantised(whole: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    whole.load_state_dict(weights, strict=False)
    return whole


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "mixtral", "qwen3_next"])
@pytest.mark.parametrize("cut", [Cut(), FINE], ids=["coarse", "fine"])
@pytest.mark.parametrize("room", [0, 10**8], ids=["streamed", "resident"])
def test_few_rows_are_multiplied_packed_and_many_decoded(
    family: str, cut: Cut, room: int, checkpoint: Any, plain: Any, packer: Packer, ids: torch.Tensor
) -> None:
    model = packer.load(checkpoint(family), cut=cut, room=room)
    whole = dequantised(plain(checkpoint(family)), packer.weights)
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=2e-6)
    assert "decode" in packer.calls
    packer.calls.clear()
    torch.testing.assert_close(model(ids[:, :2]).logits, whole(ids[:, :2]).logits, rtol=0, atol=2e-6)
    assert "linear" in packer.calls
    if family != "qwen3_next":  # its convolutions and decays are no linear layers
        assert packer.calls.count("decode") == 1  # the row of the embedding
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


def test_an_encoded_embedding_is_read_by_row_and_an_encoded_head_in_blocks(
    checkpoint: Any, plain: Any, packer: Packer, ids: torch.Tensor
) -> None:
    for room in (0, 10**8):
        model = packer.load(checkpoint("llama_tied"), cut=FINE, room=room)
        assert isinstance(model.model.embed_tokens.weight, EmbeddingRows)
        assert isinstance(model.lm_head.weight, LinearBlocks)
        whole = dequantised(plain(checkpoint("llama_tied")), packer.weights)
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("by_default", "fused", "expected"), [(True, False, 0), (False, None, 0), (False, True, 1)])
@pytest.mark.parametrize("room", [0, 10**8], ids=["streamed", "resident"])
def test_the_keyword_decides_where_the_encoding_does_not(
    by_default: bool, fused: bool | None, expected: int, room: int, checkpoint: Any, plain: Any, packer: Packer, ids: Any
) -> None:
    model = packer.load(checkpoint("llama"), fused_products=fused, by_default=by_default, room=room, cut=FINE)
    whole = dequantised(plain(checkpoint("llama")), packer.weights)
    torch.testing.assert_close(model(ids[:, :1]).logits, whole(ids[:, :1]).logits, rtol=0, atol=2e-6)
    assert ("linear" in packer.calls) == bool(expected)
    if room and not expected:  # all were decoded at load, but for the embedding's row
        assert packer.calls == ["decode"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_plan_counts_what_a_token_decodes(family: str, checkpoint: Any, packer: Packer, ids: torch.Tensor) -> None:
    assert packer.load(checkpoint(family), cut=FINE).plan.decoding.nbytes == 0
    model = packer.load(checkpoint(family), cut=FINE, fused_products=False)
    counted = 0
    for name, weight in packer.weights.items():
        if weight.dim() == 3:  # of the experts, those that a token uses
            counted += weight.nbytes * model.config.num_experts_per_tok // len(weight)
        elif weight.dim() == 2 and not name.endswith(("embed_tokens.weight", ".gate.weight")):
            counted += weight.nbytes
    decoding = model.plan.decoding
    assert decoding.nbytes == counted
    assert decoding.seconds > 0
    assert model.plan.pass_s >= decoding.seconds
    assert ("decoded", f"{format_bytes(decoding.nbytes)} a pass, in {format_seconds(decoding.seconds)}") in model.plan.rows()


def test_autocast_another_dtype_and_lora_use_what_torch_would(
    checkpoint: Any, plain: Any, packer: Packer, ids: torch.Tensor
) -> None:
    model = packer.load(checkpoint("llama"))
    whole = dequantised(plain(checkpoint("llama")), packer.weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids[:, :1]).logits, whole(ids[:, :1]).logits)
    assert "linear" not in packer.calls
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = []
    for base in (model, whole):
        torch.manual_seed(1)
        adapted.append(get_peft_model(base, lora).eval())
    torch.testing.assert_close(adapted[0](ids).logits, adapted[1](ids).logits, rtol=0, atol=2e-6)
    assert torch.equal(adapted[0].generate(input_ids=ids, **GREEDY), adapted[1].generate(input_ids=ids, **GREEDY))


@pytest.mark.parametrize(("first", "stop"), [(0, 4), (2, 6), (6, 8)])
def test_rows_of_an_encoded_weight_decode_to_its_rows(first: int, stop: int, tmp_path: Path) -> None:
    save_file({"values": torch.randint(-9, 9, (8, 6), dtype=torch.int8), "scales": torch.rand(4)}, tmp_path / "a")
    stored = {entry.name: entry for entry in read_header(tmp_path / "a").tensors}
    pairs = _Pairs()
    weight = encoded("w", torch.float32, (8, 6), pairs, [stored["values"], stored["scales"]])
    assert weight.rows_together == 2
    assert torch.equal(read_tensor(weight.rows(first, stop)), read_tensor(weight)[first:stop])
    with pytest.raises(ValueError, match="2 rows together"):
        weight.rows(1, 3)


@dataclass(frozen=True)
class _Pairs:
    """int8 with a scale for two rows each."""

    by_rows: bool = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(stored[0].float() * stored[1].repeat_interleave(2)[:, None])

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        return 4 * math.prod(out.shape)
