"""Workarounds for bugs in transformers releases that break a whole family, until they are fixed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


def fix_known_bugs(model: PreTrainedModel) -> None:
    """Llama 4 with images (transformers 5.24.0): its forward reads `image_outputs` of the text model's output, whose class does
    not have it."""
    text: Any = getattr(model, "language_model", None)
    if text is not None and model.config.model_type == "llama4":
        text.register_forward_hook(_add_image_outputs)


def _add_image_outputs(_: object, __: object, output: object) -> None:
    if isinstance(output, ModelOutput) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
