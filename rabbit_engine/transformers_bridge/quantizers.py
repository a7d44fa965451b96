"""How transformers undoes the quantisation of a checkpoint while it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

Quantizer = HfQuantizer

Kind = Literal["fp8", "mxfp4"]
Role = Literal["values", "scales", "unused"]

_ROLES: dict[str, Role] = {
    "weight": "values",
    "weight_scale_inv": "scales",
    "activation_scale": "unused",
    "blocks": "values",
    "scales": "scales",
}
"""What a stored tensor is to the weight that is dequantised from it, by the end of its name."""


def open_dequantizer(quantization: Mapping[str, Any]) -> Quantizer:
    """What makes plain weights of a checkpoint with this `quantization_config`. Raises whatever the config class does."""
    quantizer: Quantizer = AutoHfQuantizer.from_config({**quantization, "dequantize": True}, pre_quantized=True)
    return quantizer


def dequantizes(operation: Any) -> Kind | None:
    """Which kind of quantisation an operation of a converter undoes; None for another operation."""
    names: dict[str, Kind] = {"Fp8Dequantize": "fp8", "Mxfp4Dequantize": "mxfp4"}
    return names.get(type(operation).__name__) if type(operation).__module__.startswith("transformers.") else None


def roles_of(patterns: Sequence[str]) -> list[tuple[Role, int]] | None:
    """What each source pattern of a converter that dequantises is, and of which of its weights: the first, the second ...

    None for patterns that nothing is known of.
    """
    split = [_owner_and_role(pattern.removesuffix("$")) for pattern in patterns]
    weights = [owner for owner, role in split if role == "values"]
    known = [(role, weights.index(owner)) for owner, role in split if role is not None and owner in weights]
    return known if len(known) == len(patterns) else None


def _owner_and_role(pattern: str) -> tuple[str, Role | None]:
    owner, _, end = pattern.rpartition(".")
    if end in _ROLES:
        return owner, _ROLES[end]
    owner, _, end = pattern.rpartition("_")
    return owner, _ROLES.get(end)
