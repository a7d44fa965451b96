"""Keys and values in eight bits: integers of -127 to 127 for groups of 32 numbers of a token's head, and a scale for each group.

The layout of llama.cpp's `q8_0`, with bfloat16 scales for the range of every dtype: 8.5 bits a number. Of the layouts tried on
caches of SmolLM2 it changes the model's answers least. Keys with a scale per channel of a block, which KIVI (Liu et al., 2024)
uses for two bits, have half the rounding error, and yet twice the effect: `docs/architecture.md` has the figures.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

GROUP = 32
_LARGEST = 127
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).smallest_normal


def scales_shape(shape: torch.Size) -> torch.Size:
    """The shape of the scales of states [..., n, width]."""
    return torch.Size((*shape[:-1], math.ceil(shape[-1] / GROUP)))


def encode_states(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """states [batch, heads, n, width] -> int8 of that shape, bfloat16 scales [batch, heads, n, ceil(width / 32)].

    A scale is a 127th of the largest of its group. A group of zeros, or of nothing above 2^-119, has the scale 0. A group with a
    NaN or an infinity has a scale that is not finite, and decodes to NaN.
    """
    groups = _in_groups(states.to(torch.promote_types(states.dtype, torch.float32)))
    scales = (groups.abs().amax(-1) / _LARGEST).to(torch.bfloat16)
    scales = scales.masked_fill(scales < _SMALLEST_SCALE, 0.0)
    divisors = scales.masked_fill(scales == 0, math.inf)[..., None].to(groups.dtype)
    integers = (groups / divisors).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return integers.flatten(-2)[..., : states.shape[-1]].contiguous(), scales


def decode_states(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `encode_states` returned -> states [batch, heads, n, width] of the dtype.

    Each is within half a scale of what was encoded (half of 1.004 / 127 of the largest of its group), and half a unit in the last
    place of the dtype; within 2^-119 where the scale is 0. An integer times its scale is exact in float32.
    """
    width = integers.shape[-1]
    products = _in_groups(integers.to(torch.float32)) * scales[..., None].to(torch.float32)
    return products.flatten(-2)[..., :width].to(dtype)


def _in_groups(states: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [..., groups, 32], the last filled with zeros."""
    padded = functional.pad(states, (0, -states.shape[-1] % GROUP))
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // GROUP, GROUP)
