"""The one weight of an embedding that is read by row and of a head that is cut into blocks, where these are tied."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rabbit_engine.streaming.blocks import LinearBlocks, RowBlock
from rabbit_engine.streaming.placeholder import Placeholder
from rabbit_engine.streaming.rows import EmbeddingRows
from rabbit_engine.tensorfiles import TensorEntry


class TiedRows(LinearBlocks, EmbeddingRows):
    """Answers `embedding` by reading rows, and `linear` by taking blocks in turn."""

    @staticmethod
    def __new__(cls, entry: TensorEntry, device: torch.device, blocks: Sequence[RowBlock]) -> TiedRows:
        """Shape and dtype are the entry's."""
        self = Placeholder.__new__(cls, entry.name, entry.shape, entry.dtype, device)
        self.entry, self.blocks = entry, blocks  # type: ignore[attr-defined]
        return self  # type: ignore[return-value]

    def clone_of_nothing(self) -> TiedRows:
        """The same rows and blocks."""
        return TiedRows(self.entry, self.device, self.blocks)
