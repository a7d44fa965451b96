"""What GPTQ and AWQ share: a weight [out, in] is stored transposed, as integers of a few bits, with a scale and a zero point for
every output in each group of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rabbit_engine.errors import DamagedCheckpointError
from rabbit_engine.quantization import kernels
from rabbit_engine.storage.encoding import Described, rows_at_once

_MOST_AT_ONCE = 2**18
"""Values that torch operations decode together on a CPU: few enough for its caches."""

_SCALE_BYTES, _INPUT_BYTES = 16, 8
"""Of torch's temporaries for a scale with its zero point, and for the group of an input."""

_COLUMN_VALUE_BYTES = 13
"""Of temporaries for a value in `write_columns`: its code, zero point, scale and result, most of them in float32."""

WORD_BITS = 32
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def unpack(words: torch.Tensor, bits: int, *, whole: bool = False) -> torch.Tensor:
    """int32 [words, n] to uint8 [values, n]: values of `bits` each, one behind another, the lowest bits first.

    Where `bits` does not divide 32, a value may span two words, and the number of words is a multiple of `bits`; with `whole`
    words hold whole values, and their last bits nothing.
    """
    count = WORD_BITS // bits if whole or WORD_BITS % bits == 0 else WORD_BITS
    start = torch.arange(count, dtype=torch.int32, device=words.device) * bits
    groups = words.view(-1, -(-count * bits // WORD_BITS), words.shape[1])
    place, shift = (start // WORD_BITS).long(), (start % WORD_BITS)[:, None]
    values = groups.index_select(1, place).bitwise_right_shift_(shift)
    if count == WORD_BITS and WORD_BITS % bits:
        spans = shift[:, 0] > WORD_BITS - bits
        upper = shift[spans]
        values[:, spans] &= (1 << (WORD_BITS - upper)) - 1  # shifting a negative word fills it with ones
        values[:, spans] |= groups.index_select(1, place[spans] + 1) << (WORD_BITS - upper)
    return values.bitwise_and_((1 << bits) - 1).to(torch.uint8).view(-1, words.shape[1])


def lines_at_once(values: int, device: torch.device) -> int:
    """How many lines of so many values torch operations decode together on `device`."""
    return rows_at_once(_MOST_AT_ONCE, values, device)


def temporaries(scales: Described, out: Described, at_once: int, value_bytes: int = _COLUMN_VALUE_BYTES) -> int:
    """Bytes of temporaries: of `scales` with their zero points, of the groups of inputs, and of `at_once` values of `out`."""
    values = min(math.prod(out.shape), at_once)
    return _SCALE_BYTES * math.prod(scales.shape) + _INPUT_BYTES * out.shape[-1] + value_bytes * values


def require_groups(groups: torch.Tensor, count: int) -> None:
    """Raise DamagedCheckpointError unless the `groups` of inputs are among `count`."""
    low, high = (int(value) for value in groups.aminmax())
    if low < 0 or high >= count:
        raise DamagedCheckpointError(
            f"its g_idx names groups {low} to {high}, but there are {count}: download the checkpoint again"
        )


def write_columns(out: torch.Tensor, first: int, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
    """Write the columns of `out` from `first` on: `(codes - zeros) * scales`, all [inputs, outputs], in the dtype of `scales`."""
    values = codes.float().sub_(zeros.float()).mul_(scales.float()).to(scales.dtype)
    out[:, first : first + len(values)].copy_(values.t())


def rounding(scales: torch.dtype, out: torch.dtype) -> Any:
    """The `first_to` of a kernel: an empty array of the dtype that values are rounded to before that of `out`, or None."""
    once = scales in (torch.float32, out)
    return None if once else torch.empty(0, dtype=kernels.BITS[scales], device="cpu").numpy()


def run_tiles(
    kernel: Callable[..., None], words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, *rest: Any, out: torch.Tensor
) -> None:
    """Call a kernel of `kernels/packed.py` for all tiles of `out` [outputs, inputs]."""
    from rabbit_engine.quantization.kernels.packed import TILE_OUTPUTS

    factors = (tensor.float().contiguous().numpy() for tensor in (zeros, scales))
    count, bits = -(-len(out) // TILE_OUTPUTS), out.view(kernels.BITS[out.dtype]).numpy()
    kernels.run_rows(kernel, count, words.numpy(), *factors, *rest, rounding(scales.dtype, out.dtype), bits)


def run_product(kernel: Callable[..., None], states: torch.Tensor, shape: Sequence[int], *weight: Any) -> torch.Tensor:
    """Call a kernel of `kernels/packed_products.py`: `states` [rows, columns] times the transposed weight of `shape`."""
    single, out = states.float().contiguous(), torch.empty(len(states), shape[0], dtype=torch.float32, device="cpu")
    least = -(-kernels.THREAD_VALUES // shape[1])
    kernels.run_rows(kernel, shape[0], *weight, single.numpy(), out.numpy(), least=least)
    return out.to(states.dtype)


def groups_in_order(inputs: int, size: int, device: torch.device) -> torch.Tensor:
    """int32 [inputs]: the group of each input, where `size` that follow one another are a group."""
    return torch.arange(inputs, dtype=torch.int32, device=device).div_(size, rounding_mode="floor")
