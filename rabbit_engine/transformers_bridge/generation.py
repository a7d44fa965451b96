"""The generation config that `generate` uses, and the settings it rejects."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

Class = TypeVar("Class", bound=type[PreTrainedModel])

_REFUSING = ("transformers.generation.", "transformers.cache_utils")
"""Modules that raise if settings of `generate` do not fit."""


def read_generation_config(model: PreTrainedModel, folder: Path | str, *, trust_remote_code: bool = False) -> None:
    """Give `model` the generation config of a folder, and the `generate` of its code, like `from_pretrained`.

    A folder without generation_config.json uses the settings in its config.json. Raises whatever the config class does.
    """
    generating: Any = model
    generating.adjust_generation_fn(
        None, None, None, str(folder),
        cache_dir=None, force_download=False, proxies=None, local_files_only=True, token=None, revision=None,
        subfolder="", trust_remote_code=trust_remote_code,
    )  # fmt: skip


def without_cache_objects(cls: Class) -> Class:
    """A class decorator: `generate` passes the forward no cache; it makes its own."""
    cls._supports_default_dynamic_cache = classmethod(lambda _: False)  # type: ignore[attr-defined]
    return cls


def refused_by_generate(error: BaseException) -> bool:
    """Whether `generate` itself raised `error`, rather than the model: then the settings are wrong."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(_REFUSING)
