"""Which weights of a model are one and the same."""

from __future__ import annotations

from transformers import PreTrainedModel


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """weight -> the weight it shares its tensor with, by the names of the state dict, parts of composite models included."""
    return {target: source for target, source in model.all_tied_weights_keys.items() if target != source}


def untie(model: PreTrainedModel, weight: str) -> None:
    """Note that `weight` is one of its own, as `from_pretrained` does where tied weights are stored with different values."""
    model.all_tied_weights_keys.pop(weight, None)
