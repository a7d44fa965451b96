"""The attention function that a model runs, those that its class supports, and where it looks them up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

AttentionFunction = Callable[..., Any]

Class = TypeVar("Class", bound=type[PreTrainedModel])


def attention_of(config: PretrainedConfig) -> str | None:
    """The attention implementation that a config names ("sdpa", "eager", ...); None if none has been chosen."""
    return getattr(config, "_attn_implementation", None)


def attention_configs(modules: Iterable[nn.Module]) -> list[PretrainedConfig]:
    """The configs in which these modules look up which attention they run."""
    configs = (getattr(module, "config", None) for module in modules)
    return list({id(config): config for config in configs if isinstance(config, PretrainedConfig)}.values())


def set_attention(config: PretrainedConfig, name: str | None) -> None:
    """Have the modules that look it up in the config run this attention."""
    config._attn_implementation = name


def has_sdpa(cls: type[PreTrainedModel]) -> bool:
    """Whether every attention layer of the class can run torch's `scaled_dot_product_attention`."""
    return bool(cls._supports_sdpa)


def has_flash_attention(cls: type[PreTrainedModel]) -> bool:
    """Whether the class can run flash attention; remote code may declare it under an older name."""
    return any(getattr(cls, name, False) for name in ("_supports_flash_attn", "_supports_flash_attn_2"))


def attention_implementations(cls: type[PreTrainedModel], config: PretrainedConfig) -> tuple[str, ...]:
    """The implementations that the class can run; none if it has no attention."""
    if getattr(config.get_text_config(decoder=True), "num_attention_heads", None) is None:
        return ()
    supported = {"eager": True, "sdpa": has_sdpa(cls), "flash_attention_2": has_flash_attention(cls)}
    return tuple(name for name, is_there in supported.items() if is_there)


def without_flash_attention(cls: Class) -> Class:
    """A class decorator: the attention needs a mask that only sdpa and eager take."""
    cls._supports_flash_attn = cls._supports_flex_attn = False
    return cls


@contextmanager
def sdpa_for_flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make every part of `model` run sdpa in place of any kernel other than sdpa and eager."""
    parts = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    before = [(config, attention_of(config)) for config in parts.values()]
    try:
        for config, name in before:
            if name not in ("eager", "sdpa"):
                config._attn_implementation = "sdpa"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


Wrapper = Callable[[str, AttentionFunction], AttentionFunction]
"""Takes the name of an implementation and its function, and returns the one that runs."""

_WRAPPERS: list[Wrapper] = []


@contextmanager
def wrapped_attention(wrap: Wrapper) -> Iterator[None]:
    """Make all models run `wrap(name, function)` in place of the attention function that they look up.

    Several may hold at once, and end in any order: the last to begin is the outermost. The name of the implementation stays, so
    that a class makes the masks it makes for it.
    """
    _let_look_ups_be_wrapped()
    _WRAPPERS.append(wrap)
    try:
        yield
    finally:
        _WRAPPERS.remove(wrap)


def wrap_attention(wrap: Wrapper) -> None:
    """As `wrapped_attention` for the rest of the process, inside of all others. Idempotent."""
    _let_look_ups_be_wrapped()
    if wrap not in _WRAPPERS:
        _WRAPPERS.insert(0, wrap)


@functools.cache
def _let_look_ups_be_wrapped() -> None:
    """Once for the process. The look-up is wrapped, as eager is not in the registry, but each model's own default."""
    native = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, attn_implementation: str, default: AttentionFunction) -> AttentionFunction:
        function: AttentionFunction = native(self, attn_implementation, default)
        for wrap in tuple(_WRAPPERS):
            function = wrap(attn_implementation, function)
        return function

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
