"""Linear layers compute transformers' bits without copying their weights, for any memory layout of their input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rabbit_engine.config import Cut
from rabbit_engine.streaming.binding.linears import linear


class Products(TorchDispatchMode):
    """Sees the operations that run, and the largest result of one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        if not any(returned.alias_info is not None for returned in func._schema.returns):  # no view
            self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if hasattr(leaf, "numel"))])
        return result


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """States of width 64 in the memory layouts in which families pass them to their layers."""
    return {
        "row behind row": torch.randn(2, 7, 64, dtype=dtype),
        "the last position": torch.randn(1, 7, 64, dtype=dtype)[:, -1:],
        "the last positions": torch.randn(3, 7, 64, dtype=dtype)[:, -1:],
        "transposed": torch.randn(2, 64, 7, dtype=dtype).transpose(1, 2),
        "half of a wider one": torch.randn(2, 7, 128, dtype=dtype)[..., :64],
        "heads transposed": torch.randn(2, 7, 3, 64, dtype=dtype).transpose(1, 2),
        "one row": torch.randn(64, dtype=dtype),
    }


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_input_gives_the_bits_of_a_layer_that_may_be_trained(dtype: torch.dtype, bias: bool) -> None:
    layer = nn.Linear(64, 96, bias=bias, dtype=dtype)
    with torch.no_grad():
        for how, states in inputs(dtype).items():
            own = layer(states)
            with Products() as seen:
                ours = linear(states, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
            assert torch.equal(ours, own), how
            assert "aten::bmm" not in seen.names, how


@pytest.mark.parametrize("cut", [None, Cut(least_bytes=1, most_bytes=2048)], ids=["resident", "in blocks"])
def test_a_prompt_does_not_copy_the_head(cut: Cut | None, own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint("llama", vocab_size=4096, dtype=torch.bfloat16)
    model = streamed(folder, **({"max_memory": {"cpu": "10MB"}} if cut is None else {"cut": cut}))
    with torch.no_grad(), Products() as seen:
        model(torch.full((2, 9), 5), logits_to_keep=1)
    assert seen.largest <= 2 * 4096  # the logits of two prompts; the head has 4,096 x 32


def test_a_batch_of_prompts_gets_the_bits_of_transformers(own_checkpoint: Any, streamed: Any, plain: Any) -> None:
    folder = own_checkpoint("llama", hidden_size=64, vocab_size=512)
    prompts = torch.randint(3, 500, (5, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = streamed(folder, max_memory={"cpu": "10MB"})(prompts, logits_to_keep=1).logits
        assert torch.equal(ours, plain(folder)(prompts, logits_to_keep=1).logits)
