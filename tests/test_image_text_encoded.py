"""Image-text models with encoded weights: equal to transformers with the decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import aligned
from test_bitsandbytes import NF4
from test_compression import with_decoded_weights
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig


def encoded_parts(model: Any) -> set[str]:
    """The parts of the model that have encoded weights, such as "language_model"; "weight" is the head's."""
    return {name.split(".")[1] for name, entry in model._checkpoint.entries.items() if entry.is_encoded}


def whole_of(folder: Path) -> Any:
    return aligned(AutoModelForImageTextToText.from_pretrained(folder).eval())


def require_equal(model: Any, whole: Any, family: str, ids: torch.Tensor) -> None:
    """For text alone, and for text with an image."""
    assert model.plan.streamed
    image = families.picture(family)
    for inputs in ({"input_ids": ids}, image | {"pixel_values": image["pixel_values"].bfloat16()}):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
        steps = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**inputs, **steps), whole.generate(**inputs, **steps))


@pytest.mark.parametrize("method", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["gemma3_image", "mistral3_image"])
def test_a_compressed_image_text_model_is_transformers_with_the_decoded_weights(
    family: str, method: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    folder = families.save(family, tmp_path, torch.bfloat16)
    model = streamed(folder, compression=method, fused_products=False)
    assert encoded_parts(model) == {"language_model", "weight"}  # towers stay as they are
    require_equal(model, with_decoded_weights(model, whole_of(folder)), family, ids)


@pytest.mark.parametrize("family", ["gemma3_image", "qwen2_5_vl", "qwen3_5_image", "mistral3_image"])
def test_an_image_text_checkpoint_of_bitsandbytes_is_transformers_with_the_decoded_weights(
    family: str, tmp_path: Path, streamed: Any, ids: torch.Tensor
) -> None:
    """Not with bitsandbytes itself: its kernel for CPUs decodes these rows of 32 wrongly."""
    plain, folder = families.save(family, tmp_path / "plain", torch.bfloat16), tmp_path / "quantised"
    made = AutoModelForImageTextToText.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**NF4), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    made.save_pretrained(folder, max_shard_size="60KB")
    model = streamed(folder)
    assert {"language_model", "visual" if "qwen" in family else "vision_tower"} <= encoded_parts(model)
    require_equal(model, with_decoded_weights(model, whole_of(plain)), family, ids)
