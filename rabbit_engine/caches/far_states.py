"""Keys and values of which only the newest are here: nothing but attention over blocks can compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from rabbit_engine.errors import FarStatesError


class FarBlocks(Protocol):
    """Keys and values of the first `tokens` of a text, outside of memory."""

    @property
    def tokens(self) -> int:
        """How many they are, at least one."""
        ...

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys [batch, kv_heads, n, width] and values [batch, kv_heads, n, value_width] of n > 0 tokens each, from first to last,
        on the device of the newest. They are not used after the next ones are asked for. Layers that share keys call it again."""
        ...


_READS = {"dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized"}
_METHODS = {"dim", "is_floating_point", "element_size", "get_device"}
_SAME = {"contiguous", "detach"}


class FarStates(torch.Tensor):
    """Keys or values of a text: `near` of its newest tokens, after those in `far`.

    Its shape is that of all the tokens. Every computation with it raises FarStatesError: a class that transforms keys after the
    cache has taken them would do that to the newest alone, and its text would be wrong.
    """

    near: torch.Tensor
    far: FarBlocks

    @property
    def tokens(self) -> int:
        """Of the whole text."""
        return self.far.tokens + self.near.shape[-2]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FarStates({list(self.near.shape)} after {self.far.tokens} tokens in blocks)"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What tells about the states, or leaves them as they are, is done; all else raises."""
        name, states = _name(func), args[0] if args else None
        if isinstance(states, FarStates):
            near, rest = states.near, (*args[1:],)
            if name in ("shape", "size", "numel"):
                return _size(states, name, *rest, **(kwargs or {}))
            if name in _READS or name in _METHODS:
                return func(near, *rest, **(kwargs or {}))
            if name in _SAME or (name == "to" and func(near, *rest, **(kwargs or {})) is near):
                return states
        raise FarStatesError(
            f"this model's class computes `{name}` with keys or values after its cache took them, and only the newest are in "
            "memory: its attention is not one of transformers' attention functions, so its cache cannot stand in blocks"
        )


def with_far_blocks(keys: torch.Tensor, values: torch.Tensor, far: FarBlocks) -> tuple[FarStates, FarStates]:
    """What the `update` of a cache's layer returns: `keys` and `values` of the newest tokens, which follow those of `far`."""
    return _marked(keys, far), _marked(values, far)


def _marked(near: torch.Tensor, far: FarBlocks) -> FarStates:
    states = near.as_subclass(FarStates)
    states.near, states.far = near, far
    return states


def _name(func: Callable[..., Any]) -> str:
    """A function's name; that of a property is not "__get__"."""
    name = getattr(func, "__name__", str(func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else name


def _size(states: FarStates, name: str, dim: int | None = None) -> Any:
    shape = torch.Size((*states.near.shape[:-2], states.tokens, states.near.shape[-1]))
    if name == "numel":
        return shape.numel()
    return shape if dim is None else shape[dim]
