"""Measures how fast a device decodes encoded weights, and multiplies by them in the form they are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rabbit_engine.quantization import Blocks4bit, Fp8Blocks
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import layout_for
from rabbit_engine.quantization.gguf import GgufBlocks
from rabbit_engine.quantization.gguf.unpacking import LAYOUTS
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.quantization.rates import decode_rate, fused_rate
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.quantization.stored import unread_entry
from rabbit_engine.storage.encoding import Encoding
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

_ROWS = _COLUMNS = 4096
FOUR_BIT = "4bit"


@dataclass(frozen=True, slots=True)
class EncodingRate:
    """Bytes per second of one encoding: of decoded bfloat16 (`decode`), and of stored bytes in products with one token
    (`fused`; None if it is decoded for those)."""

    name: str
    decode: float
    fused: float | None


def measure_encodings(device: torch.device) -> tuple[EncodingRate, ...]:
    """The rates of the main encodings, with a matrix of 4096 x 4096."""
    return tuple(EncodingRate(entry.name, decode_rate(entry, device), fused_rate(entry, device)) for entry in _entries(device))


def _entries(device: torch.device) -> Iterator[TensorEntry]:
    made: dict[str, Storable] = {
        FOUR_BIT: FourBitGroups(64, layout_for(_ROWS, device.type)),
        "8bit": EightBitRows(),
        "lossless": Lossless(),
    }
    for name, encoding in made.items():
        yield unread_entry(name, 0, torch.bfloat16, (_ROWS, _COLUMNS), encoding)
    yield _entry("FP8", Fp8Blocks(), (torch.float8_e4m3fn, (_ROWS, _COLUMNS)), (torch.float32, (_ROWS // 128, _COLUMNS // 128)))
    layout = LAYOUTS["Q4_K"]
    yield _entry("GGUF Q4_K", GgufBlocks("Q4_K"), (torch.uint8, (_ROWS, _COLUMNS // layout.values * layout.nbytes)))
    codes, scales = (torch.uint8, (_ROWS * _COLUMNS // 2, 1)), (torch.float32, (_ROWS * _COLUMNS // 64,))
    yield _entry("nf4", Blocks4bit("nf4", 64, whole_rows=True), codes, scales)


def _entry(name: str, encoding: Encoding, *parts: tuple[torch.dtype, tuple[int, ...]]) -> TensorEntry:
    """The entry of a bfloat16 matrix in no file, whose components have these dtypes and shapes."""
    found: list[TensorEntry] = []
    for dtype, shape in parts:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        found.append(TensorEntry(f"{name}.{len(found)}", Path("/"), 0, nbytes, dtype, shape))
    return encoded(name, torch.bfloat16, (_ROWS, _COLUMNS), encoding, found)
