"""Linear layers that compute as bitsandbytes' own: in its dtype of computation, or with int8 states (LLM.int8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rabbit_engine.config import COMPUTE_DTYPES, BitsAndBytes
from rabbit_engine.errors import CompressionUnavailableError
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.utils.extras import missing_extra

_COMPUTED: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in COMPUTE_DTYPES}
_THRESHOLD = 6.0


class CastLinear(nn.Linear):
    """Computes in the dtype of its weight, and returns the dtype of its input, as `Linear4bit` with a compute dtype does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in_features] to [..., out_features]."""
        weight, bias = self.weight, self.bias
        cast_bias = None if bias is None else bias.to(weight.dtype)
        return functional.linear(input.to(weight.dtype), weight, cast_bias).to(input.dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether the module's forward is torch's product with its weight: in the dtype of the input, or in that of the weight."""
    return type(module).forward in (nn.Linear.forward, CastLinear.forward)


class Int8Linear(nn.Linear):
    """LLM.int8 (https://arxiv.org/abs/2208.07339): rows of states are rounded to int8; columns of them that hold a value of
    `threshold` or more are computed in the dtype of the input.

    `weight` is int8 [out, in], `SCB` float32 [out] the largest magnitude of each of its rows.
    """

    SCB: torch.Tensor
    threshold: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear names it
        """[..., in_features] to [..., out_features], by the operations of bitsandbytes that `Linear8bitLt` calls."""
        if input.device.type == "meta":
            return input.new_empty(*input.shape[:-1], self.out_features)
        import bitsandbytes

        states, kernels = input.reshape(-1, self.in_features), torch.ops.bitsandbytes
        out: torch.Tensor
        bias = None if self.bias is None else self.bias.to(input.dtype)
        rounded, largest, outliers = bitsandbytes.functional.int8_vectorwise_quant(states.to(torch.float16), self.threshold)
        if self.threshold > 0:
            out, _ = kernels.int8_mixed_scaled_mm(states, rounded, self.weight, largest, self.SCB, outliers, bias)
        else:
            out = kernels.int8_scaled_mm(rounded, self.weight, largest, self.SCB, bias=bias, dtype=input.dtype)
        return out.reshape(*input.shape[:-1], self.out_features)


@dataclass(frozen=True, slots=True)
class Linears:
    """How bitsandbytes computes with a checkpoint's weights: 4-bit ones in `dtype`, int8 ones with outliers of `threshold`."""

    dtype: torch.dtype = torch.float32
    threshold: float = _THRESHOLD

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Linears:
        """What a `quantization_config` says. Raises CompressionUnavailableError for values that bitsandbytes does not have."""
        name = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        threshold = config.get("llm_int8_threshold", _THRESHOLD)
        if name not in _COMPUTED:
            raise CompressionUnavailableError(
                f"bnb_4bit_compute_dtype is {shown(name)}, supported are {', '.join(_COMPUTED)}: correct quantization_config"
            )
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold >= 0:
            raise CompressionUnavailableError(
                f"llm_int8_threshold is {shown(threshold)}, not a number from 0: correct quantization_config"
            )
        return cls(_COMPUTED[name], float(threshold))

    @classmethod
    def made_by(cls, options: BitsAndBytes) -> Linears:
        """What a caller's config says."""
        return cls(_COMPUTED[options.compute_dtype], options.threshold)

    def compute_4bit(self, layer: nn.Linear) -> None:
        """Make a layer on the meta device compute in `dtype`, which its weight is decoded to."""
        if layer.weight.dtype != self.dtype:
            layer.__class__ = CastLinear
            layer.weight = nn.Parameter(layer.weight.to(self.dtype), requires_grad=False)

    def compute_8bit(self, layer: nn.Linear) -> None:
        """Make a layer on the meta device compute with int8. Raises MissingExtraError without bitsandbytes."""
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise missing_extra("LLM.int8", "bnb", error) from error
        layer.__class__ = Int8Linear
        layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        layer.register_buffer("SCB", torch.empty(layer.out_features, dtype=torch.float32, device="meta"))
        layer.threshold = self.threshold  # type: ignore[assignment]
