"""The single weight of an embedding read by row and a head cut into blocks that are tied."""

from __future__ import annotations

from rabbit_engine.streaming.binding.blocks import LinearBlocks
from rabbit_engine.streaming.binding.rows import EmbeddingRows


class TiedRows(LinearBlocks, EmbeddingRows):
    """Handles `embedding` by reading rows, and `linear` by taking blocks in turn."""
