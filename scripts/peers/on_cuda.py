"""Peers on a GPU, as models that `benchmark_cuda.py` times in its own process, limited to the same device memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def has_airllm() -> bool:
    """Whether AirLLM is installed."""
    return find_spec("airllm") is not None


@contextmanager
def offloaded(folder: Path, device_bytes: int, host_bytes: int) -> Iterator[PreTrainedModel]:
    """transformers with accelerate: what does not fit on the device stays in host memory, what does not fit there on disk."""
    with tempfile.TemporaryDirectory() as offload_folder:
        max_memory = {0: device_bytes, "cpu": host_bytes}
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=max_memory, offload_folder=offload_folder
        )
        yield model.eval()


def offloaded_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that `offloaded` did not put on the device, all of which a pass copies there."""
    places: Any = getattr(model, "hf_device_map", {})  # absent if all of it fits
    away = [model.get_submodule(name) for name, place in places.items() if place in ("cpu", "disk")]
    return sum(weight.nbytes for module in away for weight in module.parameters())


@contextmanager
def airllm(folder: Path, shards: Path) -> Iterator[PreTrainedModel]:
    """AirLLM with its defaults; the first call splits the model into `shards`. It loads no model without a tokenizer."""
    from airllm import AutoModel  # type: ignore[import-not-found]

    if not (folder / "tokenizer.json").is_file():
        backend = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    shards.mkdir(parents=True, exist_ok=True)
    wrapper = AutoModel.from_pretrained(str(folder), device="cuda:0", layer_shards_saving_path=str(shards))
    yield wrapper.model
