"""What the layers of a cache take that keep a window of their text, and a token of any layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rabbit_engine.caches import scales_shape
from rabbit_engine.transformers_bridge.caches import window_states


@dataclass(frozen=True, slots=True)
class Windows:
    """`layers` of a cache that keep keys and values of a window of up to `tokens` tokens, and nothing else: `token_bytes` a
    token, of all of them."""

    layers: int = 0
    tokens: int = 0
    token_bytes: int = 0

    def shown(self, tokens: int, rows: int) -> int:
        """How many of `tokens` tokens are in memory after a pass over `rows` of them, until the next pass."""
        return min(tokens, self.tokens + rows)


NO_WINDOWS = Windows()


def measure_windows(cache: object) -> Windows:
    """Those of a cache that holds tokens."""
    found = window_states(cache)
    token_bytes = sum(token_bytes_of(states)[0] for states, _ in found)
    return Windows(len(found), max((window for _, window in found), default=0), token_bytes)


def window_bytes(cache: object) -> int:
    """Bytes of what the windows of a cache show."""
    return sum(tensor.nbytes for states, _ in window_states(cache) for tensor in states)


def bytes_behind_windows(cache: object) -> int:
    """Bytes of the tokens of a prompt that windows do not show any more: until the next token, they are views."""
    tensors = (tensor for states, _ in window_states(cache) for tensor in states)
    return sum(tensor.untyped_storage().nbytes() - tensor.nbytes for tensor in tensors)


def token_bytes_of(states: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    """Bytes a token of keys and values of a layer [1, heads, tokens, width]: as they are, and in eight bits."""
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in states)
    encoded = sum(tensor.numel() + scales_shape(tensor.shape).numel() * torch.bfloat16.itemsize for tensor in states)
    tokens = states[0].shape[-2]
    return nbytes // tokens, encoded // tokens
