"""Query heads that share keys attend to them without copies, and compute the same bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from far import Blocks
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rabbit_engine.caches import attention_over_blocks, with_far_blocks
from rabbit_engine.transformers_bridge.attention import AttentionFunction
from rabbit_engine.transformers_bridge.grouped_heads import with_shared_keys

TOKENS = 75


def states(heads: int, tokens: int, dtype: torch.dtype, width: int = 16) -> torch.Tensor:
    """[1, heads, tokens, width] as a projection gives them: [1, tokens, heads, width] transposed."""
    made = torch.randn(1, tokens, heads, width, generator=torch.Generator().manual_seed(heads * tokens))
    return made.to(dtype).transpose(1, 2)


def mask_of(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((1, 1, rows, TOKENS), torch.finfo(dtype).min, dtype=dtype).triu_(TOKENS - rows + 1)


def module(groups: int) -> Any:
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the kernel, whether its keys are another memory than those of `keys.data_ptr()`."""
    seen: list[bool] = []
    kernel = functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **keywords: Any) -> torch.Tensor:
        seen.append(key.untyped_storage().nbytes() > TOKENS * 3 * 16 * key.element_size())
        return kernel(query, key, value, **keywords)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    return seen


def shared() -> AttentionFunction:
    return with_shared_keys("sdpa", sdpa_attention_forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 19, TOKENS])
@pytest.mark.parametrize("groups", [2, 3])
def test_no_keys_are_copied_and_the_bits_stay(dtype: torch.dtype, rows: int, groups: int, copied: list[bool]) -> None:
    query, key, value = states(3 * groups, rows, dtype), states(3, TOKENS, dtype), states(3, TOKENS, dtype, 8)
    for values in (key, value):
        call = (module(groups), query, key, values, mask_of(rows, dtype))
        expected, _ = sdpa_attention_forward(*call, scaling=0.3)
        found, weights = shared()(*call, scaling=0.3, position_ids=torch.arange(rows))
        assert found.equal(expected)
        assert (found.is_contiguous(), weights) == (True, None)
    assert copied == [True, False] * 2


def test_what_the_heads_differ_in_is_left_to_transformers(copied: list[bool]) -> None:
    query, key = states(6, 5, torch.float32), states(3, TOKENS, torch.float32)
    mask = mask_of(5, torch.float32)
    of_heads = mask.expand(1, 6, -1, -1) + torch.randn(1, 6, 1, 1)
    for given in (of_heads, mask):
        expected, _ = sdpa_attention_forward(module(2), query, key, key, given)
        assert shared()(module(2), query, key, key, given)[0].equal(expected)
    assert copied == [True, True, True, False]
    for texts in (query.repeat(2, 1, 1, 1),):
        keys = key.repeat(2, 1, 1, 1)
        expected, _ = sdpa_attention_forward(module(2), texts, keys, keys, mask)
        assert shared()(module(2), texts, keys, keys, mask)[0].equal(expected)


def test_no_keys_are_copied_where_some_text_of_the_process_is_in_pieces(copied: list[bool]) -> None:
    """Functions that attend over blocks stay for the rest of the process, inside of others; outside where a class is tried."""
    query, key = states(6, 5, torch.float32), states(3, TOKENS, torch.float32)
    mask, far = mask_of(5, torch.float32), Blocks(key[:, :, :70], key[:, :, :70], 20)
    expected, _ = sdpa_attention_forward(module(2), query, key, key, mask)
    inside = with_shared_keys("sdpa", attention_over_blocks("sdpa", sdpa_attention_forward))
    for attend in (inside, attention_over_blocks("sdpa", shared())):
        copied.clear()
        assert attend(module(2), query, key, key, mask)[0].equal(expected)
        assert copied == [False]
        found, _ = attend(module(2), query, *with_far_blocks(key[:, :, 70:], key[:, :, 70:], far), mask)
        torch.testing.assert_close(found, expected)


def test_other_functions_stay_as_they_are() -> None:
    assert with_shared_keys("eager", print) is print
