"""Tiny checkpoints with multi-token heads, as their authors store them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from families import BASE, EXPERTS, build
from safetensors.torch import load_file, save_file

IGNORED = [r"^mtp\.", r"^model\.layers\.[3-9]\."]
"""What transformers' own loader takes for the weights of heads: its classes name the layers of the published sizes only."""

_MELLUM = {
    "num_mtp_layers": 1,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "mlp_layer_types": ["sparse"] * 3,
}


def save_with_heads(family: str, folder: Path, heads: int = 1, **changes: object) -> Path:
    """A checkpoint of the family with random heads."""
    if family == "mellum":
        torch.manual_seed(0)
        model = transformers.MellumForCausalLM(transformers.MellumConfig(**{**BASE, **EXPERTS, **_MELLUM, **changes}))
    else:
        model = build(family, num_mtp_layers=heads, **changes)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = load_file(path)
    torch.manual_seed(1)
    block = {key.partition("layers.2.")[2]: weight for key, weight in stored.items() if key.startswith("model.layers.2.")}
    for head in range(heads):
        noise = {key: 0.15 * torch.randn_like(weight) for key, weight in block.items()}
        stored |= _mellum(noise) if family == "mellum" else _next_layer(3 + head, noise, stored)
    save_file(stored, path, metadata={"format": "pt"})
    return folder


def _mellum(block: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prefix of their own, and what joins states and tokens one level up."""
    norms = {f"mtp.{name}.weight": _norm() for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    return {f"mtp.layers.0.{key}": weight for key, weight in block.items()} | norms | {"mtp.fc.weight": _join()}


def _next_layer(index: int, block: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer after the last, as DeepSeek and GLM store it, with copies of the embedding and the head."""
    named = {name: _norm() for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    named |= {"eh_proj.weight": _join()} | {name: stored[source].clone() for name, source in copies.items()}
    return {f"model.layers.{index}.{key}": weight for key, weight in (block | named).items()}


def _norm() -> torch.Tensor:
    return 1 + 0.1 * torch.randn(BASE["hidden_size"])


def _join() -> torch.Tensor:
    return 0.15 * torch.randn(BASE["hidden_size"], 2 * BASE["hidden_size"])
