"""Keys and values in eight bits are within the stated bounds of what they were."""

from __future__ import annotations

import math

import pytest
import torch

from rabbit_engine.caches import decode_states, encode_states, scales_shape
from rabbit_engine.caches.int8_states import GROUP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(width: int, dtype: torch.dtype) -> torch.Tensor:
    """With heads and tokens of very different sizes, some too small for a scale."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.logspace(-42 if dtype != torch.float16 else -7, 30 if dtype != torch.float16 else 4, 6 * 50).reshape(
        2, 3, 50, 1
    )
    return (torch.randn(2, 3, 50, width, generator=generator).clamp(-4, 4) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 32, 64, 80, 129])
def test_errors_are_within_half_a_scale(width: int, dtype: torch.dtype) -> None:
    original = states(width, dtype)
    integers, scales = encode_states(original)
    decoded = decode_states(integers, scales, dtype)
    assert (integers.dtype, integers.shape, integers.is_contiguous()) == (torch.int8, original.shape, True)
    assert (scales.dtype, scales.shape) == (torch.bfloat16, scales_shape(original.shape))
    assert (decoded.dtype, decoded.shape) == (dtype, original.shape)
    each = scales.double().repeat_interleave(GROUP, -1)[..., :width]
    exact = torch.where(each == 0, 2.0**-119, each / 2)
    rounding = original.double().abs().add(exact) * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
    assert ((decoded.double() - original.double()).abs() <= exact + rounding).all()
    largest = torch.stack([part.double().abs().amax(-1) for part in original.split(GROUP, -1)], -1)
    assert (scales.double() <= largest / 127 * (1 + 2**-8)).all()


def test_what_was_decoded_is_encoded_to_itself() -> None:
    integers, scales = encode_states(states(64, torch.float32))
    again, same = encode_states(decode_states(integers, scales, torch.float32))
    assert again.equal(integers)
    assert same.equal(scales)


def test_zeros_stay_zeros_and_signs_stay() -> None:
    original = torch.zeros(1, 2, 3, 70)
    original[0, 1, 2, 69] = -5
    integers, scales = encode_states(original)
    assert (integers[0, 1, 2, 69], int(integers.count_nonzero()), int(scales.count_nonzero())) == (-127, 1, 1)
    assert decode_states(integers, scales, torch.float32)[0, 1, 2, 69] == pytest.approx(-5, rel=2**-8)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_group_with_what_is_no_number_decodes_to_nan(wrong: float, dtype: torch.dtype) -> None:
    original = torch.ones(1, 1, 2, 64, dtype=dtype)
    original[0, 0, 1, 40] = wrong
    integers, scales = encode_states(original)
    decoded = decode_states(integers, scales, dtype)
    assert not integers[0, 0, 1, 32:].any()
    assert decoded[0, 0, 1, 32:].isnan().all()
    assert torch.allclose(decoded[0, 0, 0].float(), torch.ones(64), atol=2**-7)
    assert torch.allclose(decoded[0, 0, 1, :32].float(), torch.ones(32), atol=2**-7)


def test_no_tokens_are_encoded_to_none() -> None:
    integers, scales = encode_states(torch.zeros(1, 2, 0, 40))
    assert decode_states(integers, scales, torch.float16).shape == (1, 2, 0, 40)


def test_bytes_of_a_block() -> None:
    integers, scales = encode_states(torch.ones(1, 2, 256, 64, dtype=torch.bfloat16))
    assert integers.nbytes + scales.nbytes == 256 * 2 * 64 * 8.5 / 8
