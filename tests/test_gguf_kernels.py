"""GGUF's blocks in compiled kernels: decoded to the bits of the torch operations, in any order of rows, and multiplied by.

tests/test_gguf_blocks.py compares the torch operations with other packages.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from test_gguf_blocks import DTYPES, decoded, random_blocks, same_bits

from rabbit_engine.quantization.gguf import BLOCKS, GgufBlocks, OrderedRows, RowOrder
from rabbit_engine.quantization.kernels import can_run, torch_operations


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_kernels_decode_to_the_bits_of_the_torch_operations(kind: str, stepwise: bool) -> None:
    raw, encoding = random_blocks(kind, 24, 512), GgufBlocks(kind, stepwise=stepwise)
    assert can_run(torch.device("cpu"))
    for dtype in DTYPES:
        with torch_operations():
            expected = decoded(encoding, raw, (24, 512), dtype)
        assert same_bits(decoded(encoding, raw, (24, 512), dtype), expected), dtype


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_in_another_order_are_decoded_in_place(compiled: bool) -> None:
    raw, order = random_blocks("Q4_K", 12, 256), torch.randperm(12)
    plain = decoded(GgufBlocks("Q4_K"), raw, (12, 256), torch.bfloat16)
    with nullcontext() if compiled else torch_operations():
        assert same_bits(decoded(GgufBlocks("Q4_K", RowOrder(order)), raw, (12, 256), torch.bfloat16), plain[order])
    assert not GgufBlocks("Q4_K", RowOrder(order)).by_rows
    assert GgufBlocks("Q4_K").by_rows


def test_plain_rows_in_another_order_are_gathered_and_rounded() -> None:
    values, order = torch.randn(12, 8), torch.randperm(12)
    assert same_bits(decoded(OrderedRows(RowOrder(order)), values.numpy(), (12, 8), torch.float16), values[order].half())


@pytest.mark.parametrize("compiled", [True, False])
def test_stacks_of_matrices_decode_like_their_rows(compiled: bool) -> None:
    raw = random_blocks("Q8_0", 12, 64)
    with nullcontext() if compiled else torch_operations():
        stacked = decoded(GgufBlocks("Q8_0"), raw.reshape(3, 4, -1), (3, 4, 64), torch.float32)
    assert same_bits(stacked.view(12, 64), decoded(GgufBlocks("Q8_0"), raw, (12, 64), torch.float32))


def test_threads_decode_what_one_does() -> None:
    raw = random_blocks("Q6_K", 2048, 512)
    alone = decoded(GgufBlocks("Q6_K"), raw, (2048, 512), torch.bfloat16)
    torch.set_num_threads(3)
    try:
        assert same_bits(decoded(GgufBlocks("Q6_K"), raw, (2048, 512), torch.bfloat16), alone)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_fused_products_are_as_exact_as_float32(kind: str) -> None:
    raw, order, states = random_blocks(kind, 40, 1280), torch.randperm(40), torch.randn(3, 1280)
    encoding = GgufBlocks(kind, RowOrder(order))
    weight = decoded(encoding, raw, (40, 1280), torch.float32).double()
    exact, largest = states.double() @ weight.T, states.abs().double() @ weight.abs().T
    found = encoding.linear(states, [torch.from_numpy(raw)], (40, 1280))
    assert ((found - exact).abs() <= 2e-6 * largest).all()
    half = encoding.linear(states.bfloat16(), [torch.from_numpy(raw)], (40, 1280))
    assert half.dtype == torch.bfloat16
    assert ((half - exact).abs() <= 0.01 * largest).all()


def test_fused_products_are_used_for_few_rows_only() -> None:
    cpu = torch.device("cpu")
    assert GgufBlocks("Q4_K").gains(1, torch.bfloat16, cpu)
    assert not GgufBlocks("Q4_K").gains(64, torch.bfloat16, cpu)
    assert not GgufBlocks("Q4_K").gains(1, torch.bfloat16, torch.device("meta"))
    assert not GgufBlocks("Q4_K").fused_by_default
