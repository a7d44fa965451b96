"""bitsandbytes' formats: blocks of nf4 or fp4 codes, and rows of int8 (LLM.int8).

Four bits (QLoRA, https://arxiv.org/abs/2305.14314): `weight` holds two codes a byte, the high bits first, in the order of the
weight's values; `weight.absmax` a scale for each block of them; `weight.quant_state.bitsandbytes__nf4` the block size and the
shape, as JSON. Double quantisation stores the scales as codes of `weight.nested_quant_map`, with scales of their own.
Eight bits: `weight` int8 [out, in] and `SCB`, the largest magnitude of each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from rabbit_engine.errors import first_line
from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.columns import run_product
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.format import UNUSED, PackedFormat, StoredWeight, read_small
from rabbit_engine.storage.encoding import Described, rows_at_once
from rabbit_engine.storage.jsonvalues import Fields, counts, parse, shown
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

METHOD = "bitsandbytes"

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
VALUES: Mapping[str, tuple[float, ...]] = {"nf4": _NF4, "fp4": (*_FP4, *(0.0 - value for value in _FP4))}
"""What the 16 codes stand for, before they are scaled. fp4 has no negative zero, as in the package's own table and its AVX512
kernel; its kernel without AVX512, which its builds for CUDA contain, has one."""

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED = 256
_INT8_STEP = 7.874015718698502e-3
"""1 / 127, as bitsandbytes writes it."""

_MOST_AT_ONCE = 2**18
"""Values that torch operations decode together on a CPU: few enough for its caches."""

_MOST_FUSED_ROWS = 3
"""Of states, for which the fused product is faster: for a matrix of 4096 x 4096 it takes 4.1 ms for one row, 7.0 for four;
decoding it and torch's product take 7.2 for any of these."""

_MOST_STATE_BYTES = 2**16

_CODE_BYTES = 4 + 8
"""Of temporaries for a byte of codes: its index, and two values."""

_SCALE_BYTES = 12
"""Of temporaries for a scale that is quantised too."""


@dataclass(frozen=True, slots=True)
class Blocks4bit:
    """Components: codes, two a byte, and absmax float32 [blocks]; or, with an `offset`, codes, absmax uint8 [blocks], the scales
    of its blocks of 256, and the float32 [256] that its codes stand for."""

    kind: str
    block: int
    offset: float | None = None
    whole_rows: bool = False
    """Set where each row has blocks of its own."""

    fused_by_default: ClassVar[bool] = False

    @property
    def by_rows(self) -> bool:
        """Whether rows are ranges of all components: the scales of scales are for blocks of several rows."""
        return self.whole_rows and self.offset is None

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`float32(value of the code) * absmax`, rounded once to the dtype of `out`."""
        codes, target, absmax = stored[0].reshape(-1).view(torch.uint8), out.view(-1), self._absmax(stored[1:])
        if kernels.can_write(out.dtype, out.device):
            self._decode_compiled(codes, absmax, target)
        else:
            self._decode_with_torch(codes, absmax, target)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """The scales, unless they are stored as such, and what torch operations need for a piece."""
        scales = 0 if self.offset is None else _SCALE_BYTES * math.prod(stored[1].shape)
        compiled = kernels.can_write(out.dtype, device)
        return scales + (0 if compiled else _CODE_BYTES * min(stored[0].nbytes, self._codes_at_once(device)))

    def _codes_at_once(self, device: torch.device) -> int:
        return rows_at_once(_MOST_AT_ONCE, self.block, device) * self.block // 2

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel multiplies this many rows of states faster than decoding does."""
        return self.whole_rows and rows <= _MOST_FUSED_ROWS and dtype in kernels.BITS and kernels.can_run(device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed, whose values are not rounded to their dtype."""
        if not self.gains(1, states.dtype, states.device):
            return decoded_product(self, states, stored, shape)
        from rabbit_engine.quantization.kernels.packed_products import multiply_blocks

        codes, absmax = stored[0].view(-1).view(torch.uint8), self._absmax(stored[1:])
        weight = (codes.view(shape[0], -1).numpy(), absmax.view(shape[0], -1).numpy())
        pairs = _pairs(self.kind, states.device).view(torch.uint64).view(-1).numpy()
        return run_product(multiply_blocks, states, shape, *weight, pairs)

    def _decode_compiled(self, codes: torch.Tensor, absmax: torch.Tensor, target: torch.Tensor) -> None:
        from rabbit_engine.quantization.kernels.packed import decode_blocks

        pairs, bits = _pairs(self.kind, target.device).view(torch.uint64), target.view(kernels.BITS[target.dtype])
        arrays = [tensor.numpy() for tensor in (codes, absmax, pairs.view(-1))]
        least = kernels.THREAD_VALUES // self.block
        kernels.run_rows(decode_blocks, len(absmax), *arrays, self.block, bits.numpy(), least=least)

    def _decode_with_torch(self, codes: torch.Tensor, absmax: torch.Tensor, target: torch.Tensor) -> None:
        pairs = _pairs(self.kind, target.device)
        at_once = self._codes_at_once(target.device)
        index = torch.empty(min(len(codes), at_once), dtype=torch.int32, device=target.device)
        values = torch.empty(2 * len(index), dtype=torch.float32, device=target.device)
        pieces = zip(codes.split(at_once), target.split(2 * at_once), absmax.split(2 * at_once // self.block), strict=True)
        for some, part, scales in pieces:
            places, wide = index[: len(some)], values[: len(part)]
            places.copy_(some)
            torch.index_select(pairs, 0, places, out=wide.view(-1, 2))
            whole = len(wide) // self.block * self.block
            wide[:whole].view(-1, self.block).mul_(scales[: whole // self.block, None])
            wide[whole:].mul_(scales[-1])
            part.copy_(wide)

    def _absmax(self, stored: Sequence[torch.Tensor]) -> torch.Tensor:
        """float32 [blocks]: `map[code] * scale + offset`, each rounded to float32."""
        if self.offset is None:
            return stored[0].view(-1)
        codes, scales, values = (tensor.view(-1) for tensor in stored)
        found = values.index_select(0, codes.int())
        found.mul_(scales.repeat_interleave(_NESTED)[: len(found)])
        return found.add_(torch.tensor(self.offset, dtype=torch.float32, device=found.device))


@cache
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """float32 [256, 2]: what the two codes of a byte stand for."""
    values = torch.tensor(VALUES[kind], dtype=torch.float32, device="cpu")
    byte = torch.arange(256, device="cpu")
    return torch.stack([values[byte >> 4], values[byte & 0xF]], dim=1).to(device)


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Components: int8 [..., rows, columns], and the largest magnitude of each row, float32 [..., rows]."""

    by_rows = True

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`float32(value) * magnitude * float32(1 / 127)`, rounded after each product, then to the dtype of `out`."""
        columns = out.shape[-1]
        values, largest, target = stored[0].view(-1, columns), stored[1].view(-1, 1), out.view(-1, columns)
        rows = rows_at_once(_MOST_AT_ONCE, columns, out.device)
        single = torch.empty(min(rows, len(values)), columns, dtype=torch.float32, device=out.device)
        for some, scales, part in zip(values.split(rows), largest.split(rows), target.split(rows), strict=True):
            part.copy_(single[: len(some)].copy_(some).mul_(scales).mul_(_INT8_STEP))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """A piece in float32."""
        del stored
        columns = out.shape[-1]
        return 4 * min(math.prod(out.shape), rows_at_once(_MOST_AT_ONCE, columns, device) * columns)


def open_bitsandbytes(config: Fields) -> PackedFormat:
    """The format; its tensors say whether a weight has four or eight bits."""
    del config
    states = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in VALUES}
    ends = {"weight.absmax": "absmax", "weight.nested_absmax": "scales", "weight.nested_quant_map": "map"}
    eight = {"weight": "values", "SCB": "largest", "weight_format": "layout"}
    return PackedFormat(METHOD, {**eight, **ends, **states, "weight.quant_map": UNUSED}, _make)


def _make(weight: StoredWeight) -> TensorEntry | str:
    tensors = weight.tensors
    if "values" not in tensors:
        return f"only its {', '.join(tensors)} are stored"
    return _int8_entry(weight) if tensors["values"].dtype == torch.int8 else _blocks_entry(weight)


def _int8_entry(weight: StoredWeight) -> TensorEntry | str:
    values, largest, layout = (weight.tensors.get(role) for role in ("values", "largest", "layout"))
    if values is None or largest is None:
        return "it is int8, and its SCB is not stored"
    if len(values.shape) != 2 or largest.dtype != torch.float32 or largest.shape != values.shape[:1] or 0 in values.shape:
        return f"int8 values of {list(values.shape)} have an SCB of {list(largest.shape)} {largest.dtype}"
    number = None if layout is None else read_small(layout)
    if number is not None and (number.numel() != 1 or number.item() != 0):
        return f"its weight_format is {number.tolist()}; only 0, rows, is supported: save it with bitsandbytes 0.45 or later"
    return encoded(weight.name, weight.dtype, values.shape, Int8Rows(), (values, largest))


def _blocks_entry(weight: StoredWeight) -> TensorEntry | str:
    tensors = weight.tensors
    kind = next((kind for kind in VALUES if kind in tensors), None)
    if kind is None or "absmax" not in tensors:
        return f"{tensors['values'].dtype} values need a weight.quant_state and a weight.absmax, and one is not stored"
    try:
        encoding, shape = _read_state(kind, tensors[kind], weight)
    except ValueError as error:
        return f"its weight.quant_state is damaged: {first_line(error)}"
    components = [tensors[role] for role in ("values", "absmax", "scales", "map") if role in tensors]
    problem = _misfit(encoding, shape, tensors)
    return problem or encoded(weight.name, weight.dtype, shape, encoding, components)


def _read_state(kind: str, entry: TensorEntry, weight: StoredWeight) -> tuple[Blocks4bit, tuple[int, ...]]:
    """What the JSON of a weight says. Raises ValueError if it says something else than its name, or nothing."""
    if entry.nbytes > _MOST_STATE_BYTES:
        raise ValueError(f"it has {entry.nbytes} bytes, more than a description needs")
    raw = read_small(entry)
    if raw is None:
        return _guessed_state(kind, weight)
    state = Fields.of(parse(bytes(raw.view(-1).view(torch.uint8).tolist())))
    block, shape = state.count("blocksize"), counts(state.items("shape"), "shape")
    if state.text("quant_type") != kind:
        raise ValueError(f"quant_type is {shown(state.take('quant_type'))}, its name says {kind}")
    if block not in _BLOCKS:
        raise ValueError(f"blocksize is {block}, none of {', '.join(map(str, _BLOCKS))}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"shape is {list(shape)}, not that of a matrix")
    if "nested_offset" not in state.values:
        return Blocks4bit(kind, block, whole_rows=shape[1] % block == 0), shape
    offset: object = state.take("nested_offset")
    if state.count("nested_blocksize") != _NESTED or not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(f"nested_blocksize is {shown(state.take('nested_blocksize'))} and nested_offset {shown(offset)}")
    return Blocks4bit(kind, block, offset, whole_rows=shape[1] % block == 0), shape


def _guessed_state(kind: str, weight: StoredWeight) -> tuple[Blocks4bit, tuple[int, ...]]:
    """The same, from the sizes of tensors in a file that is not here: enough for a plan."""
    count, blocks = 2 * weight.tensors["values"].nbytes, math.prod(weight.tensors["absmax"].shape)
    shape = weight.shape_of(weight.name)
    if shape is None or math.prod(shape) != count:
        raise ValueError(f"it is in {weight.tensors[kind].path.name}, which is not on this machine")
    block = next((block for block in _BLOCKS if -(-count // block) == blocks), 0)
    return Blocks4bit(kind, block, 0.0 if "scales" in weight.tensors else None), shape


def _misfit(encoding: Blocks4bit, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry]) -> str:
    """How the tensors contradict the state; empty if they do not."""
    count = math.prod(shape)
    if 2 * tensors["values"].nbytes != count:
        nbytes = tensors["values"].nbytes
        return f"{nbytes} bytes hold {2 * nbytes} values, its weight.quant_state says {list(shape)}"
    blocks = -(-count // (encoding.block or count))
    wanted = {"absmax": (torch.float32, blocks)}
    if encoding.offset is not None:
        wanted = {"absmax": (torch.uint8, blocks), "scales": (torch.float32, -(-blocks // _NESTED)), "map": (torch.float32, 256)}
    for role in ("absmax", "scales", "map"):
        entry, need = tensors.get(role), wanted.get(role)
        found = None if entry is None else (entry.dtype, math.prod(entry.shape))
        if found != need:
            return f"its {role} is {_listed(found)}, its weight.quant_state needs {_listed(need)}"
    return ""


def _listed(found: tuple[torch.dtype, int] | None) -> str:
    return "missing" if found is None else f"{found[1]} values of {str(found[0]).removeprefix('torch.')}"
