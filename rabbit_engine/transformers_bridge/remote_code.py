"""Classes from a checkpoint's own code (`trust_remote_code=True`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

_PACKAGE = "transformers_modules"
"""Where transformers puts the code of repositories."""


def import_class(name: str, repo: str | Path, code_revision: str | None = None) -> Any:
    """The object `name` ("modeling_x.XForCausalLM") of a repository's code. Importing runs the code, which may raise anything."""
    return get_class_from_dynamic_module(name, str(repo), code_revision=code_revision)


def as_generating_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`cls` as `AutoModelForCausalLM` uses it: with `generate`, which classes for older versions inherited."""
    cls.register_for_auto_class(auto_class=AutoModelForCausalLM)
    generating: type[PreTrainedModel] = add_generation_mixin_to_remote_model(cls)
    return generating


def is_remote(cls: type) -> bool:
    """Whether a class comes from a repository's own code."""
    return cls.__module__.startswith(_PACKAGE)


def came_through_remote_code(error: BaseException) -> bool:
    """Whether a repository's code is on the stack between where `error` was raised and where it was caught."""
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_PACKAGE):
            return True
        trace = trace.tb_next
    return False


def says_it_takes_cache_objects(cls: type[PreTrainedModel]) -> bool:
    """Whether a class for transformers 4 declares that its forward takes a cache object instead of tuples."""
    return bool(getattr(cls, "_supports_cache_class", False))
