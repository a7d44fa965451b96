"""Weights that bitsandbytes quantises while a checkpoint is split, in the layout that it computes with on this machine.

On CPUs with AVX512-BF16 bitsandbytes packs four-bit weights anew when a layer first runs, rounds their scales to bfloat16, and
multiplies by that form whatever the number of rows. The split stores that form, and the layer calls the same operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rabbit_engine.quantization.bitsandbytes import VALUES, Blocks4bit, Int8Rows
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.storable import Component
from rabbit_engine.storage.encoding import Described, rows_at_once
from rabbit_engine.storage.jsonvalues import Fields, shown
from rabbit_engine.utils.extras import missing_extra

BLOCK = 64
_STRIP = 32
"""Rows that are packed together."""

_HALF = _STRIP // 2
_MOST_AT_ONCE = 2**18
"""Values that a CPU decodes together: few enough for its caches, enough to seldom wake torch's threads."""

_VALUE_BYTES = 13
"""Of temporaries for a decoded value."""


def bitsandbytes() -> Any:
    """The package. Raises MissingExtraError."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise missing_extra("BitsAndBytesConfig", "bnb", error) from error
    return bitsandbytes


def packs_weights(device_type: str) -> bool:
    """Whether bitsandbytes packs four-bit weights anew on this machine."""
    return device_type == "cpu" and bool(bitsandbytes().functional.has_avx512bf16())


def can_pack(rows: int, columns: int) -> bool:
    """Whether bitsandbytes packs a matrix of this shape rightly."""
    return rows % _STRIP == 0 and columns % BLOCK == 0


def _quantised(weight: torch.Tensor, kind: str, nested: bool) -> tuple[torch.Tensor, Any]:
    """The codes and the state that `Params4bit` makes of a matrix."""
    if not bool(weight.isfinite().all()):
        raise ValueError("it has values that are not finite")
    codes, state = bitsandbytes().functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=nested, quant_type=kind
    )
    return codes, state


def _kind_of(parameters: Fields) -> str:
    kind = parameters.text("kind")
    if kind not in VALUES:
        raise ValueError(f"kind is {shown(kind)}, known are {', '.join(VALUES)}")
    return kind


@dataclass(frozen=True, slots=True)
class MadeBlocks4bit(Blocks4bit):
    """Codes and scales as bitsandbytes stores them; scales that were quantised too (`nested`) are stored decoded."""

    nested: bool = False

    form: ClassVar[str] = "bnb_4bit"
    roles: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    @classmethod
    def of(cls, parameters: Fields) -> MadeBlocks4bit:
        """The encoding with stored parameters. Raises ValueError for unknown ones."""
        return cls(_kind_of(parameters), BLOCK, nested=parameters.flag("nested"))

    def parameters(self) -> Mapping[str, int | str]:
        """The codes' values, and whether scales are decoded ones."""
        return {"kind": self.kind, "nested": self.nested}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that is not a matrix of an even number of values."""
        rows, columns = _matrix(dtype, shape)
        blocks = -(-rows * columns // BLOCK)
        return Component(torch.uint8, (rows * columns // 2,)), Component(torch.float32, (blocks,))

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """By bitsandbytes itself. Raises ValueError for values that are not finite, MissingExtraError without it."""
        codes, state = _quantised(weight, self.kind, self.nested)
        if not self.nested:
            return codes.view(-1), state.absmax.float()
        return codes.view(-1), bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


@dataclass(frozen=True, slots=True)
class PackedBlocks4bit:
    """Components: `codes` uint8 [rows, columns / 2], packed for bitsandbytes' product on a CPU, and `absmax` bfloat16
    [columns / 64, rows].

    32 rows are packed together: two columns after two columns, a byte for each value of the first 16 rows, in its low bits, and
    that of the row 16 further.
    """

    kind: str
    nested: bool = False

    form: ClassVar[str] = "bnb_4bit_packed"
    roles: ClassVar[tuple[str, ...]] = ("codes", "absmax")
    by_rows: ClassVar[bool] = False
    fused_by_default: ClassVar[bool] = True

    @classmethod
    def of(cls, parameters: Fields) -> PackedBlocks4bit:
        """The encoding with stored parameters. Raises ValueError for unknown ones."""
        return cls(_kind_of(parameters), parameters.flag("nested"))

    def parameters(self) -> Mapping[str, int | str]:
        """The codes' values, and whether scales were quantised too."""
        return {"kind": self.kind, "nested": self.nested}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that bitsandbytes cannot pack."""
        rows, columns = _matrix(dtype, shape)
        if not can_pack(rows, columns):
            raise ValueError(f"{rows} rows of {columns} values cannot be packed: {_STRIP} rows are, of blocks of {BLOCK}")
        return Component(torch.uint8, (rows, columns // 2)), Component(torch.bfloat16, (columns // BLOCK, rows))

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """By bitsandbytes itself. Raises ValueError for values that are not finite, MissingExtraError without it."""
        codes, state = _quantised(weight, self.kind, self.nested)
        packed, state = bitsandbytes().functional._convert_weight_packed_for_cpu(codes, state)
        return packed, state.absmax

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`float32(value of the code) * absmax`, rounded once to the dtype of `out`."""
        codes, absmax = stored
        rows, columns = out.shape
        values = torch.tensor(VALUES[self.kind], dtype=torch.float32, device=out.device)
        step = _rows_at_once(columns, out.device)
        memory = torch.empty(min(rows, step) * columns, dtype=torch.float32, device=out.device)
        for first in range(0, rows, step):
            some = codes[first : first + step].view(-1, columns // 2, _HALF, 2).permute(0, 2, 1, 3)
            part = memory[: some.numel() * 2].view(len(some), 2, _HALF, columns // 2, 2)
            part[:, 0] = values[(some & 0xF).int()]
            part[:, 1] = values[(some >> 4).int()]
            scales = absmax[:, first : first + step].t().float()
            wide = part.view(-1, columns // BLOCK, BLOCK).mul_(scales[..., None])
            out[first : first + step].copy_(wide.view(-1, columns))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A piece in float32, and its codes as indices."""
        del stored
        columns = out.shape[-1]
        return _VALUE_BYTES * min(math.prod(out.shape), _rows_at_once(columns, device) * columns)

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Always, where it can run: the result is that of bitsandbytes."""
        del rows, dtype
        return packs_weights(device.type)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns], rounded to bfloat16, times the weight transposed, as `Linear4bit` computes it."""
        if not packs_weights(states.device.type):
            return decoded_product(self, states, stored, shape)
        codes, absmax = stored
        values = torch.tensor(VALUES[self.kind], dtype=torch.float32, device=states.device)
        found: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(states, codes, list(shape), absmax, values, BLOCK)
        return found


@dataclass(frozen=True, slots=True)
class MadeInt8Rows(Int8Rows):
    """LLM.int8's weights."""

    form: ClassVar[str] = "bnb_int8"
    roles: ClassVar[tuple[str, ...]] = ("values", "SCB")

    def parameters(self) -> Mapping[str, int | str]:
        """None."""
        return {}

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """Raises ValueError for a weight that is not a matrix."""
        _matrix(dtype, shape, even=False)
        return Component(torch.int8, shape), Component(torch.float32, shape[:1])

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """By bitsandbytes itself, from float16. Raises ValueError for values that are not finite."""
        half = weight.to(torch.float16).contiguous()
        if not bool(half.isfinite().all()):
            raise ValueError("it has values that are not finite in float16")
        values, largest, _ = bitsandbytes().functional.int8_vectorwise_quant(half)
        return values, largest


def _rows_at_once(columns: int, device: torch.device) -> int:
    return rows_at_once(_MOST_AT_ONCE, columns * _STRIP, device) * _STRIP


def _matrix(dtype: torch.dtype, shape: tuple[int, ...], *, even: bool = True) -> tuple[int, int]:
    """Rows and columns. Raises ValueError for another tensor."""
    if len(shape) != 2 or not dtype.is_floating_point or (even and shape[0] * shape[1] % 2):
        raise ValueError(f"a weight of shape {list(shape)} and {dtype} is not a matrix that bitsandbytes quantises")
    return shape[0], shape[1]
