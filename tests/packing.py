"""Weights in the formats of GPTQ and AWQ, packed and decoded by straight loops over the published formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rabbit_engine.quantization.kernels import torch_operations

Tensors = dict[str, torch.Tensor]

DECODERS: dict[str, Callable[[], AbstractContextManager[None]]] = {"compiled": nullcontext, "torch": torch_operations}
"""With what an encoding decodes within a block: both give the same bits."""


def quantise_groups(weight: torch.Tensor, bits: int, group_of: list[int]) -> tuple[Any, Any, Any]:
    """uint [in, out], zero points [groups, out], float16 scales [groups, out] of a weight [out, in]: round to nearest."""
    values, most = weight.float().t().numpy(), 2**bits - 1
    groups, outputs = max(group_of) + 1, values.shape[1]
    codes = np.zeros(values.shape, np.int64)
    zeros, scales = np.zeros((groups, outputs), np.int64), np.zeros((groups, outputs), np.float16)
    for group in range(groups):
        rows = [index for index, of in enumerate(group_of) if of == group]
        low, high = np.minimum(values[rows].min(0), 0), np.maximum(values[rows].max(0), 1e-3)
        scales[group] = (high - low) / most
        scale = scales[group].astype(np.float32)
        zeros[group] = np.clip(np.round(-low / scale), 1, most)  # the first version of GPTQ's format cannot store 0
        codes[rows] = np.clip(np.round(values[rows] / scale) + zeros[group], 0, most)
    return codes, zeros, scales


def decode_groups(codes: Any, zeros: Any, scales: Any, group_of: list[int]) -> torch.Tensor:
    """float16 [out, in]: `scale * (code - zero point)`, one value after another."""
    inputs, outputs = codes.shape
    out = np.zeros((outputs, inputs), np.float16)
    for row in range(inputs):
        for column in range(outputs):
            group = group_of[row]
            out[column, row] = scales[group, column] * np.float16(codes[row, column] - zeros[group, column])
    return torch.from_numpy(out)


def pack_bits(values: Any, bits: int) -> Any:
    """int32 [n * bits / 32, m] of integers [n, m]: the bits of each column as one little-endian number, cut into words."""
    count, columns = values.shape
    words = np.zeros((count * bits // 32, columns), np.uint32)
    for column in range(columns):
        number = sum(int(value) << (bits * index) for index, value in enumerate(values[:, column]))
        for index in range(len(words)):
            words[index, column] = (number >> (32 * index)) & 0xFFFFFFFF
    return words.view(np.int32)


def to_gptq(weight: torch.Tensor, bits: int, group_of: list[int], less: int = 1) -> tuple[Tensors, torch.Tensor]:
    """The tensors of GPTQ's format, and what they decode to."""
    codes, zeros, scales = quantise_groups(weight, bits, group_of)
    packed_zeros = np.ascontiguousarray(pack_bits((zeros - less).T, bits).T)
    stored = {
        "qweight": torch.from_numpy(pack_bits(codes, bits)),
        "qzeros": torch.from_numpy(packed_zeros),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.tensor(group_of, dtype=torch.int32),
    }
    return stored, decode_groups(codes, zeros, scales, group_of)


def pack_awq(values: Any) -> Any:
    """int32 [n, m / 8] of integers [n, m]: nibble i of a word is the output at place [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            for nibble, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row, column] |= np.uint32(int(values[row, 8 * column + place]) << (4 * nibble))
    return words.view(np.int32)


def to_awq(weight: torch.Tensor, group_of: list[int]) -> tuple[Tensors, torch.Tensor]:
    """The tensors of AWQ's gemm layout, and what they decode to."""
    codes, zeros, scales = quantise_groups(weight, 4, group_of)
    stored = {
        "qweight": torch.from_numpy(pack_awq(codes)),
        "qzeros": torch.from_numpy(pack_awq(zeros)),
        "scales": torch.from_numpy(scales),
    }
    return stored, decode_groups(codes, zeros, scales, group_of)


def rewrite_quantised(
    plain: Path,
    folder: Path,
    pack: Callable[[torch.Tensor], tuple[Mapping[str, torch.Tensor], torch.Tensor]],
    quantization: Mapping[str, Any],
    endings: str | tuple[str, ...] = "proj.weight",
) -> Path:
    """Write the checkpoint `plain` to `folder` with the weights of these endings packed, and change them in `plain` to what they
    decode to."""
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    for path in plain.glob("*.safetensors"):
        stored: Tensors = {}
        decoded = load_file(path)
        for name, tensor in list(decoded.items()):
            module, _, attribute = name.rpartition(".")
            parts, back = pack(tensor) if name.endswith(endings) else ({attribute: tensor}, tensor)
            stored.update({f"{module}.{part}": value for part, value in parts.items()})
            decoded[name] = back.to(tensor.dtype)
        save_file(stored, folder / path.name)
        save_file(decoded, path)
        files.update(dict.fromkeys(stored, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": dict(quantization)}))
    if (plain / "generation_config.json").is_file():
        (folder / "generation_config.json").write_bytes((plain / "generation_config.json").read_bytes())
    return folder
