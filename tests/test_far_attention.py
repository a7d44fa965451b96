"""Models of transformers over a cache in blocks: their own answers, or an error, and never another text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
from far import Blocks, FarLayer, far_cache, stated_bound, uses
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import eager_attention_forward

from rabbit_engine.caches import FarStates, attend_by_blocks, attention_over_blocks, with_far_blocks
from rabbit_engine.errors import FarStatesError
from rabbit_engine.transformers_bridge import attention
from rabbit_engine.transformers_bridge.attention import wrapped_attention

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")

OWN_ATTENTION = {"bloom": "reshape", "falcon": "scaled_dot_product_attention", "mpt": "transpose"}
LATENT = {"deepseek_v2": "linear", "deepseek_v3": "linear"}
RAISING = OWN_ATTENTION | LATENT
OTHERS = sorted({*families.FAMILIES, *families.MORE} - {*RAISING, "mamba", "mamba2", "falcon_h1"})
"""All that have a layer of keys and values alone."""


def growing(config: Any) -> DynamicCache:
    """A cache with no layer that slides, as a caller may make it."""
    cache = DynamicCache(config=config)
    cache.layers = [DynamicLayer() if isinstance(layer, DynamicLayer) else layer for layer in cache.layers]
    return cache


def logits_in_passes(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        passes = [model(part, use_cache=True, past_key_values=cache).logits for part in ids.split([20, 11, 1, 1, 7], dim=1)]
    return torch.cat(passes, dim=1)


@pytest.fixture
def long_ids() -> torch.Tensor:
    return torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", OTHERS)
def test_families_compute_what_they_do_over_a_cache_in_memory(family: str, long_ids: torch.Tensor) -> None:
    model = families.build(family)
    expected = logits_in_passes(model, growing(model.config), long_ids)
    cache = far_cache(model.config, window=False)
    with wrapped_attention(attention_over_blocks):
        result = logits_in_passes(model, cache, long_ids)
    assert uses(cache) >= 4
    assert torch.allclose(result, expected, rtol=0, atol=3e-6 * max(1, float(expected.abs().max())))


@pytest.mark.parametrize("family", RAISING)
def test_families_that_attend_by_their_own_code_raise(family: str, long_ids: torch.Tensor) -> None:
    model = families.build(family)
    with wrapped_attention(attention_over_blocks), pytest.raises(FarStatesError, match=f"`{RAISING[family]}`"):
        logits_in_passes(model, far_cache(model.config), long_ids)


def test_without_the_wrapper_a_cache_in_blocks_raises(long_ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    monkeypatch.setattr(attention, "_WRAPPERS", [])  # texts in pieces have wrapped the look-ups for good
    with pytest.raises(FarStatesError, match="only the newest are in memory"):
        logits_in_passes(model, far_cache(model.config), long_ids)


def compared(errors: list[float]) -> Callable[[str, Any], Any]:
    """Attention over blocks, which notes how far it is from the model's own over all keys, in units of what is stated."""

    def wrap(name: str, native: Any) -> Any:
        far = attention_over_blocks(name, native)

        def attention(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            result = far(module, query, key, value, mask, **kwargs)
            if isinstance(key, FarStates):
                keys, values = (
                    torch.cat([*part, last.near], 2)
                    for part, last in zip(zip(*key.far.blocks(), strict=True), (key, value), strict=True)
                )
                own = native(module, query, keys, values, mask, **kwargs)[0]
                largest = float(query.float().abs().amax() * keys.float().abs().amax()) * keys.shape[-1] * module.scaling
                bound = stated_bound(query, values, largest + (kwargs.get("softcap") or 0), 4)
                bound = 2 * bound + 2 * torch.finfo(query.dtype).eps * float(values.abs().max())
                errors.append(float((own.double() - result[0].double()).abs().max()) / bound)
            return result

        return attention

    return wrap


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("mistral", torch.float32),
        ("mistral", torch.bfloat16),
        ("gemma2", torch.float32),
        ("gpt_oss", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [True, False], ids=["layers slide", "layers grow"])
def test_generate_gives_the_same_tokens(family: str, dtype: torch.dtype, window: bool, padded: Any) -> None:
    model = families.build(family, dtype)
    options = {**padded, "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**options, past_key_values=DynamicCache(config=model.config) if window else growing(model.config))
    cache, errors = far_cache(model.config, window), list[float]()
    with wrapped_attention(compared(errors)):
        result = model.generate(**options, past_key_values=cache)
    assert result.equal(expected)
    assert bool(errors) == (uses(cache) > 0) == (family != "mistral" or not window)
    assert max(errors, default=0) <= 1


def test_any_other_cache_is_attended_to_bit_for_bit(padded: Any) -> None:
    for family in ("llama", "gemma2"):
        model = families.build(family, torch.bfloat16)
        with torch.inference_mode():
            expected = model(**padded).logits
            with wrapped_attention(attention_over_blocks):
                assert model(**padded).logits.equal(expected)


# the function itself


class Causal(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def native(name: str) -> Any:
    return AttentionInterface()[name] if name != "eager" else eager_attention_forward


def attend(name: str, *args: Any, **kwargs: Any) -> Any:
    return attention_over_blocks(name, native(name))(Causal(), *args, **kwargs)


@pytest.fixture
def attended() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 5), (2, 19), (2, 19)))  # type: ignore[return-value]


def far_of(keys: torch.Tensor, values: torch.Tensor) -> Any:
    return with_far_blocks(keys[:, :, 12:], values[:, :, 12:], Blocks(keys[:, :, :12], values[:, :, :12], 5))


@pytest.mark.parametrize("padding", [None, torch.arange(19) >= torch.tensor([[0], [6]])], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 7])
def test_implementations_with_a_padding_mask_know_what_is_causal(attended: Any, padding: Any, window: int | None) -> None:
    query, keys, values = attended
    seen = torch.ones(5, 19, dtype=torch.bool).tril(14)
    seen = seen if window is None else seen.triu(14 - window + 1)
    mask = seen[None, None] if padding is None else seen & padding[:, None, None]
    expected = attend_by_blocks(query, [(keys, values)], 19, mask=mask, causal=False).transpose(1, 2)
    result, weights = attend("flash_attention_2", query, *far_of(keys, values), padding, scaling=None, sliding_window=window)
    assert weights is None
    assert torch.allclose(result, expected, atol=1e-6)


def test_sdpa_ignores_a_softcap_and_sinks_or_refuses_them_as_it_does_itself(attended: Any) -> None:
    query, keys, values = attended
    expected, _ = attend("sdpa", query, *far_of(keys, values), None)
    assert attend("sdpa", query, *far_of(keys, values), None, s_aux=torch.ones(4))[0].equal(expected)
    try:
        native("sdpa")(Causal(), query, keys, values, None, softcap=2.0)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            attend("sdpa", query, *far_of(keys, values), None, softcap=2.0)
    else:
        assert attend("sdpa", query, *far_of(keys, values), None, softcap=2.0)[0].equal(expected)


def test_without_a_mask_eager_attention_sees_all(attended: Any) -> None:
    query, keys, values = attended
    result, _ = attend("eager", query, *far_of(keys, values), None)
    scores = query @ keys.repeat_interleave(2, 1).mT / math.sqrt(8)
    assert torch.allclose(result, (scores.softmax(-1) @ values.repeat_interleave(2, 1)).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"dropout": 0.1}, "dropout"), ({"position_bias": torch.zeros(1)}, "position_bias"), ({"indices": 1, "a": 2}, "a, indices")],
)
def test_what_would_change_the_result_is_refused(attended: Any, arguments: dict[str, Any], said: str) -> None:
    query, keys, values = attended
    with pytest.raises(FarStatesError, match=f"does not know {said}"):
        attend("sdpa", query, *far_of(keys, values), None, **arguments)


def test_functions_that_are_not_transformers_own_are_refused(attended: Any) -> None:
    query, keys, values = attended

    def own(*args: Any) -> Any:
        return "own"

    for name, function in (("sdpa", own), ("mine", native("sdpa")), ("flex_attention", native("flex_attention"))):
        attention = attention_over_blocks(name, function)
        with pytest.raises(FarStatesError, match=f"does not know what {name} computes by .*{function.__name__}"):
            attention(Causal(), query, *far_of(keys, values), None)
    assert attention_over_blocks("sdpa", own)(Causal(), query, keys, values, None) == "own"


def test_keys_and_values_of_other_blocks_are_refused(attended: Any) -> None:
    query, keys, values = attended
    marked, own = far_of(keys, values), far_of(keys, values)
    for pair in ((marked[0], own[1]), (marked[0], values), (keys, marked[1])):
        with pytest.raises(FarStatesError, match="apart"):
            attend("sdpa", query, *pair, None)


# the states


def test_states_show_the_shape_of_all_tokens_and_nothing_computes_with_them(attended: Any) -> None:
    states, _ = far_of(*attended[1:])
    assert states.shape == states.size() == (2, 2, 19, 8)
    assert (states.size(-2), states.shape[2], states.numel(), states.dim(), states.ndim) == (19, 19, 608, 4, 4)
    assert (states.dtype, states.device, states.is_cuda) == (torch.float32, torch.device("cpu"), False)
    assert states.to("cpu") is states.contiguous() is states.to(torch.float32) is states
    assert repr(states) == "FarStates([2, 2, 7, 8] after 12 tokens in blocks)"
    computations: list[Callable[[], Any]] = [
        lambda: states + 1,
        lambda: 1 * states,
        lambda: states[:, :, -1],
        lambda: states.mT,
        lambda: states.double(),
        lambda: states.to(torch.bfloat16),
        lambda: torch.cat([torch.ones(1), states]),
        lambda: torch.ones(8) @ states,
        lambda: states.data,
        lambda: states.clone(),
        lambda: states.copy_(states),
        lambda: torch.ones(2, 2, 7, 8).copy_(states),
        lambda: states.numpy(),
        lambda: list(states),
        lambda: nn.functional.scaled_dot_product_attention(states, states, states),
    ]
    for computation in computations:
        with pytest.raises(FarStatesError):
            computation()


def test_a_layer_with_little_text_shows_plain_states() -> None:
    keys, values = FarLayer(near=4).update(*torch.ones(2, 1, 1, 4, 2))
    assert type(keys) is type(values) is torch.Tensor
