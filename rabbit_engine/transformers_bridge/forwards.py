"""Arguments and results of a model's forward, under the names of the installed transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "past_key_value")
"""Names of the cache of keys and values, newest first: `cache` in layers since transformers 5.24."""


def cache_keyword(forward: Callable[..., Any]) -> str | None:
    """The keyword for the cache of a forward; None if it has none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none.

    Looked up by key: transformers warns if an attribute with a cache's old name is read, even if it does not exist.
    """
    names = set(output.keys()) if isinstance(output, Mapping) else ()
    return next((output[name] for name in CACHE_NAMES if name in names), None)


def cache_argument(forward: Callable[..., Any], cache: object) -> dict[str, Any]:
    """The keyword argument that passes `cache` to a forward; empty without a cache, or if the forward takes none."""
    name = cache_keyword(forward)
    return {} if name is None or cache is None else {name: cache}


def no_cache_argument(forward: Callable[..., Any]) -> dict[str, bool]:
    """The keyword argument with which a forward keeps no cache; empty if it never does."""
    return {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}


def last_logits_argument(forward: Callable[..., Any], count: int = 1) -> dict[str, int]:
    """The keyword argument that limits the head to the last `count` positions; empty if it always runs on all."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(forward).parameters else {}


def capturing_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of transformers on a module, which take it, anything, and its output, if a forward returns what they look for."""
    return [hook for hook in module._forward_hooks.values() if is_capturing(hook)]


def is_capturing(hook: object) -> bool:
    """Whether it is a hook of transformers, which it leaves on modules once a forward returned what is inside the model; then it
    does nothing unless another forward does."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
