"""What a model's forward takes and gives, by the names of the transformers that is installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "past_key_value")
"""What a text's keys and values are called, newest first: `cache` in layers since transformers 5.24."""


def cache_keyword(forward: Callable[..., Any]) -> str | None:
    """The keyword by which a forward takes a cache; None where it names none."""
    parameters = inspect.signature(forward).parameters
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


def last_logits_argument(forward: Callable[..., Any]) -> dict[str, int]:
    """The keyword argument that has a forward run its head on the last position alone; empty where it always runs on all."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
