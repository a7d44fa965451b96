"""The weights of a model that share one tensor."""

from __future__ import annotations

from transformers import PreTrainedModel


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """weight -> the weight it shares its tensor with, by state dict names, parts of composite models included."""
    return {target: source for target, source in model.all_tied_weights_keys.items() if target != source}


def untie(model: PreTrainedModel, weight: str) -> None:
    """Mark `weight` as not tied, as `from_pretrained` does if tied weights are stored with different values."""
    model.all_tied_weights_keys.pop(weight, None)
