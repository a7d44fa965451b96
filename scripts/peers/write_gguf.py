"""Converts a Llama's folder to one GGUF file, BF16 with norms in F32: `python -m peers.write_gguf MODEL_DIR FILE.gguf`.

Names and the order of rotary dimensions follow llama.cpp's convert_hf_to_gguf.py. The vocabulary is invented, of the right
size: the benchmark uses token ids. Needs gguf, safetensors and torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`gguf_name("model.layers.3.mlp.up_proj.weight") -> "blk.3.ffn_up.weight"`. Raises KeyError for other weights."""
    module = name.removesuffix(".weight")
    if module in WHOLE:
        return f"{WHOLE[module]}.weight"
    layer, inner = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{int(layer)}.{IN_LAYER[inner]}.weight"


def interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads*d, in] with each head's d/2 pairs in two halves -> the same with each pair adjacent, as ggml rotates them."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def read_tensor(files: dict[str, Path], name: str, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """One tensor as the file stores it: fp32 for a vector, else the 16 bits of bf16."""
    with safe_open(files[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    if name.endswith("q_proj.weight"):
        tensor = interleave_rotary(tensor, config["num_attention_heads"])
    elif name.endswith("k_proj.weight"):
        tensor = interleave_rotary(tensor, config["num_key_value_heads"])
    if tensor.dim() == 1:
        return tensor.float().numpy()
    return tensor.bfloat16().contiguous().view(torch.uint16).numpy()


def find_tensors(folder: Path) -> dict[str, Path]:
    """Every tensor's name and the file that holds it, in file order."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def pieces(vocabulary: int) -> Iterator[tuple[str, gguf.TokenType]]:
    """A vocabulary of the right size: three special tokens, 256 bytes, and words."""
    yield from (("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL))
    yield from ((f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256))
    yield from ((f"w{token}", gguf.TokenType.NORMAL) for token in range(259, vocabulary))


def add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """The numbers that llama.cpp needs from a Llama's config.json."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Write it as a SentencePiece model; the scores do not matter."""
    names, types = zip(*pieces(vocabulary), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(names))
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types(list(types))


def write_gguf(folder: Path, target: Path) -> None:
    """The file is whole or absent. Raises KeyError for a model that is not a plain Llama."""
    config = json.loads((folder / "config.json").read_text())
    files = find_tensors(folder)
    scratch = target.with_name(f".{target.name}.part")
    writer = gguf.GGUFWriter(scratch, "llama")
    add_config(writer, config)
    add_vocabulary(writer, config["vocab_size"])
    for name in files:
        array = read_tensor(files, name, config)
        kind = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(gguf_name(name), array.shape, array.dtype, array.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in files:
        writer.write_tensor_data(read_tensor(files, name, config))
    writer.close()
    scratch.rename(target)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
