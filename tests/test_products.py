"""What is relied on of torch's private products with packed integers, and of the encodings over them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from rabbit_engine.quantization import torch_products
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import LAYOUTS, STRIPS, factors_of_rows, layout_for, pack, torch_layout, unpack
from rabbit_engine.quantization.kernels import torch_operations
from rabbit_engine.quantization.storable import Storable

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HERE = layout_for(64, "cpu")
ENCODINGS: list[Storable] = [EightBitRows(), FourBitGroups(64, HERE), FourBitGroups(32, HERE), FourBitGroups(64, "rows")]
ENCODINGS += [FourBitGroups(64, layout) for layout in (torch_layout(),) if layout not in (None, HERE)]


def random_weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def decoded(encoding: Storable, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype)
    encoding.decode(encoding.compress(weight), out)
    return out


@pytest.mark.parametrize("rows", [16, 64, 80, 144])
def test_this_machines_layout_is_known(rows: int) -> None:
    codes = torch.randint(0, 16, (rows, 32), dtype=torch.uint8)
    layout = torch_layout()
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
    of_rows = torch.stack([factors_of_rows(some, 0, 80).reshape(80, -1, 2) for some in factors])
    scales, zeros = of_rows.float().unsqueeze(-2).unbind(-1)
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
    """2 ** -8 of the sum of absolute terms in bf16, 2 ** -11 in float16: a decoded weight is rounded, a fused one is not.

    In strips states are rounded too, each by 1 / 254 of its group's largest at most.
    """
    weight, states = random_weight(96, 128, dtype=dtype), torch.randn(rows, 128).to(dtype)
    found = encoding.linear(states, encoding.compress(weight), (96, 128))
    single = decoded(encoding, weight, torch.float32)
    bound = torch.finfo(dtype).eps / 2 * (states.float().abs() @ single.abs().t()) + 1e-6
    if isinstance(encoding, FourBitGroups) and encoding.layout == STRIPS:
        largest = states.float().abs().view(rows, -1, encoding.group).amax(dim=2).repeat_interleave(encoding.group, dim=1)
        bound += largest @ single.abs().t() / 254
    assert found.dtype == dtype
    assert bool(((found.float() - states.float() @ single.t()).abs() <= bound).all())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_no_rows_of_states_give_no_rows_and_strides_do_not_matter(encoding: Storable) -> None:
    stored, states = encoding.compress(random_weight(96, 128)), torch.randn(3, 2, 128).bfloat16()
    assert encoding.linear(states[:0, 0], stored, (96, 128)).shape == (0, 96)
    found = encoding.linear(states[:, 1], stored, (96, 128))
    assert torch.equal(found, encoding.linear(states[:, 1].contiguous(), stored, (96, 128)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 5])
def test_states_that_are_not_finite_give_products_that_are_not(value: float, rows: int) -> None:
    weight, states = random_weight(96, 128), torch.randn(rows, 128).bfloat16()
    states[0, 70] = value
    found = FourBitGroups(64, HERE).linear(states, FourBitGroups(64, HERE).compress(weight), (96, 128))
    assert not found[0].isfinite().any()
    assert bool(found[1:].isfinite().all())


@pytest.mark.skipif(HERE != STRIPS, reason="numba compiles no products of strips for this processor")
def test_products_of_strips_have_the_same_bits_without_the_instructions_of_vnni(tmp_path: Path) -> None:
    """Compiled in a process of its own: a processor with AVX2 alone has other instructions."""
    script = textwrap.dedent("""
        import sys, torch
        from rabbit_engine.quantization.four_bit import FourBitGroups
        states, *stored = torch.load(sys.argv[1])
        torch.save(FourBitGroups(64, "strips").linear(states, stored, (96, 128)), sys.argv[1])
    """)
    weight, states = random_weight(96, 128), torch.randn(5, 128).bfloat16()
    encoding = FourBitGroups(64, STRIPS)
    torch.save([states, *encoding.compress(weight)], tmp_path / "tensors")
    instructions = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+f16c"}
    environment = {**os.environ, **instructions, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "tensors")], check=True, env=environment, timeout=120)
    found = torch.load(tmp_path / "tensors")
    assert torch.equal(found, encoding.linear(states, encoding.compress(weight), (96, 128)))


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
