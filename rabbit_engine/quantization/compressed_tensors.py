"""compressed-tensors: integers packed into words, or int8 and FP8 values, with scales by tensor, output, group or block.

A packed weight [out, in] is `weight_packed` int32 [out, in * bits / 32], values one behind another with the lowest bits first,
offset by half their range; `weight_shape` holds [out, in]. Other formats store `weight` itself. `weight_scale`, and
`weight_zero_point` if it is asymmetric, hold one value for each tensor, output, group or block; a packed weight's zero points are
packed along outputs. `weight_g_idx` is the group of each input, for activation order.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from rabbit_engine.errors import CompressionUnavailableError
from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.columns import (
    SCALES,
    WORD_BITS,
    lines_at_once,
    require_groups,
    rounding,
    run_product,
    temporaries,
    unpack,
)
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.format import UNUSED, PackedFormat, StoredWeight, read_small
from rabbit_engine.quantization.fp8 import fp8_entry
from rabbit_engine.storage.encoding import Described
from rabbit_engine.storage.jsonvalues import Fields, shown
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

logger = logging.getLogger(__name__)

METHOD = "compressed-tensors"

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_ROLES = {
    "weight": "values",
    "weight_packed": "packed",
    "weight_scale": "scales",
    "weight_zero_point": "zeros",
    "weight_shape": "shape",
    "weight_g_idx": "groups",
}
_OF_STATES = [f"{part}_{kind}" for part in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point", "global_scale")]
"""Of activations and caches, which are not quantised here."""

_MOST_FUSED_ROWS = 6
"""Of states, for which the fused product is faster: for a matrix of 4096 x 4096 it takes 1.8 ms for one row, 4.4 for four;
decoding it and torch's product take 6.2 for any of these."""

_VALUE_BYTES = 9
"""Of temporaries of torch operations for a value: two float32 and a code."""

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Apply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Changes its first argument by the second, in place."""


@dataclass(frozen=True, slots=True)
class ScaledBlocks:
    """Components: values, scales, zero points and the group of each input, the last two as `with_zeros` and `in_groups` say.

    Values are integers of `bits` packed into words, or with 0 bits stored in a dtype of their own; zero points are packed if
    they are int32. A scale is for a block of `rows` by `columns`. With `whole`, words hold whole values, as older versions of the
    package packed 3, 5, 6 and 7 bits.
    """

    bits: int
    rows: int
    columns: int
    with_zeros: bool = False
    in_groups: bool = False
    whole: bool = False
    by_rows: bool = False

    fused_by_default: ClassVar[bool] = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`(value - zero point) * scale`, rounded to the dtype of the scales, then to that of `out`."""
        values, scales, *rest = stored
        target = out.view(-1, out.shape[-1])  # an expert has a dimension more
        values, scales = values.view(len(target), -1), scales.reshape(-1, scales.shape[-1] if scales.ndim > 1 else 1)
        zeros = self._zeros(rest[0], len(target)).view(scales.shape) if self.with_zeros else None
        groups = rest[-1] if self.in_groups and int(rest[-1].min()) >= 0 else None  # -1: not in use
        if groups is not None:
            require_groups(groups, scales.shape[1])
        if groups is None and self._in_nibbles(target.shape[1]) and kernels.can_write(out.dtype, out.device):
            self._decode_nibbles(values, zeros, scales, target)
            return
        step = lines_at_once(target.shape[1], out.device)
        for first in range(0, len(target), step):
            part = target[first : first + step]
            block = torch.arange(first, first + len(part), device=out.device).div_(self.rows, rounding_mode="floor")
            wide = self._codes(values[first : first + step], part.shape[1])
            if zeros is not None:
                self._blocks(wide, zeros.index_select(0, block), groups, torch.Tensor.sub_)
            self._blocks(wide, scales.index_select(0, block).float(), groups, torch.Tensor.mul_)
            part.copy_(wide.to(scales.dtype))

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """Zero points and scales; with torch operations also a piece."""
        columns = out.shape[-1]
        compiled = not self.in_groups and self._in_nibbles(columns) and kernels.can_write(out.dtype, device)
        return temporaries(stored[1], out, 0 if compiled else lines_at_once(columns, device) * columns, _VALUE_BYTES)

    def _in_nibbles(self, columns: int) -> bool:
        """Whether kernels can read rows of so many values: four bits each, in groups of whole bytes."""
        return self.bits == 4 and self.rows == 1 and self.columns % 2 == 0 and columns % self.columns == 0

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel multiplies this many rows of states faster than decoding does."""
        readable = self.bits == 4 and self.rows == 1 and not self.in_groups
        return readable and rows <= _MOST_FUSED_ROWS and dtype in kernels.BITS and kernels.can_run(device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed, whose values are not rounded to their dtype."""
        if not self.gains(1, states.dtype, states.device) or not self._in_nibbles(shape[1]):
            return decoded_product(self, states, stored, shape)
        from rabbit_engine.quantization.kernels.packed_products import multiply_nibbles

        values, scales = stored[0].view(shape[0], -1), stored[1].view(shape[0], -1)
        zeros = self._zeros(stored[2], shape[0]).view(scales.shape) if self.with_zeros else None
        return run_product(multiply_nibbles, states, shape, *self._nibbles(values, zeros, scales))

    def _nibbles(self, values: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor) -> tuple[Any, ...]:
        """The arguments of kernels: codes, zero points and scales [rows, groups], and the size of a group."""
        middle = torch.full(scales.shape, 1 << (self.bits - 1), dtype=torch.float32, device="cpu")
        factors = [tensor.float().contiguous().numpy() for tensor in (middle if zeros is None else zeros + middle, scales)]
        return (values.view(torch.uint8).numpy(), *factors, self.columns)

    def _decode_nibbles(
        self, values: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor, target: torch.Tensor
    ) -> None:
        from rabbit_engine.quantization.kernels.packed import decode_nibbles

        bits, first_to = target.view(kernels.BITS[target.dtype]).numpy(), rounding(scales.dtype, target.dtype)
        least = -(-kernels.THREAD_VALUES // target.shape[1])
        arguments = self._nibbles(values, zeros, scales)
        kernels.run_rows(decode_nibbles, len(target), *arguments, first_to, bits, least=least)

    def _codes(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """float32 [rows, columns] of the stored values."""
        if not self.bits:
            return values.float()
        codes = unpack(self._padded(values).view(-1, 1), self.bits, whole=self.whole).view(len(values), -1)
        return codes[:, :columns].float().sub_(1 << (self.bits - 1))

    def _zeros(self, stored: torch.Tensor, outputs: int) -> torch.Tensor:
        """float32 zero points, packed along outputs or not."""
        if stored.dtype != torch.int32 or not self.bits:
            return stored.float()
        codes = unpack(self._padded(stored.t()).t().contiguous(), self.bits, whole=self.whole)
        return codes[:outputs].float().sub_(1 << (self.bits - 1))

    def _padded(self, words: torch.Tensor) -> torch.Tensor:
        """[n, words], padded to whole values where they span words."""
        unit = self.bits if WORD_BITS % self.bits and not self.whole else 1
        return pad(words, (0, -words.shape[1] % unit)).contiguous()

    def _blocks(self, wide: torch.Tensor, factors: torch.Tensor, groups: torch.Tensor | None, apply: Apply) -> None:
        """Apply `factors` [rows, blocks], one for `columns` values of a row, or for those of its group."""
        count = factors.shape[1]
        if groups is not None:
            apply(wide, factors.index_select(1, groups))
        elif count == 1 or count * self.columns == wide.shape[1]:
            apply(wide.view(len(wide), count, -1), factors[:, :, None])
        else:
            apply(wide, factors.repeat_interleave(self.columns, 1)[:, : wide.shape[1]])


@dataclass(frozen=True, slots=True)
class _Scheme:
    """How the weights of a config group are quantised: a scale is for a block of `rows` by `columns`, 0 for all of them."""

    bits: int
    rows: int
    columns: int
    symmetric: bool

    @classmethod
    def of(cls, weights: Fields) -> _Scheme:
        bits, size = weights.count("num_bits"), weights.values.get("group_size")
        strategy = weights.optional_text("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
        symmetric = bool(weights.values.get("symmetric", True))
        if strategy in ("tensor", "channel"):
            return cls(bits, 0 if strategy == "tensor" else 1, 0, symmetric)
        block = [1, size] if strategy == "group" else weights.values.get("block_structure")
        if strategy not in ("group", "block") or not isinstance(block, list) or len(block) != 2:
            raise CompressionUnavailableError(f"compressed-tensors with strategy={strategy!r} is not supported")
        if any(type(count) is not int or count < 1 for count in block) or not 1 <= bits <= 8:
            raise CompressionUnavailableError(f"compressed-tensors with {bits} bits in blocks of {shown(block)} is not supported")
        return cls(bits, int(block[0]), int(block[1]), symmetric)

    def block(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The size of a block in a weight [outputs, inputs]."""
        return self.rows or outputs, self.columns or inputs

    def grid(self, outputs: int, inputs: int) -> tuple[int, int]:
        """The number of scales for a weight [outputs, inputs]."""
        rows, columns = self.block(outputs, inputs)
        return -(-outputs // rows), -(-inputs // columns)


def open_compressed_tensors(config: Fields) -> PackedFormat:
    """The format. Raises CompressionUnavailableError for one that is not supported, such as sparse or nvfp4."""
    config = config.fields("quantization_config") if "quantization_config" in config.values else config
    groups = [Fields.of(group, name) for name, group in config.fields("config_groups").values.items()]
    _require_supported(config, groups)
    if any(group.values.get("input_activations") for group in groups) or config.values.get("kv_cache_scheme"):
        logger.info("its weights are decoded; activations and caches are not quantised, as with dequantize=True in transformers")
    schemes = [_Scheme.of(group.fields("weights")) for group in groups if group.values.get("weights")]
    roles = {**_ROLES, "weight_global_scale": "global", **dict.fromkeys(_OF_STATES, UNUSED)}
    return PackedFormat(METHOD, roles, lambda weight: _make(weight, schemes))


def _require_supported(config: Fields, groups: Sequence[Fields]) -> None:
    formats = [group.optional_text("format") or config.optional_text("format") or "dense" for group in groups]
    sparse = Fields.of(config.values.get("sparsity_config") or {}).optional_text("format") or "dense"
    other = [name for name in formats if name not in (*_FORMATS, "dense")]
    status = config.optional_text("quantization_status") or "compressed"
    problem = f"in the format {other[0]}" if other else f"with {sparse} weights" if sparse != "dense" else ""
    if config.values.get("transform_config"):
        problem = "with a transform_config"
    if status != "compressed":
        problem = f"with quantization_status={status!r}"
    if problem:
        raise CompressionUnavailableError(
            f"compressed-tensors {problem} is not supported, only {', '.join(_FORMATS)}: use a repository in one of these formats"
        )


def _make(weight: StoredWeight, schemes: Sequence[_Scheme]) -> TensorEntry | str:
    """The entry of a weight, by the first scheme that its tensors fit."""
    tensors = weight.tensors
    values = tensors.get("packed") or tensors.get("values")
    if values is None:
        return f"its values are not stored, only {', '.join(tensors)}"
    if "scales" not in tensors:
        return "its weight_scale is not stored"
    if "global" in tensors or tensors["scales"].dtype not in SCALES:
        return f"its weight_scale is {tensors['scales'].dtype}, which only formats that are not supported have"
    problem = "no config group has weights"
    for scheme in schemes:
        found = _entry(weight, values, scheme, "packed" in tensors)
        if not isinstance(found, str):
            return found
        problem = found
    return problem


def _entry(weight: StoredWeight, values: TensorEntry, scheme: _Scheme, packed: bool) -> TensorEntry | str:
    """The entry by one scheme, or how the tensors differ from it."""
    size = _size(weight, values, scheme.bits if packed else 0)
    if isinstance(size, str):
        return size
    scales, zeros, groups = (weight.tensors.get(role) for role in ("scales", "zeros", "groups"))
    assert scales is not None  # noqa: S101 - the caller has looked
    outputs, inputs = size
    grid, count = scheme.grid(*size), math.prod(scales.shape)
    if count != math.prod(grid) or (count > 1 and scales.shape != grid):
        return f"a weight_scale of {list(scales.shape)} does not fit {list(size)} values, whose config needs {list(grid)}"
    if scheme.rows == 1 and scheme.columns and inputs % scheme.columns:
        return f"{inputs} inputs are no multiple of its group_size {scheme.columns}"
    if zeros is None and not scheme.symmetric:
        return "its weight_zero_point is not stored"
    whole = packed and values.shape[1] != _words(inputs, scheme.bits)
    words = (_words(outputs, scheme.bits, whole=whole), grid[1])
    packs_zeros = zeros is not None and packed and zeros.dtype == torch.int32 and zeros.shape == words
    if zeros is not None and not packs_zeros and math.prod(zeros.shape) != count:
        return f"a weight_zero_point of {list(zeros.shape)} does not fit a weight_scale of {list(scales.shape)}"
    if groups is not None and (groups.dtype not in (torch.int32, torch.int64) or groups.shape != (inputs,)):
        return f"a weight_g_idx of {list(groups.shape)} {groups.dtype} does not fit {inputs} inputs"
    by_rows = scheme.rows == 1 and not packs_zeros and groups is None
    encoding = ScaledBlocks(
        scheme.bits if packed else 0, *scheme.block(*size), zeros is not None, groups is not None, whole, by_rows
    )
    components = [values, scales, *(extra for extra in (zeros, groups) if extra is not None)]
    return _as_fp8(weight, components, scheme.block(*size)) or encoded(weight.name, weight.dtype, size, encoding, components)


def _size(weight: StoredWeight, values: TensorEntry, bits: int) -> tuple[int, int] | str:
    """[outputs, inputs] of values that are stored as they are (0 bits) or packed; or how they are not."""
    if len(values.shape) != 2 or 0 in values.shape:
        return f"{list(values.shape)} values are no matrix"
    outputs, columns = values.shape
    if not bits:
        fits = values.dtype in (torch.int8, *_FP8)
        return (outputs, columns) if fits else f"{values.dtype} values have a weight_scale: the checkpoint is not compressed"
    stored = weight.tensors.get("shape")
    if values.dtype != torch.int32 or stored is None:
        return f"a weight_packed in {values.dtype} needs to be int32, and a weight_shape"
    if stored.dtype.is_floating_point or math.prod(stored.shape) != 2:
        return f"a weight_shape of {list(stored.shape)} {stored.dtype} holds no two integers"
    shape = read_small(stored)
    rows, inputs = (outputs, columns * WORD_BITS // bits) if shape is None else (int(count) for count in shape.view(-1))
    fitting = [_words(inputs, bits, whole=whole) for whole in (False, True)]
    if rows != outputs or inputs < 1 or columns not in fitting:
        return f"a weight_packed of {list(values.shape)} does not hold {[rows, inputs]} values of {bits} bits"
    return rows, inputs


def _words(values: int, bits: int, *, whole: bool = False) -> int:
    """The number of words for values, which may span two of them unless they are `whole`."""
    return -(-values // (WORD_BITS // bits)) if whole else -(-values * bits // WORD_BITS)


def _as_fp8(weight: StoredWeight, components: Sequence[TensorEntry], block: tuple[int, int]) -> TensorEntry | None:
    """The entry of the faster decoder, where it rounds as often as this one."""
    values, scales, *rest = components
    if rest or values.dtype not in _FP8 or scales.dtype not in (torch.float32, weight.dtype):
        return None
    found = fp8_entry(weight.name, weight.dtype, {"values": values, "scales": scales}, block)
    return found if isinstance(found, TensorEntry) else None
