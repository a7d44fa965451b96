"""Blocks whose keys and values are in eight bits wherever they lie, and numbers again in the buffer of the layer that runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rabbit_engine.caches import GROUP, decode_states, encode_states, scales_shape
from rabbit_engine.storage.directio import aligned_up, as_bytes, claim_memory
from rabbit_engine.storage.scratchfile import ScratchFile
from rabbit_engine.streaming.caches.blocks import Pair, StoredBlock

_AT_ONCE = 2**15
"""Numbers with which torch computes in the thread that asks. For more it starts threads of its own, for each reader."""


class EncodedBlock(StoredBlock):
    """Keys and values as `encode_states` returns them, in one piece of memory or one extent: the scales of all rows of both,
    then their integers.

    It is made in the model's thread, and decoded in those that read, while the layer before computes.
    """

    def __init__(self, states: Pair, *, aligned: bool) -> None:
        """`aligned` to whole pages, for files."""
        self.tokens, self.offset = states[0].shape[2], -1
        self._shapes = [tensor.shape for tensor in states]
        self._scales = [scales_shape(shape) for shape in self._shapes]
        self.nbytes = sum(map(math.prod, self._shapes)) + torch.bfloat16.itemsize * sum(map(math.prod, self._scales))
        memory = self.new_memory() if aligned else torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        self._memory: torch.Tensor | None = memory
        for (integers, scales), tensor in zip(self._parts_of(memory), states, strict=True):
            encoded = encode_states(tensor)
            integers.copy_(encoded[0])
            scales.copy_(encoded[1])

    def new_memory(self) -> torch.Tensor:
        """uint8, in whole pages, for what lies in the file."""
        return claim_memory(aligned_up(self.nbytes))

    @property
    def memory(self) -> torch.Tensor | None:
        """It, while it lies in memory."""
        return self._memory

    def planes(self) -> list[memoryview]:
        """What is written to the file."""
        assert self._memory is not None  # noqa: S101 - it is written once
        return [as_bytes(self._memory)]

    def put_away(self, file: ScratchFile, offset: int) -> None:
        """It lies at `offset` of `file` now."""
        super().put_away(file, offset)
        self._memory = None

    def decode(self, memory: torch.Tensor, rows: Sequence[int], targets: Pair) -> None:
        """The `rows` of the block, whose bytes are in `memory`, as numbers in the rows of `targets`."""
        with torch.inference_mode():  # the buffer may be of a caller's
            for (integers, scales), target in zip(self._parts_of(memory), targets, strict=True):
                for to, row in zip(target, rows, strict=True):
                    _decode_row(integers[row], scales[row], to)

    def _parts_of(self, memory: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Integers and scales of the keys, and of the values, in `memory`."""
        first, found = 0, list[torch.Tensor]()
        for dtype, shapes in ((torch.bfloat16, self._scales), (torch.int8, self._shapes)):
            for shape in shapes:
                stop = first + math.prod(shape) * dtype.itemsize
                found.append(memory[first:stop].view(dtype).view(shape))
                first = stop
        return [(found[2], found[0]), (found[3], found[1])]


def _decode_row(integers: torch.Tensor, scales: torch.Tensor, target: torch.Tensor) -> None:
    """integers [heads, n, width], scales [heads, n, groups] -> target [heads, n, width], as `decode_states` does."""
    heads, tokens, width = integers.shape
    if width % GROUP:
        for head, some, factors in zip(target, integers, scales, strict=True):
            head.copy_(decode_states(some, factors, target.dtype))
        return
    if target.dtype != torch.bfloat16:  # in which products are rounded once, too: the integers have no more than seven bits
        scales = scales.to(torch.float32)
    many, few = max(1, _AT_ONCE // max(1, tokens * width)), max(1, _AT_ONCE // max(1, width))
    numbers, factors, result = integers.unflatten(-1, (-1, GROUP)), scales[..., None], target.unflatten(-1, (-1, GROUP))
    for head in range(0, heads, many):
        for token in range(0, tokens, few):
            part = (slice(head, head + many), slice(token, token + few))
            torch.mul(numbers[part], factors[part], out=result[part])
