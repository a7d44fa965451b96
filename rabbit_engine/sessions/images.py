"""Images in conversations: read from data URLs, bytes or PIL images, and prepared by the checkpoint's own processor."""

from __future__ import annotations

import base64
import binascii
import copy
import inspect
import io
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from rabbit_engine.errors import ConfigurationError, RabbitError, first_line
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.sessions.call_ids import Messages, with_fitting_ids
from rabbit_engine.utils.extras import missing_extra
from rabbit_engine.utils.foreign import foreign_code

MOST_PIXELS = 50_000_000
"""A small file may claim a huge image."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_PART_TYPES = ("image", "image_url", "input_image")


def image_of_part(part: object) -> object | None:
    """What a part of a message gives as its image, in the forms of OpenAI's API and of transformers; None for other parts."""
    if not isinstance(part, Mapping) or part.get("type") not in _PART_TYPES:
        return None
    for name in ("image", "image_url", "url", "base64"):
        if (value := part.get(name)) is not None:
            url = value.get("url") if isinstance(value, Mapping) else value
            return f"data:;base64,{url}" if name == "base64" else url
    return ""


def read_image(given: object, where: str) -> Any:
    """A PIL image in RGB from a data URL (`data:image/png;base64,...`), the bytes of a file, or a PIL image.

    Addresses are never fetched, and no file of this machine is read. Raises ConfigurationError; MissingExtraError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("an image", "vision", error) from error

    if isinstance(given, Image.Image):
        return given.convert("RGB")
    data = given if isinstance(given, bytes) else _decode_url(given, where)
    known = ", ".join(_FORMATS)
    with (
        foreign_code(
            lambda error: ConfigurationError(f"{where}: cannot read the image ({first_line(error)}): send one of {known}")
        ),
        Image.open(io.BytesIO(data), formats=_FORMATS) as image,
    ):
        if image.width * image.height > MOST_PIXELS:
            raise ConfigurationError(
                f"{where}: the image has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}: make it smaller"
            )
        return image.convert("RGB")


def _decode_url(given: object, where: str) -> bytes:
    if not isinstance(given, str) or not given.startswith("data:"):
        shown = f" ({given[:60]})" if isinstance(given, str) and given else ""
        raise ConfigurationError(
            f"{where}: cannot read the image{shown}: send its content as a data URL (data:image/png;base64,...); "
            "addresses are not fetched"
        )
    head, _, data = given.partition(",")
    if not head.endswith(";base64"):
        raise ConfigurationError(f"{where}: the data URL of an image must be base64: data:image/png;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ConfigurationError(f"{where}: the image is not valid base64: {error}") from error


class ImageProcessor:
    """Prepares conversations with images for a model that takes them. Thread-safe."""

    def __init__(self, model: SessionModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._processor: Any = None

    @property
    def takes_images(self) -> bool:
        """Whether the model's class takes images."""
        return "pixel_values" in inspect.signature(self._model.forward).parameters

    def encode(
        self, messages: Sequence[Mapping[str, object]], template: Mapping[str, object]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Token ids of a conversation whose contents are lists of parts, and the model's other inputs, on its device.

        Raises ConfigurationError if the checkpoint has no processor, or if it rejects the messages.
        """
        given = {"add_generation_prompt": not template.get("continue_final_message"), **template}
        with self._lock:
            processor = self._processor = self._processor or self._load()

            def render(messages: Messages) -> Any:
                return processor.apply_chat_template(
                    [dict(message) for message in messages], tokenize=True, return_dict=True, return_tensors="pt", **given
                )

            rejects = "the checkpoint's processor rejects these messages"
            with foreign_code(lambda error: ConfigurationError(f"{rejects}: {first_line(error)}")):
                found = with_fitting_ids(render, messages)
        inputs = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        ids = [int(token) for token in inputs.pop("input_ids")[0]]
        inputs.pop("attention_mask", None)
        return ids, {name: self._placed(value) for name, value in inputs.items()}

    def _placed(self, value: torch.Tensor) -> torch.Tensor:
        dtype = getattr(self._model, "dtype", None) if value.is_floating_point() else None
        return value.to(self._model.device, dtype)

    def _load(self) -> Any:
        folder = runtime_of(self._model).checkpoint.repo.folder
        with foreign_code(partial(_no_processor, folder)):
            processor = AutoProcessor.from_pretrained(folder)
        if getattr(processor, "image_processor", None) is None:
            raise ConfigurationError(
                f"{folder} has no image processor (preprocessor_config.json): images cannot be prepared for its model"
            )
        if getattr(processor, "chat_template", None) is None:
            processor = copy.copy(processor)
            processor.chat_template = getattr(self._model.tokenizer, "chat_template", None)
        return processor


def _no_processor(folder: Path, error: Exception) -> RabbitError:
    if isinstance(error, ImportError):
        return missing_extra("the checkpoint's image processor", "vision", error)
    return ConfigurationError(f"{folder}: the image processor cannot be loaded: {first_line(error)}")
