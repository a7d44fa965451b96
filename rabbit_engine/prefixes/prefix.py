"""The blocks that are stored of a text's beginning, read in order, the next ones while one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol

import torch

from rabbit_engine.prefixes.keys import BlockKey
from rabbit_engine.prefixes.memory import HeldBlock

Wanted = Callable[[int, str], bool]
"""Whether to read the tensor of a name from the block with an index."""


class BlockSource(Protocol):
    """Where blocks are read from."""

    def open(self, key: BlockKey) -> HeldBlock | None:
        """The block of a key, with its header; None if it is not whole any more."""
        ...

    def fetch(self, block: HeldBlock, names: Collection[str]) -> HeldBlock | None:
        """The block with the tensors of these names; None if it is not whole any more."""
        ...


class Prefix:
    """The first `tokens` tokens of a text, in blocks: `read_block` and `blocks` return what was written.

    A block that turns out to be damaged, or that another process deletes meanwhile, ends the prefix early: use what came, and
    compute from there. Tensors are on the CPU and shared by all who read them: copy them to change them.
    """

    def __init__(self, blocks: Sequence[HeldBlock | BlockKey], block_tokens: int, source: BlockSource) -> None:
        """`blocks` are keys where nothing but the name of a file was looked at."""
        self.block_tokens = block_tokens
        self._blocks, self._source = list(blocks), source

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    def __repr__(self) -> str:
        return f"Prefix({self.tokens} tokens)"

    @property
    def tokens(self) -> int:
        """The number of tokens that the blocks cover."""
        return len(self._blocks) * self.block_tokens

    def names(self, index: int) -> tuple[str, ...]:
        """The names of a block's tensors; none if it is not whole any more. Reads its header, unless it was read before."""
        block = self._opened(index)
        return () if block is None else block.names

    def block_bytes(self, index: int) -> int:
        """The memory that a block takes; 0 if it is not whole any more. Reads its header, unless it was read before."""
        block = self._opened(index)
        return 0 if block is None else block.whole_bytes

    def cut(self, count: int) -> Prefix:
        """The first `count` blocks."""
        return Prefix(self._blocks[:count], self.block_tokens, self._source)

    def read_block(self, index: int, wanted: Wanted | None = None) -> Mapping[str, torch.Tensor] | None:
        """The tensors of one block, or those `wanted` of it; None if it is not whole any more."""
        block = self._opened(index)
        if block is None:
            return None
        names = [name for name in block.names if wanted is None or wanted(index, name)]
        missing = [name for name in names if name not in block.tensors]
        whole = self._source.fetch(block, missing) if missing else block
        return None if whole is None else {name: whole.tensors[name] for name in names}

    def _opened(self, index: int) -> HeldBlock | None:
        block = self._blocks[index]
        if isinstance(block, BlockKey) and (found := self._source.open(block)) is not None:
            self._blocks[index] = block = found
        return None if isinstance(block, BlockKey) else block

    def blocks(self, first: int = 0, wanted: Wanted | None = None, ahead: int = 2) -> Iterator[Mapping[str, torch.Tensor]]:
        """The blocks from `first` on, up to one that is not whole, while threads read the `ahead` next ones, at least one."""
        indices = iter(range(first, len(self)))
        with ThreadPoolExecutor(ahead, "rabbit-prefix") as readers:
            coming = deque(readers.submit(self.read_block, index, wanted) for index in islice(indices, ahead))
            try:
                while coming and (block := coming.popleft().result()) is not None:
                    coming.extend(readers.submit(self.read_block, index, wanted) for index in islice(indices, 1))
                    yield block
            finally:
                for future in coming:
                    future.cancel()
