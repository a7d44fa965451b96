"""What each encoding costs in quality: the perplexity of a text, the next tokens that stay the same, and the weights' errors.

    python scripts/benchmark_quality.py MODEL [--text FILE] [--tokens N] [--context N] [--gguf FILE ...] [--noise SHARE]

MODEL is a folder with 16-bit weights; its splits are made in a temporary folder unless --saving-path is given. The text is
this project's documentation by default. Every token after the first context is predicted from at least half a context.
The last lines are JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from rabbit_engine import AutoModel
from rabbit_engine.checkpoints import prepare
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.storage.tensorfiles import TensorEntry, read_tensor
from rabbit_engine.utils.platform import environment
from rabbit_engine.utils.sizes import format_bytes

DOCS = Path(__file__).parents[1] / "docs"
ORIGINAL = "bf16"
LOSSLESS = "lossless"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


def encodings() -> dict[str, dict[str, Any]]:
    """What `from_pretrained` is given for each."""
    return {
        ORIGINAL: {"layer_shards_saving_path": None},
        LOSSLESS: {"compression": LOSSLESS},
        "8bit": {"compression": "8bit"},
        "4bit": {"compression": "4bit"},
        "int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        "nf4": {"quantization_config": BitsAndBytesConfig(**NF4)},
        "nf4, double quantisation": {"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True)},
    }


@dataclass(frozen=True, slots=True)
class Asked:
    """An encoding, and how a model in it is loaded."""

    name: str
    source: Path
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def load(self, common: Mapping[str, Any]) -> Any:
        """The model."""
        return AutoModel.from_pretrained(self.source, **common, **self.keywords)

    def alone(self, scratch: Path) -> Asked:
        """A compressed copy of the model without its original files: its shards are used even where they gain nothing."""
        folder = shutil.copytree(self.source, scratch / f"{self.name}-only", ignore=shutil.ignore_patterns("rabbit_shards"))
        compression = CompressionConfig(method=self.name)
        prepare(folder, SourceConfig(), SplitConfig(dtype=torch.bfloat16, compression=compression, delete_original=True))
        return replace(self, source=folder, keywords={"compression": self.name})


@dataclass(frozen=True, slots=True)
class Quality:
    """How a model in one encoding predicts a text; `error` is relative, root mean square over the encoded weights."""

    encoding: str
    stored_bytes: int
    encoded_weights: int
    error: float
    perplexity: float
    same_next_token: float


def windows(count: int, context: int) -> Iterator[tuple[slice, int]]:
    """Overlapping parts of `count` tokens, half a context apart, and how many tokens at the end of each are new in it."""
    step, done = context // 2, 1
    while done < count:
        end = min(count, context if done == 1 else done + step)
        yield slice(max(0, end - context), end), end - done
        done = end


@torch.no_grad()
def predict(model: Any, ids: torch.Tensor, context: int) -> tuple[float, torch.Tensor]:
    """The perplexity of all tokens of `ids` [tokens] but the first, and int64 [tokens - 1]: the likeliest token at each."""
    nats, likeliest = 0.0, []
    for part, new in windows(len(ids), context):
        given = ids[None, part].to(model.device)
        logits = model(given, use_cache=False).logits[0, -new - 1 : -1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, given[0, -new:], reduction="sum"))
        likeliest.append(logits.argmax(-1).cpu())
    return math.exp(nats / (len(ids) - 1)), torch.cat(likeliest)


def decoded(entries: Mapping[str, TensorEntry], name: str) -> torch.Tensor:
    """The weight as float64; the int8 rows that bitsandbytes computes with have their scales next to them."""
    values, scales = read_tensor(entries[name]).double(), f"{name.removesuffix('weight')}SCB"
    return values * read_tensor(entries[scales]).double()[:, None] / 127 if scales in entries else values


def error_of(entries: Mapping[str, TensorEntry], originals: Mapping[str, TensorEntry]) -> tuple[int, float]:
    """How many weights are encoded, and the root mean square of their errors relative to that of the originals."""
    differences = squares = 0.0
    encoded = [
        name for name in originals.keys() & entries.keys() if entries[name].is_encoded or entries[name].dtype == torch.int8
    ]
    for name in encoded:
        original = read_tensor(originals[name]).double()
        differences += float((decoded(entries, name) - original).square().sum())
        squares += float(original.square().sum())
    return len(encoded), math.sqrt(differences / squares) if encoded else 0.0


def with_noise(model: Path, folder: Path, share: float) -> Path:
    """A copy of `model` whose matrices have normal noise of `share` of their root mean square: off any format's grid."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("rabbit_shards"))
    generator = torch.Generator().manual_seed(0)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.ndim > 1:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().square().mean().sqrt() * share
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def as_table(found: list[Quality]) -> Table:
    """A row for each encoding."""
    table = Table("encoding", "stored", "encoded weights", "error", "perplexity", "same next token")
    for row in found:
        told = (f"{row.error:.4f}", f"{row.perplexity:.3f}", f"{row.same_next_token:.1%}")
        table.add_row(row.encoding, format_bytes(row.stored_bytes), str(row.encoded_weights), *told)
    return table


def main(
    model: Annotated[Path, typer.Argument(help="A folder with safetensors files in 16 bits, and a tokenizer.")],
    text: Annotated[Path | None, typer.Option(help="Any text file; default: the pages in docs/.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens of it.")] = 4096,
    context: int = 512,
    noise: Annotated[float, typer.Option(help="Added to the matrices first, as a share of their root mean square.")] = 0.0,
    gguf: Annotated[list[Path] | None, typer.Option(help="The same model as a GGUF file. May be repeated.")] = None,
    only: Annotated[str | None, typer.Option("--encodings", help="Which, with commas between; default: all.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="For weights, on the CPU.")] = None,
    saving_path: Annotated[Path | None, typer.Option(help="Where splits are kept.")] = None,
) -> None:
    """Load the model in one encoding after another, predict the text, print a table and the records."""
    content = text.read_text() if text else "\n".join(page.read_text() for page in sorted(DOCS.glob("*.md")))
    with tempfile.TemporaryDirectory() as scratch:
        source = with_noise(model, Path(scratch) / "noisy", noise) if noise else model
        splits = saving_path or Path(scratch) / "splits"
        asked = [Asked(name, source, {"layer_shards_saving_path": splits, **keywords}) for name, keywords in encodings().items()]
        asked += [Asked(file.name, file) for file in gguf or ()]
        chosen = {ORIGINAL, *only.split(",")} if only else {one.name for one in asked}
        asked = [one.alone(Path(scratch)) if one.name == LOSSLESS else one for one in asked if one.name in chosen]
        common = {"dtype": "bfloat16", "device": "cpu", "max_memory": {"cpu": max_memory} if max_memory else None}
        found = list(measure(asked, common, content, tokens, context))
    Console(width=140).print(as_table(found))
    told = {"model": model.name, "noise": noise, "tokens": tokens, "context": context, **environment()}
    told["text"] = hashlib.sha256(content.encode()).hexdigest()[:12]
    for row in found:
        print(json.dumps({**asdict(row), "conditions": told}))


def measure(asked: Sequence[Asked], common: dict[str, Any], text: str, tokens: int, context: int) -> Iterator[Quality]:
    """The original comes first: the others are compared with it."""
    with asked[0].load(common) as original:
        ids = original.tokenizer(text, return_tensors="pt")["input_ids"][0, :tokens]
        entries = dict(runtime_of(original).checkpoint.entries)
        perplexity, reference = predict(original, ids, context)
        yield Quality(ORIGINAL, original.get_memory_footprint(return_buffers=False), 0, 0.0, perplexity, 1.0)
    for one in asked[1:]:
        with one.load(common) as model:
            encoded, error = error_of(runtime_of(model).checkpoint.entries, entries)
            perplexity, likeliest = predict(model, ids, context)
            same = float((likeliest == reference).float().mean())
            yield Quality(one.name, model.get_memory_footprint(return_buffers=False), encoded, error, perplexity, same)


if __name__ == "__main__":
    typer.run(main)
