"""Weights in GGUF's blocks, decoded as transformers' readers decode them.

transformers has two. Most architectures go through the older one: decoded in float32 as the package gguf does, then rounded once
to the model's dtype. A few (Qwen3.5, LFM2) go through a newer one, which computes in the model's dtype, so each step is rounded.
"""

from rabbit_engine.quantization.gguf.arranged import ArrangedColumns
from rabbit_engine.quantization.gguf.blocks import BLOCKS, PLAIN, GgufBlocks, blocks_entry
from rabbit_engine.quantization.gguf.computed import ComputedValues
from rabbit_engine.quantization.gguf.order import OrderedRows, RowOrder

__all__ = ["BLOCKS", "PLAIN", "ArrangedColumns", "ComputedValues", "GgufBlocks", "OrderedRows", "RowOrder", "blocks_entry"]
