"""Models whose code comes with the checkpoint (`trust_remote_code=True`): the cache they take, and their errors explained."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.errors import RabbitError, UnsupportedArchitectureError, first_line
from rabbit_engine.transformers_bridge.forwards import CACHE_NAMES, cache_keyword
from rabbit_engine.transformers_bridge.remote_code import came_through_remote_code, is_remote, says_it_takes_cache_objects

MISFITS = (AttributeError, AssertionError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
"""What code raises on a version of transformers that it was not written for."""


def keeps_tuples(cls: type[PreTrainedModel]) -> bool:
    """Whether a repository's class keeps keys and values in tuples, as all did before transformers had cache objects.

    Such a class neither declares support for cache objects nor mentions one in its code.
    """
    if not is_remote(cls) or says_it_takes_cache_objects(cls):
        return False
    return re.search(r"\b(\w+)?Cache\b", Path(inspect.getfile(cls)).read_text(encoding="utf-8", errors="replace")) is None


def misfit(written: str | None, where: str, error: BaseException) -> UnsupportedArchitectureError:
    """The error for a repository's code that fails on the installed transformers.

    `written` is the version that it was written for; `where` completes "failed ...".
    """
    return UnsupportedArchitectureError(
        f"the checkpoint's own code failed {where}: {type(error).__name__}: {first_line(error)}. It was written for transformers "
        f"{written or 'of another version'}, {transformers.__version__} is installed: use a version of the model that "
        "transformers has a class for"
    )


def written_for(config: PretrainedConfig) -> str | None:
    """The version of transformers that saved the config."""
    return getattr(config, "transformers_version", None)


def explain_failures(model: PreTrainedModel) -> None:
    """Make a repository's model raise an explained error if its own code fails in a forward or in preparing one."""
    if is_remote(type(model)):
        for name in ("forward", "prepare_inputs_for_generation"):
            setattr(model, name, _explained(getattr(model, name), written_for(model.config)))


def rename_caches(model: PreTrainedModel) -> None:
    """Pass the cache to a repository's modules under their own name for it, whatever the installed transformers calls it.

    Otherwise a method that takes `**kwargs` would silently compute without the past.
    """
    for module in model.modules():
        if is_remote(type(module)):
            module.forward = _renaming(module.forward)
    if is_remote(type(model)):
        generating: Any = model
        generating.prepare_inputs_for_generation = _renaming(generating.prepare_inputs_for_generation)


def _renaming(method: Callable[..., Any]) -> Callable[..., Any]:
    own = cache_keyword(method)
    if own is None:
        return method
    others = [name for name in CACHE_NAMES if name not in inspect.signature(method).parameters]

    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> Any:
        for name in others:
            if name in kwargs:
                kwargs.setdefault(own, kwargs.pop(name))
        return method(*args, **kwargs)

    return call


def _explained(method: Callable[..., Any], written: str | None) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> Any:
        try:
            return method(*args, **kwargs)
        except RabbitError:
            raise
        except MISFITS as error:
            if not came_through_remote_code(error):
                raise
            raise misfit(written, f"in {method.__name__}", error) from error

    return call
