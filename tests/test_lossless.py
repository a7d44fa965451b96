"""bfloat16 without loss: the bits of the original in fewer bytes, in compiled code and in torch operations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.forecast import forecast, why_lossless_gains_nothing
from rabbit_engine.quantization.kernels import can_run, torch_operations
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.storage.tensorfiles import each_row, read_tensor
from rabbit_engine.utils.speeds import Speeds


def decoded(components: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    Lossless().decode(components, out)
    return out


def compressed(weight: torch.Tensor) -> list[torch.Tensor]:
    found = Lossless().compress(weight)
    assert found is not None
    return list(found)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(96, 256, generator=generator) * 0.02
    scaled = normal * torch.logspace(-1, 0, 96)[:, None]
    strange = normal.clone()
    strange[3, 7:12] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    strange[95, 255], strange[0, 0] = 3e38, 1e-40
    rare = torch.full((64, 1024), 0.5)
    rare[5, 9] = rare[60, 1023] = 1e-9  # 60,000 values apart
    stack = torch.randn(3, 24, 64, generator=generator)
    found = {"normal": normal, "rows of other scales": scaled, "strange": strange, "rare": rare, "stack": stack}
    return {name: weight.bfloat16() for name, weight in found.items()}


@pytest.mark.parametrize("name", list(weights()))
def test_every_bit_comes_back(name: str) -> None:
    weight = weights()[name]
    components = compressed(weight)
    assert can_run(weight.device)
    assert torch.equal(bits(decoded(components, weight.shape)), bits(weight))
    with torch_operations():
        assert torch.equal(bits(decoded(components, weight.shape)), bits(weight))


def test_normal_weights_take_seven_tenths_of_their_bytes_as_components_says() -> None:
    weight = (torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    nbytes = sum(tensor.nbytes for tensor in compressed(weight))
    assert nbytes < 0.71 * weight.nbytes
    assert nbytes == pytest.approx(sum(part.nbytes for part in Lossless().components(weight.dtype, (512, 1024))), rel=0.01)


@pytest.mark.parametrize("weight", [torch.randn(8, 8), torch.randn(64).bfloat16(), torch.randn(8, 12).bfloat16()])
def test_other_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="is not a bfloat16 matrix"):
        Lossless().compress(weight)


def test_what_gains_nothing_stays_as_it_is() -> None:
    assert Lossless().compress(torch.randint(-(2**15), 2**15, (64, 64)).short().view(torch.bfloat16)) is None


@pytest.mark.parametrize("role", range(4))
def test_any_bytes_decode_within_the_weight(role: int) -> None:
    """Damage cannot write past the weight: a checksum is verified only when asked for."""
    weight = weights()["strange"]
    stored = compressed(weight)
    low, high = (-(2**31), 2**31) if stored[role].dtype == torch.int32 else (0, 256)
    damaged = torch.randint(low, high, stored[role].shape, generator=torch.Generator().manual_seed(2))
    stored[role] = damaged.to(stored[role].dtype)
    memory = torch.zeros(3, *weight.shape, dtype=torch.bfloat16)
    Lossless().decode(stored, memory[1])
    assert not memory[[0, 2]].any()
    with torch_operations():
        assert torch.equal(bits(decoded(stored, weight.shape)), bits(memory[1]))


WIDE = {"hidden_size": 256, "intermediate_size": 256}


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3_moe", "gpt_oss"])
def test_a_lossless_split_gives_the_original_model_bit_for_bit(
    family: str, own_checkpoint: Any, streamed: Any, plain: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rabbit_engine.model.loading.why_lossless_gains_nothing", lambda *_: "")
    folder = own_checkpoint(family, dtype=torch.bfloat16, **WIDE)
    model, whole = streamed(folder, compression="lossless"), plain(folder)
    encoded = {name: entry for name, entry in model._checkpoint.entries.items() if entry.is_encoded}
    assert encoded
    state = whole.state_dict()
    for name, entry in encoded.items():
        assert torch.equal(read_tensor(entry), state[name])
        if len(entry.shape) == 3:
            assert torch.equal(torch.cat([read_tensor(row) for row in each_row(entry)]), state[name])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_it_is_used_only_where_a_pass_gets_faster(
    own_checkpoint: Any, streamed: Any, rabbit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6}
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **sizes)
    split = SplitConfig(compression=CompressionConfig(method="lossless"))
    stream = StreamConfig(device=torch.device("cpu"), device_budget_bytes=20_000_000, speeds=Speeds(disk=1e4, source="given"))
    arguments = (folder, SourceConfig(), split)
    assert forecast(*arguments, stream).pass_s < forecast(folder, SourceConfig(), SplitConfig(), stream).pass_s
    assert why_lossless_gains_nothing(*arguments, stream) == ""
    assert any("split first" in note for note in forecast(*arguments, stream).notes)
    fast = replace(stream, speeds=Speeds(disk=1e15, source="given"))
    assert "(bound by decoding), and takes" in why_lossless_gains_nothing(*arguments, fast)
    with pytest.raises(BudgetError) as too_small:
        forecast(folder, SourceConfig(), SplitConfig(), replace(stream, device_budget_bytes=1))
    smallest = replace(stream, device_budget_bytes=too_small.value.smallest_bytes)
    assert 'give max_memory={"cpu"' in why_lossless_gains_nothing(*arguments, smallest)
    roomy = replace(stream, device_budget_bytes=10**9)
    assert why_lossless_gains_nothing(*arguments, roomy) == "no weight moves after loading"
    assert "bfloat16" in why_lossless_gains_nothing(folder, SourceConfig(), replace(split, dtype=torch.float32), stream)
    for without_gain in (fast, smallest, roomy):
        planned, plain = forecast(*arguments, without_gain), forecast(folder, SourceConfig(), SplitConfig(), without_gain)
        assert (planned.units, planned.resident, planned.pass_bytes) == (plain.units, plain.resident, plain.pass_bytes)
        assert planned.notes[:-1] == plain.notes
        assert planned.notes[-1].startswith('compression="lossless" is left out: ')
    with caplog.at_level(logging.WARNING):
        model = streamed(folder, compression="lossless", max_memory={"cpu": "1GB"})
    assert model._checkpoint.manifest is None
    assert 'compression="lossless" is left out: no weight moves' in caplog.text
    told = rabbit("plan", folder, "--compression", "lossless", "--device", "cpu", "-m", "1GB").out
    assert "--compression lossless is left out: no weight moves" in told
    assert "split first" not in told


def test_shards_whose_originals_are_deleted_are_used_though_nothing_moves(
    own_checkpoint: Any, streamed: Any, plain: Any, rabbit: Any, ids: torch.Tensor
) -> None:
    folder = own_checkpoint("llama", dtype=torch.bfloat16, **WIDE)
    with torch.no_grad():
        expected = plain(folder)(ids).logits
        rabbit("split", folder, "--compression", "lossless", "--delete-original")
        assert not list(folder.glob("*.safetensors"))
        model = streamed(folder, compression="lossless", max_memory={"cpu": "1GB"})
        assert not model.plan.pass_bytes
        assert torch.equal(model(ids).logits, expected)
