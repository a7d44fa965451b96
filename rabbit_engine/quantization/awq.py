"""AWQ (https://arxiv.org/abs/2306.00978) in AutoAWQ's layout "gemm".

A weight [out, in] of 4 bits: `qweight` int32 [in, out / 8] and `qzeros` int32 [groups, out / 8] pack eight outputs a word, those
with even places first; `scales` [groups, out].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.errors import CompressionUnavailableError
from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.columns import (
    SCALES,
    WORD_BITS,
    groups_in_order,
    lines_at_once,
    run_tiles,
    temporaries,
    write_columns,
)
from rabbit_engine.quantization.format import PackedFormat, StoredWeight
from rabbit_engine.storage.encoding import Described
from rabbit_engine.storage.jsonvalues import Fields, shown
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

METHOD = "awq"

_BITS = 4
_PER_WORD = WORD_BITS // _BITS
_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in a word each of its eight outputs lies."""

_ROLES = {"qweight": "values", "qzeros": "zeros", "scales": "scales"}


@dataclass(frozen=True, slots=True)
class Awq:
    """Components: values, zero points and scales, for groups of `size` inputs."""

    size: int

    by_rows = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`(value - zero point) * scale`, rounded to the dtype of the scales, then to that of `out`."""
        words, packed_zeros, scales = stored
        zeros, groups = _unpack(packed_zeros), groups_in_order(len(words), self.size, out.device)
        target = out.view(-1, len(words))  # an expert has a dimension more
        if kernels.can_write(out.dtype, out.device):
            from rabbit_engine.quantization.kernels.packed import decode_awq

            places = (tensor.view(len(scales), -1, _PER_WORD).transpose(1, 2) for tensor in (zeros, scales))
            run_tiles(decode_awq, words, *places, self.size, out=target)
            return
        step = lines_at_once(len(target), out.device)
        for first in range(0, len(words), step):
            of_some = groups[first : first + step]
            codes = _unpack(words[first : first + step])
            write_columns(target, first, codes, zeros.index_select(0, of_some), scales.index_select(0, of_some))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """Zero points and scales; with torch operations also a piece."""
        outputs = math.prod(out.shape) // out.shape[-1]
        at_once = 0 if kernels.can_write(out.dtype, device) else lines_at_once(outputs, device) * outputs
        return temporaries(stored[2], out, at_once)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] to uint8 [n, out]."""
    shifts = torch.tensor(_SHIFTS, dtype=torch.int32, device=words.device)
    return (words[:, :, None] >> shifts).bitwise_and_(2**_BITS - 1).to(torch.uint8).view(len(words), -1)


def open_awq(config: Fields) -> PackedFormat:
    """The format. Raises CompressionUnavailableError for another layout, or another number of bits."""
    layout = (config.optional_text("version") or config.optional_text("format") or "gemm").lower()
    backend, bits = config.optional_text("backend") or "auto", config.values.get("bits", config.values.get("w_bit", _BITS))
    if layout != "gemm" or backend == "llm-awq" or bits != _BITS:
        raise CompressionUnavailableError(
            f"AWQ with version={layout!r}, backend={backend!r} and bits={shown(bits)} is not supported, only gemm with 4 bits: "
            "use a repository in that layout"
        )
    size = config.values.get("group_size", config.values.get("q_group_size", 128))
    if type(size) is not int or size < -1 or size == 0:
        raise CompressionUnavailableError(f"AWQ with group_size={shown(size)} is not supported")
    return PackedFormat(METHOD, _ROLES, lambda weight: _make(weight, size))


def _make(weight: StoredWeight, size: int) -> TensorEntry | str:
    words, zeros, scales = (weight.tensors.get(role) for role in _ROLES.values())
    if words is None and zeros is None:
        return "its scales divide an activation, which is not supported: use an unquantised repository, or one of another format"
    if words is None or zeros is None or scales is None:
        return f"{' and '.join(name for name, role in _ROLES.items() if role not in weight.tensors)} are not stored"
    if len(words.shape) != 2 or words.dtype != torch.int32 or 0 in words.shape:
        return f"a qweight of {list(words.shape)} {words.dtype} does not hold values of {_BITS} bits"
    inputs, outputs = words.shape[0], words.shape[1] * _PER_WORD
    count = 1 if size == -1 else -(-inputs // size)
    if scales.dtype not in SCALES or scales.shape != (count, outputs):
        return f"scales of {list(scales.shape)} {scales.dtype} do not fit {outputs} outputs in {count} groups of {size} inputs"
    if zeros.dtype != torch.int32 or zeros.shape != (count, words.shape[1]):
        return f"qzeros of {list(zeros.shape)} {zeros.dtype} do not fit {outputs} outputs in {count} groups"
    return encoded(weight.name, weight.dtype, (outputs, inputs), Awq(inputs if size == -1 else size), (words, zeros, scales))
