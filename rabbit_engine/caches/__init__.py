"""Keys and values of long texts in blocks: attention over one at a time, and eight bits for each number. It knows no models."""

from rabbit_engine.caches.block_attention import attend_by_blocks
from rabbit_engine.caches.far_attention import KNOWN_ATTENTION, attention_over_blocks
from rabbit_engine.caches.far_states import FarBlocks, FarStates, with_far_blocks
from rabbit_engine.caches.int8_states import GROUP, decode_states, encode_states, scales_shape

__all__ = [
    "GROUP",
    "KNOWN_ATTENTION",
    "FarBlocks",
    "FarStates",
    "attend_by_blocks",
    "attention_over_blocks",
    "decode_states",
    "encode_states",
    "scales_shape",
    "with_far_blocks",
]
