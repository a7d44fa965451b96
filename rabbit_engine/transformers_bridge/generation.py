"""The generation config that `generate` uses, the settings it rejects, and its loop over tokens."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel

from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of

Class = TypeVar("Class", bound=type[PreTrainedModel])

Asked = Callable[[str], Any]
"""What `generate` uses for a setting, by its name; None where nobody sets it."""

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


def settings_of(given: Mapping[str, Any], config: object, own: object) -> Asked:
    """The settings of a call: its keywords `given`, else what its generation config sets, else what the model's `own` does."""

    def asked(name: str) -> Any:
        if name in given:
            found = given[name]
        else:
            found = next((value for each in (config, own) if (value := getattr(each, name, None)) is not None), None)
        return None if name == "cache_implementation" and found == "hybrid" else found  # the former name of the default

    return asked


def makes_dynamic_cache(config: GenerationConfig) -> bool:
    """Whether `generate` with this config makes the default kind of cache."""
    return config.use_cache is not False and config.cache_implementation in (None, "dynamic", "hybrid")


def own_cache(forward: Callable[..., Any], cache: Any, *, assists: bool = False) -> dict[str, Any]:
    """The keywords with which `generate` uses the new `cache` as if it had made it, also where a setting names that kind; empty
    without a cache, or if the forward takes none. An assistant, which `assists` another model, takes back what it guessed."""
    found = cache_argument(forward, cache)
    if found and assists:
        cache.activate_past_recording()
    return found | {"cache_implementation": None} if found else {}


def without_cache_objects(cls: Class) -> Class:
    """A class decorator: `generate` passes the forward no cache; it makes its own."""
    cls._supports_default_dynamic_cache = classmethod(lambda _: False)  # type: ignore[attr-defined]
    return cls


def takes_cache_objects(model: Any) -> bool:
    """Whether `generate` passes the forward of a model, or of a class, a cache that it made."""
    cls = model if isinstance(model, type) else type(model)
    takes = getattr(cls, "_supports_default_dynamic_cache", None)
    return takes is not None and bool(takes())


@dataclass(frozen=True, slots=True)
class DecodingLoop:
    """A call of the loop of `generate` that decodes token by token, greedily or drawn; `run` runs it.

    `input_ids` [sequences, tokens] are the prompts, `most_tokens` their length with the longest answer, `keywords` the model's.
    `returns_cache`: the cache outlives the call, as part of the output or because it is the caller's own.
    """

    input_ids: torch.Tensor
    config: GenerationConfig
    most_tokens: int
    keywords: Mapping[str, Any]
    returns_cache: bool
    run: Callable[[], Any]


def around_decoding(cls: type, around: Callable[[Any, DecodingLoop], Any]) -> dict[str, Any]:
    """Attributes of a subclass of `cls` whose `generate` calls `around(model, loop)` where `cls` would run the loop.

    Empty for a class that does not generate.
    """
    original = getattr(cls, "_sample", None)
    if original is None:
        return {}

    @functools.wraps(original)
    def sample(
        self: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **keywords: Any
    ) -> Any:
        run = functools.partial(original, self, input_ids, logits_processor, stopping_criteria, generation_config, **keywords)
        most = stopping_criteria.max_length or generation_config.max_length
        own = any(getattr(value, "_is_user_defined", False) for value in keywords.values())
        returns_cache = own or bool(generation_config.return_dict_in_generate)
        return around(self, DecodingLoop(input_ids, generation_config, most, keywords, returns_cache, run))

    return {"_sample": sample}


def around_new_caches(cls: type, adapt: Callable[[Any, Any], None]) -> dict[str, Any]:
    """Attributes of a subclass of `cls` whose `generate` shows `adapt(model, cache)` each cache that it made, before its use.

    Empty for a class that does not generate.
    """
    original = getattr(cls, "_prepare_cache_for_generation", None)
    if original is None:
        return {}

    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **keywords: Any) -> Any:
        given = cache_of(model_kwargs)
        result = original(self, generation_config, model_kwargs, *args, **keywords)
        if given is None and (made := cache_of(model_kwargs)) is not None:
            adapt(self, made)
        return result

    return {"_prepare_cache_for_generation": prepare}


def refused_by_generate(error: BaseException) -> bool:
    """Whether `generate` itself raised `error`, rather than the model: then the settings are wrong."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(_REFUSING)
