"""What transformers calls a text's keys and values: `cache` from 5.24 on, `past_key_values` or `cache_params` before that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "past_key_value")
"""Newest first."""


def cache_keyword(method: Callable[..., Any]) -> str | None:
    """The keyword that a forward takes a cache by; None where it names none."""
    parameters = inspect.signature(method).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none.

    Asked by keys: transformers warns where an output is asked for a cache's old name, even in vain.
    """
    names = set(output.keys()) if isinstance(output, Mapping) else ()
    return next((output[name] for name in CACHE_NAMES if name in names), None)


def cache_argument(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to a forward; empty where there is no cache or the forward takes none."""
    name = cache_keyword(forward)
    return {} if name is None or cache is None else {name: cache}
