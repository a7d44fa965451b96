"""For a function that states its keywords once, in its first overload, and takes them as `**keywords`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_overloads

Function = TypeVar("Function", bound=Callable[..., Any])


def signed_as_overload(function: Function) -> Function:
    """Give `function` the signature of its first overload, for `help` and `inspect.signature`."""
    first = get_overloads(function)[0]
    function.__signature__ = inspect.signature(getattr(first, "__func__", first))  # type: ignore[attr-defined]
    return function


def arguments_of(signature: inspect.Signature, *positional: Any, **keywords: Any) -> dict[str, Any]:
    """All parameters by name, each with its value in such a call or its default. Raises TypeError."""
    bound = signature.bind(*positional, **keywords)
    bound.apply_defaults()
    return bound.arguments
