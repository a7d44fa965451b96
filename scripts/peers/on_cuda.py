"""Peers on a GPU, as models that `benchmark_cuda.py` times in its own process, limited to the same device memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def has_airllm() -> bool:
    """Whether AirLLM is installed."""
    return find_spec("airllm") is not None


@contextmanager
def offloaded(folder: Path, device_bytes: int, elsewhere: str) -> Iterator[PreTrainedModel]:
    """transformers with accelerate: what does not fit on the device stays `elsewhere`, "cpu" or "disk"."""
    with tempfile.TemporaryDirectory() as offload_folder:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, device_map=device_map(folder, device_bytes, elsewhere), offload_folder=offload_folder
        )
        yield model.eval()


def device_map(folder: Path, device_bytes: int, elsewhere: str) -> dict[str, int | str]:
    """As many modules on the device as fit with the largest of the others, which is copied there to run.

    That is what "auto" does with 8 GiB. With less, "auto" leaves all of the model to the CPU, because its first module, the
    embedding, does not fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    layers = {f"model.layers.{index}": layer for index, layer in enumerate(model.model.layers)}
    modules = {"model.embed_tokens": model.model.embed_tokens, **layers, "lm_head": model.lm_head}
    sizes = {name: sum(weight.numel() * 2 for weight in module.parameters()) for name, module in modules.items()}
    places: dict[str, int | str] = {"model.norm": 0, "model.rotary_emb": 0}
    room = device_bytes - max(sizes.values())
    for name, nbytes in sizes.items():
        places[name] = 0 if nbytes <= room else elsewhere
        room -= nbytes if places[name] == 0 else 0
    return places


def offloaded_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that `offloaded` did not put on the device, all of which a pass copies there."""
    places: Any = model.hf_device_map
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
