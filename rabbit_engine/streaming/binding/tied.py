"""The one weight of an embedding that is read by row and of a head that is cut into blocks, where these are tied."""

from __future__ import annotations

from rabbit_engine.streaming.binding.blocks import LinearBlocks
from rabbit_engine.streaming.binding.rows import EmbeddingRows


class TiedRows(LinearBlocks, EmbeddingRows):
    """Answers `embedding` by reading rows, and `linear` by taking blocks in turn."""
