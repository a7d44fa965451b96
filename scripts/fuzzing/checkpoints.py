"""Tiny checkpoints of every form that users have, made once; a case changes a copy of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rabbit_engine.checkpoints import prepare, splitter
from rabbit_engine.config import SourceConfig, SplitConfig

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 95,
    "pad_token_id": 0,
}
INPUT_IDS = torch.tensor([[1, 5, 9, 33, 70, 2, 8]])


def _model(**changes: Any) -> Any:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    letters = {chr(33 + index): 2 + index for index in range(93)}
    tokens = Tokenizer(models.BPE({"<pad>": 0, "<s>": 1, **letters, "</s>": 95}, [], unk_token="<pad>"))
    tokens.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def one_file(folder: Path) -> None:
    """model.safetensors, and a tokenizer."""
    _model().save_pretrained(folder)
    _tokenizer(folder)


def tied(folder: Path) -> None:
    """The head shares the embedding."""
    _model(tie_word_embeddings=True).save_pretrained(folder)


def sharded(folder: Path) -> None:
    """Several safetensors files and an index."""
    _model().save_pretrained(folder, max_shard_size="40KB")


def pickled(folder: Path) -> None:
    """pytorch_model.bin."""
    model = _model()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def pickled_shards(folder: Path) -> None:
    """Two pickles and an index."""
    model = _model()
    model.config.save_pretrained(folder)
    state, names = model.state_dict(), [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    weight_map = {key: names["layers.1" in key] for key in state}
    for name in names:
        torch.save({key: tensor for key, tensor in state.items() if weight_map[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def gguf(folder: Path) -> None:
    """model.gguf with a quantised matrix."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer, rng, q8 = GGUFWriter(folder / "model.gguf", "llama"), np.random.default_rng(5), GGMLQuantizationType.Q8_0
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(96)])
    writer.add_token_merges(["t 1"])
    square = {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    mlp = {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    rest = {"token_embd": (96, 32), "output": (96, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in {**rest, **square, **mlp}.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        packed = name in ("blk.0.ffn_up", "blk.0.attn_q")
        writer.add_tensor(f"{name}.weight", quants.quantize(values, q8) if packed else values, raw_dtype=q8 if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split(folder: Path, delete: bool) -> None:
    prepare(folder, SourceConfig(), SplitConfig(mode="always", delete_original=delete), progress=False)


def split(folder: Path) -> None:
    """A tied model, its originals and its split."""
    tied(folder)
    _split(folder, delete=False)


def deleted(folder: Path) -> None:
    """A split whose originals are deleted."""
    sharded(folder)
    _split(folder, delete=True)


def interrupted(folder: Path) -> None:
    """Half a split: a journal, some shards, some originals deleted."""
    sharded(folder)
    whole: Callable[..., Any] = vars(splitter)["write_shard"]
    written: list[Any] = []

    def stop_at_the_last(*args: Any) -> Any:
        written.append(args)
        if len(written) > 3:
            raise InterruptedError
        return whole(*args)

    try:
        with mock.patch.object(splitter, "write_shard", stop_at_the_last):
            _split(folder, delete=True)
    except InterruptedError:
        return
    raise AssertionError("the split was not interrupted")


@dataclass(frozen=True, slots=True)
class Kind:
    """A form of checkpoint and the files that a case may change; `keywords` go to `from_pretrained`."""

    make: Callable[[Path], None]
    targets: tuple[str, ...]
    readable: bool = True
    gguf_file: str | None = None
    delete_original: bool = False


_SHARDS = "rabbit_shards/float32"

KINDS: dict[str, Kind] = {
    "safetensors": Kind(one_file, ("model.safetensors",)),
    "tied": Kind(tied, ("model.safetensors",)),
    "sharded": Kind(sharded, ("*.safetensors",)),
    "index": Kind(sharded, ("*.index.json",)),
    "bin": Kind(pickled, ("*.bin",)),
    "sharded_bin": Kind(pickled_shards, ("*.bin", "*.index.json")),
    "gguf": Kind(gguf, ("*.gguf",), gguf_file="model.gguf"),
    "manifest": Kind(split, (f"{_SHARDS}/manifest.json",), readable=False),
    "manifest_delete": Kind(split, (f"{_SHARDS}/manifest.json",), readable=False, delete_original=True),
    "shards": Kind(deleted, (f"{_SHARDS}/*.safetensors", f"{_SHARDS}/manifest.json"), readable=False),
    "journal": Kind(interrupted, (f"{_SHARDS}/journal.json", f"{_SHARDS}/*.safetensors"), readable=False, delete_original=True),
    "index_delete": Kind(sharded, ("*.index.json",), delete_original=True),
    "config": Kind(one_file, ("config.json",)),
    "tokenizer": Kind(one_file, ("tokenizer.json", "tokenizer_config.json")),
    "generation": Kind(one_file, ("generation_config.json",)),
}
"""`readable` kinds are files that transformers also reads; its result for a changed one is correct."""
