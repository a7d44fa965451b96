"""A tiny Gemma 3 with its processor of images and a tokenizer of words, and images to show it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import families
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {"<image_soft_token>": 100, "<start_of_image>": 101, "<end_of_image>": 102}
_TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %} <start_of_image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def save(folder: Path) -> Path:
    """The checkpoint in `folder`."""
    families.save("gemma3_image", folder)
    vocabulary = {f"w{index}": index for index in range(3, 96)} | {"<pad>": 0, "<bos>": 1, "<eos>": 2} | _SPECIAL
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", extra_special_tokens=named, chat_template=_TEMPLATE
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    transformers.Gemma3Processor(images, fast, image_seq_length=4).save_pretrained(folder)
    return folder


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """The file's content."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def as_url(data: bytes) -> str:
    """A data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
