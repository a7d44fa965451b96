"""GGUF's blocks: decoded to the bits of the package gguf, rounded once, or to those of transformers' newer reader."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from rabbit_engine.quantization.gguf import BLOCKS, GgufBlocks, OrderedRows, RowOrder, blocks_entry
from rabbit_engine.quantization.kernels import torch_operations
from rabbit_engine.storage.tensorfiles import TensorEntry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: any bytes are valid blocks, as long as the scales are finite."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // values, nbytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(
        kind, (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,)
    )
    for at in scales:
        raw[:, :, at + 1] &= 0xBF  # below 2 in size; every eighth is subnormal
        raw[:, ::8, at + 1] &= 0x83
    return raw.reshape(rows, -1)


def decoded(encoding: Any, stored: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, float("nan"), dtype=dtype)
    encoding.decode([torch.from_numpy(stored)], out)
    return out


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.contiguous().view(torch.uint8))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_decode_to_the_bits_of_the_package_gguf(kind: str, compiled: bool) -> None:
    raw = random_blocks(kind, 24, 512)
    reference = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    for dtype in DTYPES:
        with nullcontext() if compiled else torch_operations():
            assert same_bits(decoded(GgufBlocks(kind), raw, (24, 512), dtype), reference.to(dtype)), dtype


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_stepwise_decoding_gives_the_bits_of_the_newer_reader(kind: str, compiled: bool) -> None:
    from transformers.integrations.gguf import dequant

    number = int(gguf.GGMLQuantizationType[kind])
    if number not in dequant.GGML_BLOCK:
        pytest.skip(f"this transformers' newer reader has no {kind}")
    raw = random_blocks(kind, 24, 512)
    for dtype in DTYPES:
        reference = dequant.dequantize(torch.from_numpy(raw).flatten(), number, dtype).view(24, 512)
        with nullcontext() if compiled else torch_operations():
            assert same_bits(decoded(GgufBlocks(kind, stepwise=True), raw, (24, 512), dtype), reference), dtype


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


@pytest.mark.parametrize(
    ("kind", "shape", "nbytes", "reason"),
    [
        ("Q4_K", (4, 320), 720, r"\[4, 320\] values cannot be cut into blocks of 256"),
        ("Q4_K", (4, 256), 575, r"\[4, 256\] values are stored in 575 bytes"),
        ("IQ1_S", (4, 256), 200, "stored as IQ1_S, supported are F32, F16, BF16, Q4_0"),
    ],
)
def test_what_cannot_be_decoded_is_said(kind: str, shape: tuple[int, ...], nbytes: int, reason: str) -> None:
    stored = TensorEntry("w", Path("m.gguf"), 0, nbytes, torch.uint8, (nbytes,))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(blocks_entry(stored, "w", kind, torch.bfloat16, shape))
