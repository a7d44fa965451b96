"""GPTQ (https://arxiv.org/abs/2210.17323), as AutoGPTQ and GPTQModel store it.

A weight [out, in] of 2, 3, 4 or 8 bits: `qweight` int32 [in * bits / 32, out] packs inputs, `qzeros` int32
[groups, out * bits / 32] the zero points of outputs, `scales` [groups, out]; `g_idx` int32 [in] is the group of each input, in
any order with `desc_act`. The first version of the format stores zero points less one, modulo 2 ** bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rabbit_engine.errors import CompressionUnavailableError
from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.columns import (
    SCALES,
    WORD_BITS,
    groups_in_order,
    lines_at_once,
    require_groups,
    run_tiles,
    temporaries,
    unpack,
    write_columns,
)
from rabbit_engine.quantization.format import PackedFormat, StoredWeight
from rabbit_engine.storage.encoding import Described
from rabbit_engine.storage.jsonvalues import Fields, shown
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

METHOD = "gptq"

_BITS = (2, 3, 4, 8)
_ROLES = {"qweight": "values", "qzeros": "zeros", "scales": "scales", "g_idx": "groups"}
_LESS = {"gptq": 1, "gptq_v2": 0}
"""What a version of the format subtracts from zero points before it packs them."""


@dataclass(frozen=True, slots=True)
class Gptq:
    """Components: values, zero points, scales, and the group of each input unless `size` that follow one another are a group.

    `less` was subtracted from the zero points.
    """

    bits: int
    size: int
    less: int

    by_rows = False

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """`(value - zero point) * scale`, rounded to the dtype of the scales, then to that of `out`."""
        words, packed_zeros, scales = stored[:3]
        target, bits = out.view(-1, out.shape[-1]), self.bits  # an expert has a dimension more
        outputs, inputs = target.shape
        groups = stored[3] if len(stored) > 3 else groups_in_order(inputs, self.size, out.device)
        require_groups(groups, len(scales))
        zeros = unpack(packed_zeros.t().contiguous(), bits).t()
        zeros = (zeros + self.less).bitwise_and_((1 << bits) - 1)
        if self._can_compile(out.dtype, out.device):
            from rabbit_engine.quantization.kernels.packed import decode_gptq

            run_tiles(decode_gptq, words, zeros, scales, groups.to(torch.int32).numpy(), bits, out=target)
            return
        step = self._words_at_once(outputs, out.device)
        for start in range(0, len(words), step):
            codes = unpack(words[start : start + step], bits)
            first = start * WORD_BITS // bits
            of_some = groups[first : first + len(codes)]
            write_columns(target, first, codes, zeros.index_select(0, of_some), scales.index_select(0, of_some))

    def _can_compile(self, dtype: torch.dtype, device: torch.device) -> bool:
        return WORD_BITS % self.bits == 0 and kernels.can_write(dtype, device)

    def _words_at_once(self, outputs: int, device: torch.device) -> int:
        """Words that end where a value does."""
        whole = self.bits if WORD_BITS % self.bits else 1
        return lines_at_once(outputs * WORD_BITS * whole // self.bits, device) * whole

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """Zero points and scales; with torch operations also a piece."""
        outputs = math.prod(out.shape) // out.shape[-1]
        words = 0 if self._can_compile(out.dtype, device) else self._words_at_once(outputs, device)
        return temporaries(stored[2], out, words * WORD_BITS * outputs // self.bits)


def open_gptq(config: Fields) -> PackedFormat:
    """The format. Raises CompressionUnavailableError for a layout that other kernels need."""
    layout = config.optional_text("checkpoint_format") or config.optional_text("format") or "gptq"
    if layout not in _LESS or config.values.get("is_marlin_format"):
        raise CompressionUnavailableError(
            f"GPTQ in the format {shown(layout if layout not in _LESS else 'marlin')} is not supported, "
            f"only {' and '.join(_LESS)}: use a repository in one of these"
        )
    bits, size = config.count("bits"), config.values.get("group_size", -1)
    if bits not in _BITS or type(size) is not int or size < -1 or size == 0:
        raise CompressionUnavailableError(
            f"GPTQ with bits={bits} and group_size={shown(size)} is not supported; bits are {_BITS}"
        )
    varies = bool(config.values.get("dynamic"))
    is_ordered = not config.values.get("desc_act") or size == -1

    def make(weight: StoredWeight) -> TensorEntry | str:
        if "groups" not in weight.tensors and not is_ordered:
            return "its g_idx is not stored, and with desc_act the order of its inputs is not known"
        return _make(weight, _stored_bits(weight.tensors, bits) if varies else bits, None if varies else size, _LESS[layout])

    return PackedFormat(METHOD, _ROLES, make)


def _stored_bits(tensors: Mapping[str, TensorEntry], bits: int) -> int:
    """The bits of one weight of a checkpoint where they vary, from the number of its inputs."""
    words, groups = tensors.get("values"), tensors.get("groups")
    found = words.shape[0] * WORD_BITS // groups.shape[0] if words and groups and groups.shape and groups.shape[0] else bits
    return found if found in _BITS else bits


def _make(weight: StoredWeight, bits: int, size: int | None, less: int) -> TensorEntry | str:
    """The entry of a weight in groups of `size` inputs (-1: all; None: unknown)."""
    words, zeros, scales, groups = (weight.tensors.get(role) for role in _ROLES.values())
    if words is None or zeros is None or scales is None:
        missing = [name for name, role in _ROLES.items() if role not in weight.tensors and role != "groups"]
        return f"{' and '.join(missing)} are not stored"
    if len(words.shape) != 2 or words.dtype != torch.int32 or 0 in words.shape or words.shape[0] * WORD_BITS % bits:
        return f"a qweight of {list(words.shape)} {words.dtype} does not hold values of {bits} bits"
    inputs, outputs = words.shape[0] * WORD_BITS // bits, words.shape[1]
    if len(scales.shape) != 2 or scales.dtype not in SCALES or scales.shape[0] == 0 or scales.shape[1] != outputs:
        return f"scales of {list(scales.shape)} {scales.dtype} do not fit {outputs} outputs"
    count = scales.shape[0] if size is None else 1 if size == -1 else -(-inputs // size)
    if scales.shape[0] != count:
        return f"there are scales for {scales.shape[0]} groups, {inputs} inputs in groups of {size} need {count}"
    if zeros.dtype != torch.int32 or zeros.shape != (count, -(-outputs * bits // WORD_BITS)) or outputs * bits % WORD_BITS:
        return f"qzeros of {list(zeros.shape)} {zeros.dtype} do not hold {bits} bits for {outputs} outputs in {count} groups"
    if groups is None and size is None:
        return "its g_idx is not stored"
    if groups is not None and (groups.dtype != torch.int32 or groups.shape != (inputs,)):
        return f"a g_idx of {list(groups.shape)} {groups.dtype} does not fit {inputs} inputs"
    components = [words, zeros, scales, *([groups] if groups is not None else [])]
    return encoded(
        weight.name, weight.dtype, (outputs, inputs), Gptq(bits, inputs if size in (None, -1) else size, less), components
    )
