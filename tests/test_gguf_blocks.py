"""GGUF's blocks: decoded to the bits of the package gguf, rounded once, or to those of transformers' newer reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.integrations.gguf import dequant

from rabbit_engine.quantization.gguf import BLOCKS, GgufBlocks, blocks_entry
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


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_blocks_decode_to_the_bits_of_the_package_gguf(kind: str) -> None:
    raw = random_blocks(kind, 24, 512)
    reference = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))
    for dtype in DTYPES:
        with torch_operations():
            assert same_bits(decoded(GgufBlocks(kind), raw, (24, 512), dtype), reference.to(dtype)), dtype


@pytest.mark.parametrize("kind", [kind for kind in sorted(BLOCKS) if gguf.GGMLQuantizationType[kind] in dequant.GGML_BLOCK])
def test_stepwise_decoding_gives_the_bits_of_the_newer_reader(kind: str) -> None:
    """Of the types that this transformers' reader has."""
    raw = random_blocks(kind, 24, 512)
    for dtype in DTYPES:
        reference = dequant.dequantize(torch.from_numpy(raw).flatten(), int(gguf.GGMLQuantizationType[kind]), dtype).view(24, 512)
        with torch_operations():
            assert same_bits(decoded(GgufBlocks(kind, stepwise=True), raw, (24, 512), dtype), reference), dtype


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
