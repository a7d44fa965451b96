"""Chooses the attention implementation, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rabbit_engine.errors import AttentionUnavailableError
from rabbit_engine.transformers_bridge.attention import has_flash_attention, has_sdpa
from rabbit_engine.utils.platform import is_flash_attention_available


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """`name` is passed to transformers; None leaves the choice to each part of the model: sdpa, else eager."""

    name: str | None
    reason: str


def choose_attention(
    requested: str,
    cls: type[PreTrainedModel],
    dtype: torch.dtype,
    device: torch.device,
    flash: Callable[[], tuple[bool, str]] = is_flash_attention_available,
) -> AttentionChoice:
    """Flash if the class, the dtype, the device and a real kernel call allow it, else sdpa, else eager.

    Raises AttentionUnavailableError for one requested by name that does not work, rather than use another silently.
    """
    problem = _flash_problem(cls, dtype, device, flash)
    if requested == "flash_attention_2" and problem is not None:
        raise AttentionUnavailableError(f'attn_implementation="flash_attention_2" does not work here: {problem}; use "auto"')
    if requested == "sdpa" and not has_sdpa(cls):
        raise AttentionUnavailableError(f'{cls.__name__} has no sdpa attention; use attn_implementation="eager" or "auto"')
    if requested != "auto":
        return AttentionChoice(requested, "asked for")
    if problem is None:
        return AttentionChoice("flash_attention_2", flash()[1])
    fallback = "sdpa" if has_sdpa(cls) else f"eager, as {cls.__name__} has no sdpa"
    return AttentionChoice(None, f"{fallback}; no flash attention: {problem}")


def _flash_problem(
    cls: type[PreTrainedModel], dtype: torch.dtype, device: torch.device, flash: Callable[[], tuple[bool, str]]
) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {str(dtype).removeprefix('torch.')}, it needs float16 or bfloat16"
    if not has_flash_attention(cls):
        return f"{cls.__name__} does not support it"
    available, reason = flash()
    return None if available else reason
