"""Models to measure speculation with, made from a small real one (a Llama in safetensors, such as SmolLM2).

    python scripts/make_speculation_models.py round SOURCE TARGET --bits 3 --group 16
    python scripts/make_speculation_models.py widen SOURCE TARGET --gigabytes 7.5
    python scripts/make_speculation_models.py sparse SOURCE TARGET --experts 16 --used 2

`round` makes a draft: the linear layers of all blocks are rounded to `bits` in groups of `group` inputs, so that it agrees with
the source in most tokens, as a smaller model of the same family does. `widen` makes a target that is as large as one that does
not fit, and gives the source's text: its MLPs get random units whose outputs are multiplied by zero. `sparse` makes a Mixtral
that speaks like the source: its experts are copies of the source's MLPs with noise, chosen evenly by routers of random weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

app = typer.Typer(add_completion=False)
Source = Annotated[Path, typer.Argument(exists=True, file_okay=False)]
Target = Annotated[Path, typer.Argument()]

_TEXT = Path(__file__).parent / "speculation_prompts.toml"
_COMMON = 8
"""Directions that the states of most tokens share: a router that saw them would send all tokens to the same experts."""

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template*")


def rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """[outputs, inputs], each group of inputs on 2**bits evenly spaced values between its least and its largest."""
    values = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    least, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step = (largest - least).clamp(min=1e-8) / (2**bits - 1)
    found = ((values - least) / step).round() * step + least
    flat: torch.Tensor = found.flatten(1)
    return flat[:, : weight.shape[1]].to(weight.dtype)


def load(source: Path) -> Any:
    """The model, in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()


def save(model: Any, source: Path, target: Path) -> None:
    """The model with the tokenizer of its source."""
    model.save_pretrained(target, max_shard_size="2GB")
    for pattern in _TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copy2(path, target)


@app.command(name="round")
def round_weights(source: Source, target: Target, bits: int = 3, group: int = 16) -> None:
    """Write a copy whose linear layers are rounded."""
    model = load(source)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.copy_(rounded(module.weight, bits, group))
    save(model, source, target)


@app.command()
def widen(source: Source, target: Target, gigabytes: float = 7.5) -> None:
    """Write a copy with wider MLPs that gives the same text, in that many gigabytes."""
    model = load(source)
    config = model.config
    per_unit = 3 * config.hidden_size * config.num_hidden_layers * 2
    units = int((gigabytes * 1e9 - sum(weight.nbytes for weight in model.parameters())) / per_unit) // 64 * 64
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        widen_mlp(layer.mlp, units, generator)
    config.intermediate_size += units
    save(model, source, target)


def widen_mlp(mlp: Any, units: int, generator: torch.Generator) -> None:
    """`units` more, which are computed and add nothing."""
    for name in ("gate_proj", "up_proj"):
        weight = getattr(mlp, name).weight.data
        more = torch.randn(units, weight.shape[1], generator=generator).mul_(float(weight.float().std())).to(weight.dtype)
        getattr(mlp, name).weight.data = torch.cat([weight, more])
    weight = mlp.down_proj.weight.data
    mlp.down_proj.weight.data = torch.cat([weight, weight.new_zeros(weight.shape[0], units)], 1)


@app.command()
def sparse(source: Source, target: Target, experts: int = 16, used: int = 2, noise: float = 0.05) -> None:
    """Write a Mixtral with that many experts a layer, of which a token uses `used`."""
    dense = load(source)
    states = states_before_mlps(dense, AutoTokenizer.from_pretrained(source)(_TEXT.read_text(), return_tensors="pt").input_ids)
    model = mixtral_like(dense.config, experts, used)
    model.load_state_dict(dense.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, old, seen in zip(model.model.layers, dense.model.layers, states, strict=True):
            layer.mlp.gate.weight.copy_(router(seen, experts, generator))
            joined = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
            fill(layer.mlp.experts.gate_up_proj, joined, noise, generator)
            fill(layer.mlp.experts.down_proj, old.mlp.down_proj.weight, noise, generator)
    save(model, source, target)


def mixtral_like(config: Any, experts: int, used: int) -> Any:
    """A bfloat16 Mixtral of a Llama's sizes."""
    given = {name: value for name, value in config.to_dict().items() if name not in ("architectures", "model_type")}
    made = MixtralConfig(**given, num_local_experts=experts, num_experts_per_tok=used)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return MixtralForCausalLM(made).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def states_before_mlps(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of each layer, float32 [tokens, hidden]."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given: found.append(given[0][0].float())) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def router(states: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Random weights [experts, hidden] whose logits for `states` vary by 1 and do not depend on what those have in common."""
    weight = torch.randn(experts, states.shape[1], generator=generator)
    common = torch.linalg.svd(states, full_matrices=False).Vh[:_COMMON]
    weight -= weight @ common.T @ common
    return weight / (states @ weight.T).std(0)[:, None]


def fill(stacked: torch.Tensor, weight: torch.Tensor, noise: float, generator: torch.Generator) -> None:
    """Set each [outputs, inputs] of `stacked` to `weight` with noise, as a share of its standard deviation."""
    for expert in stacked:
        expert.copy_(weight + noise * weight.float().std() * torch.randn(weight.shape, generator=generator))


if __name__ == "__main__":
    app()
