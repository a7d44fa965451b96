"""How transformers undoes the quantisation of a checkpoint while it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

Quantizer = HfQuantizer


def open_dequantizer(quantization: Mapping[str, Any]) -> Quantizer:
    """What makes plain weights of a checkpoint with this `quantization_config`. Raises whatever the config class does."""
    quantizer: Quantizer = AutoHfQuantizer.from_config({**quantization, "dequantize": True}, pre_quantized=True)
    return quantizer
