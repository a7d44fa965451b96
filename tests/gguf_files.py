"""GGUF files of tiny models: the header that a config says, and random tensors of the shapes that transformers' readers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))}
"""Where a block has its float16 numbers, if not only at 0."""

_SIZES = {
    "vocab_size": 160, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_NARROW = {"hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2}

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2, "head_dim": 64,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4, "rope_parameters": {**_ROTARY, "mrope_interleaved": True},
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}

CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 64, "sliding_window": 8},
    "gemma3": {"head_dim": 64, "sliding_window": 8},
    "phi3": {"hidden_size": 64, "vocab_size": 32064},
    "falcon": {"num_key_value_heads": 1, "num_kv_heads": 1},
    "qwen2moe": {**_NARROW, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3moe": {**_NARROW, "moe_intermediate_size": 768, "head_dim": 16},
    "minimax-m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256, "head_dim": 64, "rotary_dim": 64},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 256, "n_ctx": 1024, "max_position_embeddings": 1024},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
    "qwen35": _LINEAR,
    "qwen35moe": {**_LINEAR, **_EXPERTS},
    "mamba": {"state_size": 16, "time_step_rank": 32, "intermediate_size": 512, "conv_kernel": 4, "expand": 2},
}
"""What a config has besides `_SIZES`; files do not state all of it, so some values are the defaults of the class."""

_MODEL_TYPES = {
    "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "minimax-m2": "minimax_m2", "gemma3": "gemma3_text",
    "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text",
}  # fmt: skip
_SHAPES: Mapping[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "ffn_gate_exps": lambda shape: (shape[0], shape[1] // 2, shape[2]),
    "ffn_up_exps": lambda shape: (shape[0], shape[1] // 2, shape[2]),
    "ffn_gate_inp_shexp": lambda shape: shape[1:],
    "ssm_conv1d.weight": lambda shape: (shape[0], shape[2]),
    "shortconv.conv.weight": lambda shape: (shape[0], shape[2]),
}
"""The shapes of tensors that differ from those of the weights, by what is in their names."""


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """uint8 [..., bytes of a row]: any bytes are valid blocks; values are about as large as a model's."""
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng, size = np.random.default_rng(seed), 2e-5 if values == 256 else 1e-3
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, nbytes), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        scales = (size * rng.standard_normal((*raw.shape[:-1], 1))).astype(np.float16)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def is_of_newer_reader(architecture: str) -> bool:
    """Whether transformers' newer reader loads the architecture."""
    from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS

    return architecture in GGUF_ARCHS


def is_read(architecture: str) -> bool:
    """Whether this transformers reads the architecture."""
    return (
        is_of_newer_reader(architecture)
        or _MODEL_TYPES.get(architecture, architecture).removesuffix("_text") in GGUF_CONFIG_MAPPING
    )


def build(architecture: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of the class that transformers makes of the architecture."""
    config = AutoConfig.for_model(_MODEL_TYPES.get(architecture, architecture), **{**_SIZES, **CONFIGS[architecture], **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write(path: Path, architecture: str, kind: str = "Q4_K", *, head: str | None = None, **changes: Any) -> Path:
    """A file whose matrices are stored as `kind` where their rows can be cut into its blocks, else as F32; the head as `head`."""
    model = build(architecture, **changes)
    writer = gguf.GGUFWriter(path, architecture)
    _write_values(writer, architecture, model.config)
    for seed, (name, shape) in enumerate(_tensors(model, architecture).items()):
        own = head if head is not None and name == "output.weight" else kind
        _write_tensor(writer, name, shape, own, seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_values(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    for key, value in _values(architecture, config).items():
        add = (
            writer.add_array if isinstance(value, list) else writer.add_float32 if isinstance(value, float) else writer.add_uint32
        )
        add(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "2", *(f"t{index}" for index in range(1, config.vocab_size - 2))])
    writer.add_token_merges(["t 1", "t 2"])


def _values(architecture: str, config: Any) -> dict[str, Any]:
    """What the header says of the model, without the architecture's name."""
    common = {
        "context_length": config.max_position_embeddings, "embedding_length": getattr(config, "hidden_size", None),
        "block_count": config.num_hidden_layers, "attention.head_count": getattr(config, "num_attention_heads", None),
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
    }  # fmt: skip
    if architecture == "lfm2":
        heads = [0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types]
        more = {"feed_forward_length": config.intermediate_size, "attention.head_count_kv": heads, "shortconv.l_cache": 3}
        return {**common, **more}
    if architecture.startswith("qwen35"):
        more = {
            "attention.key_length": 64, "ssm.time_step_rank": 4, "attention.head_count_kv": 2, "full_attention_interval": 2,
            "ssm.conv_kernel": 4, "ssm.state_size": 64, "ssm.group_count": 2, "ssm.inner_size": 256, "rope.dimension_count": 16,
            "rope.dimension_sections": [4, 2, 2, 0], "feed_forward_length": 512,
        }  # fmt: skip
        experts = {
            "expert_feed_forward_length": 256,
            "expert_shared_feed_forward_length": 256,
            "expert_count": 4,
            "expert_used_count": 2,
        }
        return {**common, **more, **(experts if architecture == "qwen35moe" else {})}
    mapping = GGUF_CONFIG_MAPPING[{**_MODEL_TYPES, "gemma3": "gemma3"}.get(architecture, architecture)]
    found = {key: getattr(config, attribute, None) for key, attribute in mapping.items() if attribute is not None}
    return {key: value for key, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}


_NEWER = {
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm", "input_layernorm": "attn_norm", "ffn_norm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_output", "self_attn.o_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm", "self_attn.k_layernorm": "attn_k_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w3": "ffn_up", "feed_forward.w2": "ffn_down",
    "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj", "conv.conv": "shortconv.conv",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}  # fmt: skip
"""Modules of the architectures of transformers' newer reader, as their files name them."""


def _newer_tensors(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for weight, tensor in model.state_dict().items():
        if weight == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        layer, inside = "", weight
        if weight.startswith("model.layers."):
            _, _, number, inside = weight.split(".", 3)
            layer = f"blk.{number}."
        module, _, leaf = inside.rpartition(".")
        shape = tuple(tensor.shape)
        if inside == "mlp.experts.gate_up_proj":
            shape = (shape[0], shape[1] // 2, shape[2])
            found |= {f"{layer}ffn_gate_exps.weight": shape, f"{layer}ffn_up_exps.weight": shape}
        elif inside == "mlp.experts.down_proj":
            found[f"{layer}ffn_down_exps.weight"] = shape
        elif inside in ("linear_attn.A_log", "linear_attn.dt_bias"):
            found[layer + ("ssm_a" if leaf == "A_log" else "ssm_dt.bias")] = shape
        else:
            is_kernel = module in ("linear_attn.conv1d", "conv.conv")
            found[f"{layer}{_NEWER[module]}.{leaf}"] = (shape[0], shape[2]) if is_kernel else shape
    return found


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, tuple[int, ...]]:
    """The file's tensors and their shapes, in torch's order."""
    if is_of_newer_reader(architecture):
        return _newer_tensors(model)
    reader: Any = modeling_gguf_pytorch_utils
    processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=model.config.to_dict())
    names, state = reader.get_gguf_hf_weights_map(model, processor), model.state_dict()
    found = {}
    for tensor, weight in names.items():
        if (tensor == "output.weight" and model.config.tie_word_embeddings) or weight not in state:
            continue
        change = next((change for part, change in _SHAPES.items() if part in tensor), tuple)
        shape = tuple(change(tuple(state[weight].shape)))
        is_turned = (
            architecture == "gpt2"
            and len(shape) == 2
            and any(part in tensor for part in ("attn_qkv", "ffn_down", "ffn_up", "attn_output"))
        )
        found[tensor if tensor.endswith((".weight", ".bias")) or "ssm" in tensor else f"{tensor}.weight"] = (
            shape[::-1] if is_turned else shape
        )
    return found


def tensors_of(architecture: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that `write` makes, and their shapes in torch's order."""
    return _tensors(build(architecture), architecture)


def _write_tensor(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str, seed: int) -> None:
    rng, quantised = np.random.default_rng(seed), gguf.GGMLQuantizationType[kind]
    values = (0.05 * rng.standard_normal(shape)).astype(np.float32)
    if "norm" in name:
        values += 1
    if "ssm_a" in name:
        values = -np.abs(values) - np.float32(0.1)
    is_small = len(shape) < 2 or "norm" in name or ("ssm" in name and "proj" not in name)
    if is_small or kind == "F32" or shape[-1] % gguf.GGML_QUANT_SIZES[quantised][0]:
        writer.add_tensor(name, values)
    elif kind == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    elif kind == "BF16":
        bits = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(name, bits, raw_dtype=quantised)
    else:
        writer.add_tensor(name, random_blocks(kind, shape, seed), raw_dtype=quantised)
