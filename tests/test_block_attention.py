"""Attention over blocks of keys and values is attention over all of them, within the bound that its module states."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from far import stated_bound
from torch.nn import functional

from rabbit_engine.caches import attend_by_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(rows: int, tokens: int, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, width: int = 24, **more: Any) -> Any:
    """Queries, keys and values of two texts, with a few large keys as real ones have."""
    generator = torch.Generator().manual_seed(rows + tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    query, keys = normal(heads, rows, width), normal(kv_heads, tokens, width)
    keys[..., ::7, :3] *= 9
    values = normal(kv_heads, tokens, more.get("value_width", width))
    return [tensor.to(dtype) for tensor in (query, keys, values)]


def cut(keys: torch.Tensor, values: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(keys.split(size, dim=2), values.split(size, dim=2), strict=True)


def causal_mask(rows: int, tokens: int, window: int | None = None) -> torch.Tensor:
    row, key = torch.arange(tokens - rows, tokens)[:, None], torch.arange(tokens)
    return (key <= row) & (key > row - (window or tokens + 1))


def exact(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """The definition in float64 and S, the largest sum of the bound."""
    group, rows = query.shape[1] // keys.shape[1], query.shape[2]
    query, keys, values = query.double(), *(t.double().repeat_interleave(group, 1) for t in (keys, values))
    scaling = options.get("scaling") or 1 / math.sqrt(query.shape[-1])
    scores = query @ keys.mT * scaling
    largest = float((query.abs() @ keys.abs().mT * scaling).max())
    if cap := options.get("softcap"):
        scores, largest = (scores / cap).tanh() * cap, largest + cap
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
        largest += float(mask[mask > -1e4].abs().amax()) if (mask > -1e4).any() else 0
    elif mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if options.get("causal", True):
        scores = scores.masked_fill(~causal_mask(rows, keys.shape[2], options.get("window")), -math.inf)
    if (sinks := options.get("sinks")) is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[2]].nan_to_num()
    return weights @ values, largest


def is_within(result: torch.Tensor, expected: torch.Tensor, error: float) -> bool:
    rounding = (expected.abs() + error) * torch.finfo(result.dtype).eps / 2 + torch.finfo(result.dtype).smallest_normal
    return bool(((result.double() - expected).abs() <= error + rounding).all())


MASKS: dict[str, Any] = {
    "none": lambda rows, tokens: None,
    "padding": lambda rows, tokens: (torch.arange(tokens) >= torch.tensor([[0], [9]]))[:, None, None],
    "any": lambda rows, tokens: torch.rand(2, 6, rows, tokens, generator=torch.Generator().manual_seed(0)) < 0.3,
    "additive": lambda rows, tokens: torch.randn(1, 6, rows, tokens, generator=torch.Generator().manual_seed(0)) * 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "softcap": {"softcap": 5.0, "scaling": 0.4},
    "sinks": {"sinks": torch.linspace(-3, 9, 6)},
    "all seen": {"causal": False},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 37, 512])
@pytest.mark.parametrize("size", [64, 600])
def test_errors_are_within_the_stated_bounds(rows: int, dtype: torch.dtype, size: int) -> None:
    query, keys, values = states(rows, 777, dtype)
    result = attend_by_blocks(query, cut(keys, values, size), 777)
    expected, largest = exact(query, keys, values, None, {})
    error = stated_bound(query, values, largest, size)
    assert (result.dtype, result.shape) == (dtype, query.shape)
    assert is_within(result, expected, error)
    sdpa = functional.scaled_dot_product_attention(query, keys, values, causal_mask(rows, 777), enable_gqa=True)
    rounding = 2 * torch.finfo(dtype).eps * float(values.abs().max())
    assert float((result.double() - sdpa.double()).abs().max()) <= 2 * error + rounding


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("rows", [1, 20])
def test_masks_windows_caps_and_sinks_are_those_of_the_definition(rows: int, mask: Any, options: dict[str, Any]) -> None:
    query, keys, values = states(rows, 150, torch.float32, value_width=10)
    given = mask(rows, 150)
    result = attend_by_blocks(query, cut(keys, values, 16), 150, mask=given, **options)
    expected, largest = exact(query, keys, values, given, options)
    assert is_within(result, expected, stated_bound(query, values, largest, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing_are_zero_and_the_others_as_without_them(dtype: torch.dtype) -> None:
    query, keys, values = states(5, 40, dtype)
    mask = causal_mask(5, 40)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :3] = False
    result = attend_by_blocks(query, cut(keys, values, 8), 40, mask=mask, causal=False)
    assert not result[1, :, :3].any()
    assert result[0].equal(attend_by_blocks(query, cut(keys, values, 8), 40)[0])
    lowest = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)  # as eager attention masks: the mean of all values
    mean = attend_by_blocks(query, cut(keys, values, 8), 40, mask=lowest, causal=False)[1, :, :3]
    close = values[1].float().mean(1)[:, None].repeat_interleave(3, 0)
    assert dtype == torch.float16 or torch.allclose(mean.float(), close.expand_as(mean), atol=0.02)
    assert mean.isfinite().all()


def test_a_nan_stays_in_the_rows_that_see_it() -> None:
    query, keys, values = states(4, 30, torch.float32)
    keys[0, 0, 28] = math.nan
    result = attend_by_blocks(query, cut(keys, values, 8), 30)
    assert result[0, :3, 2:].isnan().all()
    assert result[0, :3, :2].isfinite().all()
    assert result[0, 3:].isfinite().all()
    assert result[1].isfinite().all()


def test_blocks_before_the_window_are_not_computed_and_one_block_lives_at_a_time() -> None:
    query, keys, values = states(2, 64, torch.float32)
    expected = attend_by_blocks(query, cut(keys, values, 8), 64, window=10)
    keys[..., :48, :] = math.nan  # the first row sees keys from 53
    assert attend_by_blocks(query, cut(keys, values, 8), 64, window=10).equal(expected)

    def reused() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        own_keys, own_values = keys[..., :8, :].clone(), values[..., :8, :].clone()
        for block_keys, block_values in cut(keys, values, 8):
            yield own_keys.copy_(block_keys), own_values.copy_(block_values)

    assert attend_by_blocks(query, reused(), 64, window=10).equal(expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_edge_of_a_window_may_lie_in_any_block(rows: int, size: int) -> None:
    query, keys, values = states(rows, 10, torch.float32)
    for window in range(1, 12):
        expected, largest = exact(query, keys, values, None, {"window": window})
        result = attend_by_blocks(query, cut(keys, values, size), 10, window=window)
        assert is_within(result, expected, stated_bound(query, values, largest, size)), window


def test_autocast_does_not_take_the_float32_away() -> None:
    query, keys, values = states(3, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = attend_by_blocks(query, cut(keys, values, 16), 40)
    assert result.equal(attend_by_blocks(query, cut(keys, values, 16), 40))


def test_shapes_are_known_on_the_meta_device() -> None:
    query, keys, values = (tensor.to("meta") for tensor in states(3, 40, torch.bfloat16, value_width=10))
    result = attend_by_blocks(query, cut(keys, values, 16), 40, window=9)
    assert (result.shape, result.dtype, result.is_meta) == ((2, 6, 3, 10), torch.bfloat16, True)
    assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.float32


def test_missing_tokens_and_masks_of_others_are_errors() -> None:
    query, keys, values = states(2, 24, torch.float32)
    with pytest.raises(ValueError, match="hold 16 tokens of 24"):
        attend_by_blocks(query, list(cut(keys, values, 8))[:2], 24)
    with pytest.raises(ValueError, match="mask is for 23 tokens, the keys are of 24"):
        attend_by_blocks(query, cut(keys, values, 8), 24, mask=torch.ones(1, 1, 2, 23, dtype=torch.bool))
    with pytest.raises(ValueError, match="6 heads cannot share the keys of 4"):
        attend_by_blocks(query, cut(*states(2, 24, torch.float32, kv_heads=4)[1:], 8), 24)
