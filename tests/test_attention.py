"""Flash only where all of it works, and never a silent other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM, LlamaForCausalLM

from rabbit_engine import errors
from rabbit_engine.model.attention import choose_attention
from rabbit_engine.utils.platform import is_flash_attention_available

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def works() -> tuple[bool, str]:
    return True, "flash-attn runs on a test"


def fails() -> tuple[bool, str]:
    return False, "its kernel does not run"


@pytest.mark.parametrize(
    ("requested", "cls", "dtype", "device", "flash", "name", "reason"),
    [
        ("auto", LlamaForCausalLM, torch.bfloat16, CUDA, works, "flash_attention_2", "runs on a test"),
        ("auto", LlamaForCausalLM, torch.float16, CUDA, works, "flash_attention_2", "runs on a test"),
        ("auto", LlamaForCausalLM, torch.float32, CUDA, works, None, "sdpa; no flash attention: the dtype is float32"),
        ("auto", LlamaForCausalLM, torch.bfloat16, CUDA, fails, None, "its kernel does not run"),
        ("auto", LlamaForCausalLM, torch.bfloat16, CPU, works, None, "the device is cpu"),
        ("auto", GptOssForCausalLM, torch.bfloat16, CPU, works, None, "eager, as GptOssForCausalLM has no sdpa"),
        ("eager", LlamaForCausalLM, torch.bfloat16, CUDA, works, "eager", "asked for"),
        ("sdpa", LlamaForCausalLM, torch.bfloat16, CUDA, works, "sdpa", "asked for"),
        ("flash_attention_2", LlamaForCausalLM, torch.bfloat16, CUDA, works, "flash_attention_2", "asked for"),
    ],
)
def test_choice_and_reason(requested: str, cls: Any, dtype: Any, device: Any, flash: Any, name: Any, reason: str) -> None:
    choice = choose_attention(requested, cls, dtype, device, flash)
    assert choice.name == name
    assert reason in choice.reason


def test_attention_requested_by_name_but_unusable_is_an_error(checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(errors.AttentionUnavailableError, match="its kernel does not run"):
        choose_attention("flash_attention_2", LlamaForCausalLM, torch.bfloat16, CUDA, fails)
    with pytest.raises(errors.AttentionUnavailableError, match="the device is cpu"):
        streamed(checkpoint("llama"), attn_implementation="flash_attention_2")
    with pytest.raises(errors.AttentionUnavailableError, match="no sdpa"):
        streamed(checkpoint("gpt_oss"), attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("family", "requested", "active"), [("llama", "auto", "sdpa"), ("llama", "eager", "eager"), ("gpt_oss", "auto", "eager")]
)
def test_active_implementation_is_readable(family: str, requested: str, active: str, checkpoint: Any, streamed: Any) -> None:
    assert streamed(checkpoint(family), attn_implementation=requested).active_attention_implementation == active


def test_flash_availability_is_an_answer_with_a_reason() -> None:
    available, reason = is_flash_attention_available()
    assert isinstance(available, bool)
    assert reason
    if not torch.cuda.is_available():
        assert not available
