"""The encoding of a weight that is stored in GGUF's blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from rabbit_engine.quantization import kernels
from rabbit_engine.quantization.decoded_product import decoded_product
from rabbit_engine.quantization.gguf.order import RowOrder
from rabbit_engine.quantization.gguf.unpacking import LAYOUTS
from rabbit_engine.storage.encoding import Described, rows_at_once
from rabbit_engine.storage.tensorfiles import TensorEntry, encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""ggml's types that are no blocks."""

BLOCKS = frozenset(LAYOUTS)
"""ggml's types of blocks that can be decoded."""

_MOST_AT_ONCE = 2**18
"""Values that torch operations decode together on a CPU: few enough for its caches."""

_VALUE_BYTES = 10
"""What torch's temporaries take for a value: two in float32, and some bytes."""

_KERNEL_VALUES = 2**17
"""Values that are worth a thread of their own."""

_MOST_ROWS = {
    "Q4_0": 5, "Q5_0": 5, "Q5_1": 5, "Q8_0": 3, "Q2_K": 12, "Q4_K": 7, "Q5_K": 7, "Q6_K": 5, "IQ4_NL": 4, "IQ4_XS": 4,
}  # fmt: skip
"""Of states for which the fused product is faster than decoding followed by torch's product; see docs/benchmarks.md."""


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """One component, uint8 [..., bytes of a row]: blocks of ggml's type `kind`, with rows in `order` if it is given.

    `stepwise` rounds scales and products to the weight's dtype, as transformers' newer reader does; else only values are.
    """

    kind: str
    order: RowOrder | None = None
    stepwise: bool = False

    fused_by_default: ClassVar[bool] = False

    @property
    def by_rows(self) -> bool:
        """Whether row r of the weight is row r of what is stored."""
        return self.order is None

    def decode(self, stored: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """With a compiled kernel on a CPU, else with torch operations; both give the same bits."""
        rows, target = stored[0].view(-1, stored[0].shape[-1]), out.view(-1, out.shape[-1])
        if kernels.can_write(out.dtype, out.device):
            self._decode_compiled(rows, target)
        else:
            self._decode_with_torch(rows, target)

    def work_bytes(self, stored: Sequence[Described], out: Described, device: torch.device) -> int:
        """With torch operations what a piece needs."""
        del stored
        if kernels.can_write(out.dtype, device):
            return 0
        columns = out.shape[-1]
        return _VALUE_BYTES * min(math.prod(out.shape), rows_at_once(_MOST_AT_ONCE, columns, device) * columns)

    def _decode_compiled(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        from rabbit_engine.quantization.kernels.gguf import DECODERS

        bits, steps = out.view(kernels.BITS[out.dtype]).numpy(), (self.stepwise and out.dtype != torch.float32) or None
        least = -(-_KERNEL_VALUES // out.shape[1])
        kernels.run_rows(DECODERS[self.kind], len(out), rows.numpy(), self._order(), bits, steps, least=least)

    def _order(self) -> NDArray[np.int64]:
        return (torch.empty(0, dtype=torch.int64, device="cpu") if self.order is None else self.order.index).numpy()

    def gains(self, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a kernel multiplies this many rows of states faster than decoding does."""
        return rows <= _MOST_ROWS.get(self.kind, 0) and kernels.can_write(dtype, device)

    def linear(self, states: torch.Tensor, stored: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """`states` [rows, columns] times the weight transposed: products of float32, added in float32, rounded at the end.

        The weight's values are not rounded to the dtype of `states`.
        """
        if self.kind not in _MOST_ROWS or not kernels.can_run(states.device):
            return decoded_product(self, states, stored, shape)
        from rabbit_engine.quantization.kernels.gguf_products import PRODUCTS

        rows, single = stored[0].view(shape[0], -1), states.float().contiguous()
        out = torch.empty(len(states), shape[0], dtype=torch.float32, device="cpu")
        least = -(-_KERNEL_VALUES // shape[1])
        kernels.run_rows(PRODUCTS[self.kind], shape[0], rows.numpy(), self._order(), single.numpy(), out.numpy(), least=least)
        return out.to(states.dtype)

    def _decode_with_torch(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        at_once = rows_at_once(_MOST_AT_ONCE, out.shape[1], out.device)
        index = None if self.order is None else self.order.on(out.device)
        for first in range(0, len(out), at_once):
            target = out[first : first + at_once]
            places = slice(first, first + at_once) if index is None else index[first : first + at_once]
            self._decode_rows(rows[places], target)

    def _decode_rows(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        layout, dtype, stepwise = LAYOUTS[self.kind], out.dtype, self.stepwise

        def rounded(values: torch.Tensor) -> torch.Tensor:
            return values.to(dtype).float() if stepwise else values

        found = layout.unpack(rows.reshape(-1, layout.nbytes), rounded)
        values = found.a[:, :, None] * found.q.view(*found.a.shape, -1)
        if stepwise:
            values.copy_(values.to(dtype))
        if found.c is not None:
            values.sub_(found.c[:, :, None])
        out.copy_(values.view(out.shape))


def blocks_entry(
    stored: TensorEntry, name: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...], *, order: RowOrder | None = None,
    stepwise: bool = False,
) -> TensorEntry | str:  # fmt: skip
    """The entry of weight `name` of `shape` that `stored`, whole rows of blocks, decodes to; or why it cannot be decoded."""
    layout = LAYOUTS.get(kind)
    if layout is None:
        return f"it is stored as {kind}, supported are {', '.join((*PLAIN, *LAYOUTS))}"
    if not shape or 0 in shape or shape[-1] % layout.values:
        return f"{list(shape)} values cannot be cut into blocks of {layout.values}"
    row_bytes = shape[-1] // layout.values * layout.nbytes
    if stored.nbytes != math.prod(shape[:-1]) * row_bytes:
        return f"{list(shape)} values are stored in {stored.nbytes} bytes"
    rows = replace(stored, dtype=torch.uint8, shape=(*shape[:-1], row_bytes))
    return encoded(name, dtype, shape, GgufBlocks(kind, order, stepwise), [rows])
