"""Encodings decode to the bits of transformers' own dequantising, and a unit holds what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rabbit_engine.quantization import Fp8Blocks, Mxfp4, decoded_entry, fp8_entry, mxfp4_entry
from rabbit_engine.storage.tensorfiles import TensorEntry, each_row, gathered, read_header, read_tensor
from rabbit_engine.streaming import make_unit
from rabbit_engine.transformers_bridge.quantizers import FORMATS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random_fp8(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """All codes that are numbers."""
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(dtype)
    return torch.where(values.float().isfinite(), values.float(), 1.0).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def dequantised(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By transformers."""
    found: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["float32", "bfloat16", "large", "one", "uint8", "e8m0", "rows"])
def test_fp8_has_the_bits_that_transformers_dequantises(dtype: torch.dtype, scales: str) -> None:
    weight, made = random_fp8(24, 32), torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 1e-4
    made = {
        "float32": made,
        "bfloat16": made.bfloat16(),
        "large": made * 2.0**120,
        "one": made[0, 0],
        "uint8": (made * 20 + 110).to(torch.uint8),
        "e8m0": made.to(torch.float8_e8m0fnu),
        "rows": torch.rand(24, 1),
    }[scales]
    out = torch.empty(24, 32, dtype=dtype)
    Fp8Blocks().decode([weight, made], out)
    expected = dequantised(weight, made, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(bits(out.nan_to_num()), bits(expected.nan_to_num()))


@pytest.mark.parametrize("columns", [2**18, 2**17])
def test_fp8_has_the_same_bits_however_much_is_decoded_at_once(columns: int) -> None:
    """Some rows of a block, or a row of blocks."""
    weight, scales = random_fp8(24, columns), torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 1e-4
    out = torch.empty(24, columns, dtype=torch.bfloat16)
    Fp8Blocks().decode([weight, scales], out)
    assert torch.equal(bits(out), bits(dequantised(weight, scales, torch.bfloat16)))


def test_fp8_in_the_other_format_and_a_nan_have_the_bits_that_transformers_dequantises() -> None:
    scales, out = torch.rand(2, 2), torch.empty(16, 16, dtype=torch.bfloat16)
    with_nan = random_fp8(16, 16)
    with_nan.view(torch.uint8)[3, 5], with_nan.view(torch.uint8)[9, 0] = 0x7F, 0xFF
    for weight in (random_fp8(16, 16, dtype=torch.float8_e5m2), with_nan):
        Fp8Blocks().decode([weight, scales], out)
        expected = dequantised(weight, scales, torch.bfloat16)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_fp8_with_a_large_scale_and_a_nan_scale_has_the_bits_that_transformers_dequantises() -> None:
    weight, scales = torch.full((2, 8), 2.0**-6).to(torch.float8_e4m3fn), torch.tensor([[2.0**124], [torch.nan]])
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    Fp8Blocks().decode([weight, scales], out)
    assert torch.equal(out[0], torch.full((8,), 2.0**118, dtype=torch.bfloat16))
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [(3, 4), (24, 1), (1, 1), ()])
def test_fused_fp8_is_as_exact_as_float32(dtype: torch.dtype, scales: tuple[int, ...]) -> None:
    """The smallest codes too, and NaN in its row alone."""
    weight, states = random_fp8(24, 64, seed=3), torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    factors = torch.rand(scales, generator=torch.Generator().manual_seed(5)) + 0.1
    assert (weight.float().abs() < 2.0**-6).any()
    weight.view(torch.uint8)[7, 9] = 0xFF
    encoding = Fp8Blocks()
    assert encoding.gains(3, dtype, states.device)
    found = encoding.linear(states, [weight, factors], weight.shape)
    exact = states.double() @ dequantised(weight, factors, torch.float32).double().T
    assert found.dtype == dtype
    assert found[:, 7].isnan().all()
    torch.testing.assert_close(found.double(), exact, rtol=2.0 * torch.finfo(dtype).eps, atol=1e-2, equal_nan=True)
    other = random_fp8(24, 64, dtype=torch.float8_e5m2)
    expected = torch.nn.functional.linear(states, dequantised(other, factors, dtype))
    assert torch.equal(encoding.linear(states, [other, factors], other.shape), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most", [128, 255])
def test_mxfp4_has_the_bits_that_transformers_dequantises(dtype: torch.dtype, most: int) -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 8, 5, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, most + 1, (3, 8, 5), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    out = torch.empty(3, 160, 8, dtype=dtype)
    Mxfp4().decode([blocks, scales], out)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(bits(out.nan_to_num()), bits(expected.nan_to_num()))


@pytest.mark.parametrize("rows", [5, 2**14 + 3])
def test_mxfp4_has_the_bits_that_transformers_dequantises_however_much_is_decoded_at_once(rows: int) -> None:
    blocks = torch.randint(0, 256, (1, rows, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (1, rows, 3), dtype=torch.uint8)
    out = torch.empty(1, 96, rows, dtype=torch.bfloat16)
    Mxfp4().decode([blocks, scales], out)  # of many rows one group at a time
    assert torch.equal(bits(out), bits(convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)))


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, TensorEntry]:
    """Experts' projections in FP8 with scales, and MXFP4, in a file whose tensors are misaligned."""
    tensors = {"odd": torch.zeros(3, dtype=torch.uint8)}
    for index in range(4):
        tensors[f"{index}.gate"], tensors[f"{index}.gate_scale"] = random_fp8(16, 8, seed=index), torch.rand(2, 1)
        tensors[f"{index}.up"], tensors[f"{index}.up_scale"] = random_fp8(16, 8, seed=index + 9), torch.rand(2, 1)
    tensors["blocks"] = torch.randint(0, 256, (4, 6, 2, 16), dtype=torch.uint8)
    tensors["scales"] = torch.randint(100, 128, (4, 6, 2), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    return {entry.name: entry for entry in read_header(tmp_path / "model.safetensors").tensors}


def scaled(values: TensorEntry, scales: TensorEntry) -> dict[str, TensorEntry]:
    return {"values": values, "scales": scales}


def entry_of(found: TensorEntry | str) -> TensorEntry:
    assert isinstance(found, TensorEntry), found
    return found


def experts_of(stored: dict[str, TensorEntry]) -> TensorEntry:
    parts = [
        entry_of(fp8_entry(f"{index}.{name}", torch.bfloat16, scaled(stored[f"{index}.{name}"], stored[f"{index}.{name}_scale"])))
        for index in range(4)
        for name in ("gate", "up")
    ]
    return gathered("experts.gate_up_proj", torch.bfloat16, (4, 32, 8), parts)


def test_a_unit_decodes_the_contents_of_its_memory(stored: dict[str, TensorEntry]) -> None:
    whole = experts_of(stored)
    packed = entry_of(mxfp4_entry("down", torch.bfloat16, scaled(stored["blocks"], stored["scales"])))
    unit = make_unit("layer", [whole, packed, stored["odd"]])
    memory = memory_of(unit)
    assert unit.scratch_bytes == 8192  # 4 x 32 x 8 and 4 x 64 x 6 values of two bytes, in whole pages
    assert unit.weight_bytes == sum(entry.nbytes for entry in stored.values())
    for weight in unit.weights:
        if weight.entry.is_encoded:
            out = torch.empty(weight.entry.shape, dtype=weight.entry.dtype)
            weight.decode(memory, out)
            assert torch.equal(out, read_tensor(weight.entry))
        else:
            assert torch.equal(weight.view(memory), torch.zeros(3, dtype=torch.uint8))


def memory_of(unit: Any) -> torch.Tensor:
    """What a read of the unit brings."""
    memory = torch.zeros(unit.nbytes, dtype=torch.uint8)
    for extent in unit.extents:
        raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        memory[extent.place : extent.place + extent.nbytes] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return memory


def test_each_expert_equals_its_slice_of_the_stack(stored: dict[str, TensorEntry]) -> None:
    for entry in (experts_of(stored), entry_of(mxfp4_entry("down", torch.bfloat16, scaled(stored["blocks"], stored["scales"])))):
        whole = read_tensor(entry)
        experts = [read_tensor(row) for row in each_row(entry)]
        assert torch.equal(torch.cat(experts), whole)


WRONG = {
    "a grid that does not divide": ((16, 8), torch.float8_e4m3fn, (3, 1), torch.float32),
    "scales of one expert for two": ((2, 16, 8), torch.float8_e4m3fn, (1, 2, 1), torch.float32),
    "scales of a matrix for two": ((2, 16, 8), torch.float8_e4m3fn, (2, 1), torch.float32),
    "rows longer than the memory for temporaries": ((2, 3 * 2**20), torch.float8_e4m3fn, (1, 1), torch.float32),
    "scales for a batch": ((16, 8), torch.float8_e4m3fn, (2, 2, 1), torch.float32),
    "a list of scales": ((16, 8), torch.float8_e4m3fn, (16,), torch.float32),
    "integers": ((16, 8), torch.int8, (2, 1), torch.float32),
    "integer scales": ((16, 8), torch.float8_e4m3fn, (2, 1), torch.int32),
    "no values": ((0, 8), torch.float8_e4m3fn, (1, 1), torch.float32),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_fp8_weight_is_reported_and_not_decoded(case: str) -> None:
    shape, dtype, grid, scale_dtype = WRONG[case]
    weight = TensorEntry("w", Path("f"), 0, 0, dtype, shape)
    scales = TensorEntry("s", Path("f"), 0, 0, scale_dtype, grid)
    assert isinstance(fp8_entry("w", torch.bfloat16, scaled(weight, scales)), str)


@pytest.mark.parametrize("shape", [(2, 4, 3, 15), (4, 3, 16), (2, 4, 0, 16)])
def test_an_invalid_mxfp4_weight_is_reported_and_not_decoded(shape: tuple[int, ...]) -> None:
    blocks = TensorEntry("b", Path("f"), 0, 0, torch.uint8, shape)
    scales = TensorEntry("s", Path("f"), 0, 0, torch.uint8, shape[:-1])
    assert isinstance(mxfp4_entry("w", torch.bfloat16, scaled(blocks, scales)), str)
    assert isinstance(mxfp4_entry("w", torch.bfloat16, {"values": blocks}), str)


def test_values_without_scales_are_not_quantised(stored: dict[str, TensorEntry]) -> None:
    assert fp8_entry("w", torch.bfloat16, {"values": stored["0.gate"]}) is stored["0.gate"]


@pytest.mark.parametrize("method", [stored.method for stored in FORMATS])
def test_every_format_that_transformers_undoes_has_an_encoding_here(method: str) -> None:
    values = TensorEntry("w", Path("w.safetensors"), 0, 4, torch.float32, (1,))
    assert decoded_entry(method, "w", torch.bfloat16, {"values": values}) in (values, "its scales are not stored")
    assert decoded_entry(method, "w", torch.bfloat16, {"scales": values}) == "only its scales are stored"


def test_an_encoded_weight_is_not_cut_into_ranges_of_its_bytes() -> None:
    values = TensorEntry("w", Path("w.safetensors"), 0, 64, torch.float8_e4m3fn, (8, 8))
    scales = TensorEntry("s", Path("w.safetensors"), 64, 4, torch.float32, (1, 1))
    entry = fp8_entry("w", torch.bfloat16, scaled(values, scales))
    assert isinstance(entry, TensorEntry)
    with pytest.raises(ValueError, match="w is stored encoded"):
        entry.rows(0, 4)
