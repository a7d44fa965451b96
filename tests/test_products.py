"""What is relied on of torch's private products with packed integers, and of the encodings over them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rabbit_engine.quantization import torch_products
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import LAYOUTS, layout_for, native_layout, pack, unpack
from rabbit_engine.quantization.kernels import torch_operations
from rabbit_engine.quantization.storable import Storable

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HERE = layout_for(64, "cpu")
ENCODINGS: list[Storable] = [EightBitRows(), FourBitGroups(64, HERE), FourBitGroups(32, HERE), FourBitGroups(64, "rows")]


def random_weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def decoded(encoding: Storable, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    encoding.decode(encoding.compress(weight), out)
    return out


@pytest.mark.parametrize("rows", [16, 64, 80, 144])
def test_this_machines_layout_is_known(rows: int) -> None:
    codes = torch.randint(0, 16, (rows, 32), dtype=torch.uint8)
    layout = native_layout()
    assert layout in LAYOUTS
    assert torch.equal(pack(codes, layout), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_can_be_unpacked_here(layout: str) -> None:
    codes = torch.randint(0, 16, (144, 32), dtype=torch.uint8)
    out = torch.empty(144, 32)
    unpack(pack(codes, layout), layout, out)
    assert torch.equal(out, codes.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_decode_to_the_product_with_the_scale_rounded_once(dtype: torch.dtype) -> None:
    weight = random_weight(2, 24, 48, dtype=dtype)
    values, scales = EightBitRows().compress(weight)
    assert torch.equal(decoded(EightBitRows(), weight), (values.float() * scales.float()[..., None]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", [32, 64])
def test_four_bits_decode_to_code_times_scale_plus_zero_rounded_once(dtype: torch.dtype, layout: str, group: int) -> None:
    weight = random_weight(2, 80, 128, dtype=dtype)
    encoding = FourBitGroups(group, layout)
    stored, factors = encoding.compress(weight)
    codes = torch.empty(2, 80, 128)
    for packed, out in zip(stored, codes, strict=True):
        unpack(packed, layout, out)
    scales, zeros = factors.float().permute(3, 0, 2, 1).unsqueeze(-1)
    expected = ((codes.view(2, 80, -1, group) - 8) * scales + zeros).view(weight.shape).to(dtype)
    assert torch.equal(decoded(encoding, weight), expected)
    with torch_operations():
        assert torch.equal(decoded(encoding, weight), expected)


@pytest.mark.parametrize(
    ("encoding", "most"), [(EightBitRows(), 0.009), (FourBitGroups(64, HERE), 0.085), (FourBitGroups(32, HERE), 0.074)]
)
def test_the_error_of_gaussian_weights(encoding: Storable, most: float) -> None:
    weight = random_weight(256, 512)
    assert (decoded(encoding, weight).float() - weight.float()).norm() < most * weight.float().norm()


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_fused_product_is_within_the_rounding_of_its_weight(encoding: Storable, dtype: torch.dtype, rows: int) -> None:
    """2 ** -8 of the sum of absolute terms in bf16, 2 ** -11 in float16: a decoded weight is rounded, a fused one is not."""
    weight, states = random_weight(96, 128, dtype=dtype), torch.randn(rows, 128).to(dtype)
    found = encoding.linear(states, encoding.compress(weight), (96, 128))
    single = decoded(encoding, weight, torch.float32)
    bound = torch.finfo(dtype).eps / 2 * (states.float().abs() @ single.abs().t()) + 1e-6
    assert found.dtype == dtype
    assert bool(((found.float() - states.float() @ single.t()).abs() <= bound).all())


@pytest.mark.parametrize("columns", [33, 40, 64])
def test_columns_that_torchs_product_would_read_past_are_decoded(columns: int) -> None:
    weight, states = random_weight(7, columns), torch.randn(3, columns).bfloat16()
    stored = EightBitRows().compress(weight)
    found = EightBitRows().linear(states, stored, (7, columns))
    assert torch.allclose(found.float(), functional.linear(states, decoded(EightBitRows(), weight)).float(), atol=1e-2)
    assert columns % torch_products.INT8_COLUMNS == 0 or torch.equal(
        found, functional.linear(states, decoded(EightBitRows(), weight))
    )


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_rows_of_zeros_and_of_one_value_are_exact(encoding: Storable) -> None:
    weight = torch.zeros(32, 128, dtype=torch.bfloat16)
    weight[1] = 0.5
    assert torch.equal(decoded(encoding, weight), weight)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(encoding: Storable, value: float) -> None:
    weight = random_weight(32, 128)
    weight[3, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        encoding.compress(weight)


def test_rows_of_partial_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="no groups of 64"):
        FourBitGroups(64, "rows").components(torch.bfloat16, (32, 96))
