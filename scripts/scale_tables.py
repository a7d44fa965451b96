"""The tables of docs/scale.md: models on machines that nobody has here, planned and simulated.

`scale_tables.py` prints them; `--write` puts them into docs/scale.md. `--measured FILE` prints what was measured on real machines
beside what the plan and the simulator say. The file is a JSON list of runs:

    [{"name": "four nodes", "model": "7.5 GB", "texts": 1, "measured_s": 0.31, "machines": [...]}]

`model` is one of the SHAPES below or the folder of a checkpoint; `machines` are listed as for `rabbit plan --machines`, with
measured rates; `measured_s` are the seconds until each of the texts has one more token. `ranges`, if given, are the layers that
each machine had, as `[["pc1", 0, 4], ["pc2", 4, 16]]`; else they are planned.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from rabbit_engine.architectures import build_skeleton
from rabbit_engine.config import CompressionConfig
from rabbit_engine.errors import BudgetError, ConfigurationError
from rabbit_engine.model import read_settings
from rabbit_engine.planning.forecast import layers_of
from rabbit_engine.planning.machines import Machine, parse_machines
from rabbit_engine.planning.partition import partition_model
from rabbit_engine.planning.stage_simulation import Failures, simulate_plan
from rabbit_engine.planning.stages import LayeredUnits, StagesPlan, layered_units, plan_stages
from rabbit_engine.planning.stages_plan import row_of_stages
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.utils.sizes import format_seconds

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"

SHAPES: dict[str, tuple[Any, Any]] = {
    "70B": (
        LlamaForCausalLM,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "405B": (
        LlamaForCausalLM,
        {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    ),
    "671B, experts": (DeepseekV3ForCausalLM, {}),
    "7.5 GB": (
        LlamaForCausalLM,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        },
    ),
}

PC = Machine(
    name="pc",
    memory_bytes=13 * 10**9,
    disk_rate=3e9,
    seconds_per_byte=1 / 20e9,
    seconds_per_layer=1e-3,
    further_text=0.1,
    link_rate=117e6,
    link_latency_s=1e-3,
)
"""A PC with 16 GB, an NVMe disk and 1 Gbit/s."""

LARGE = {"memory_bytes": 58 * 10**9, "seconds_per_byte": 1 / 40e9}
"""What differs in a PC with 64 GB of faster memory."""

PROMPT, ANSWER, TEXTS = 500, 200, 10_000
"""Tokens of each text of the service, and texts."""


def copies(count: int, **changes: Any) -> list[Machine]:
    """PCs that differ from PC by `changes`."""
    fields = {name: getattr(PC, name) for name in PC.__slots__} | changes
    return [Machine(**(fields | {"name": f"pc{index + 1}"})) for index in range(count)]


@functools.cache
def units_of(shape: str, compression: str | None, cached_tokens: int = 0) -> LayeredUnits:
    """The units of a model of that shape without weights: those that a split, or streaming in place, would have."""
    cls, sizes = SHAPES[shape]
    own = {"num_key_value_heads": 8, "vocab_size": 128256, **sizes} if cls is LlamaForCausalLM else sizes
    config = (LlamaConfig if cls is LlamaForCausalLM else DeepseekV3Config)(max_position_embeddings=8192, **own)
    skeleton = build_skeleton(cls, config, torch.bfloat16)
    stored = None if compression is None else CompressionConfig(method=compression)
    return layered_units(partition_model(skeleton, *unread_entries(skeleton, stored)), cached_tokens=cached_tokens)


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gb(nbytes: float) -> str:
    """Bytes in GB."""
    return f"{nbytes / 1e9:.3g}" if nbytes else "0"


def bound(plan: StagesPlan, texts: int) -> str:
    """What bounds a pass, and whether the machine that does is the driver."""
    kind, name = plan.bound(texts)
    if not name:
        return {"disk": "disks", "link": "messages"}.get(kind, kind)
    where = "the driver" if name == plan.driver.name else "one machine"
    return f"{kind} of {where}" if len(plan.machines) > 1 else kind


def simulated(plan: StagesPlan, texts: int) -> str:
    """The simulator's seconds."""
    return format_seconds(simulate_plan(plan, texts, tokens=16).pass_s)


def passes(plan: StagesPlan) -> list[str]:
    """The columns of one text and of eight."""
    return [
        gb(plan.resident_bytes),
        gb(plan.pass_bytes),
        format_seconds(plan.pass_s),
        simulated(plan, 1),
        bound(plan, 1),
        f"{format_seconds(plan.seconds(8))} ({bound(plan, 8)})",
    ]


COLUMNS = ["in memory, GB", "read a token, GB", "s a token", "simulated", "bound by", "8 texts: s a token of each"]


def seventy() -> str:
    """70B on PCs of 16 GB."""

    def rows() -> Iterator[Sequence[str]]:
        for stored, compression in (("bf16", None), ("4-bit", "4bit")):
            units = units_of("70B", compression)
            for disk in (3e9, 0.5e9) if compression is None else (3e9,):
                kind = "NVMe" if disk == PC.disk_rate else "SATA, 0.5 GB/s"
                for count, rounds in ((1, 1), (4, 1), (4, 32)):
                    how = "alone" if count == 1 else "in turns" if rounds > 1 else "in ranges"
                    plan = plan_stages(units, copies(count, disk_rate=disk), most_rounds=rounds, several=1)
                    yield [f"{stored}, {kind}", f"{count}, {how}", *passes(plan)]

    return table(["weights, disk", "PCs", *COLUMNS], rows())


def large() -> str:
    """405B and 671B on PCs of 64 GB."""

    def rows() -> Iterator[Sequence[str]]:
        for shape, stored, compression in (
            ("405B", "bf16", None),
            ("405B", "4-bit", "4bit"),
            ("671B, experts", "8-bit", "8bit"),
            ("671B, experts", "4-bit", "4bit"),
        ):
            for count in (8, 16, 32):
                units, machines = units_of(shape, compression), copies(count, **LARGE)
                in_ranges, in_turns = (plan_stages(units, machines, most_rounds=rounds, several=1) for rounds in (1, 32))
                yield [f"{shape}, {stored}", f"{count}", *passes(in_ranges)]
                if in_turns.pass_s < in_ranges.pass_s * 0.99:
                    yield [f"{shape}, {stored}", f"{count}, in turns", *passes(in_turns)]

    return table(["model", "PCs", *COLUMNS], rows())


SERVERS: dict[str, tuple[int, dict[str, Any]]] = {
    "PC, 1 Gbit/s": (32, LARGE),
    "PC, 10 Gbit/s": (32, LARGE | {"link_rate": 1.17e9, "link_latency_s": 5e-4}),
    "PC with a GPU of 24 GB, 10 Gbit/s": (
        32,
        {
            "memory_bytes": 22 * 10**9,
            "seconds_per_byte": 1 / 700e9,
            "seconds_per_layer": 2e-4,
            "further_text": 0.01,
            "link_rate": 1.17e9,
            "link_latency_s": 5e-4,
        },
    ),
}


def service() -> str:
    """10,000 texts for the 70B model in 4 bits, on 32 machines in one row or in several."""

    def rows() -> Iterator[Sequence[str]]:
        for kind, (count, changes) in SERVERS.items():
            for size in (4, 8, 32):
                machines = copies(size, **changes)
                plan = _with_most_texts(machines, count // size)
                texts = plan.texts
                run = simulate_plan(plan, texts, tokens=ANSWER, prompt=PROMPT)
                seconds = run.seconds * TEXTS / (texts * (count // size))
                yield [
                    kind,
                    f"{count // size} of {size}",
                    f"{texts}",
                    f"{plan.groups(texts)}",
                    f"{TEXTS * ANSWER / seconds:,.0f}",
                    format_seconds(seconds),
                    f"{run.bubbles:.0%}",
                    f"{run.sending[plan.driver.name]:.0%}",
                ]

    header = ["machines", "rows", "texts at once a row", "in groups", "tokens a second", "all done in", "bubbles"]
    return table([*header, "driver's link busy"], rows())


def _with_most_texts(machines: Sequence[Machine], row_count: int) -> StagesPlan:
    """The plan of as many texts as have their caches in memory beside all the weights, up to an equal part of all."""
    units = units_of("70B", "4bit", PROMPT + ANSWER)
    free = sum(machine.memory_bytes for machine in machines) - units.weights_bytes
    texts = min(int(free / (units.cache_bytes * len(units.layers))), -(-TEXTS // row_count))
    while True:
        with suppress(BudgetError):
            plan = plan_stages(replace(units, cache_bytes=texts * units.cache_bytes), machines, texts=texts)
            if not plan.pass_bytes:
                return plan
        texts = texts * 19 // 20


def failures() -> str:
    """An answer of 200 tokens of the 405B model in 4 bits, with machines that fail."""

    def rows() -> Iterator[Sequence[str]]:
        for count in (8, 32):
            plan = plan_stages(units_of("405B", "4bit"), copies(count, **LARGE), texts=count)
            plain = simulate_plan(plan, tokens=ANSWER, prompt=PROMPT).seconds
            for often, every_s in (("a month", 30 * 86400), ("a day", 86400), ("in four hours", 4 * 3600), ("an hour", 3600)):
                fates = [Failures(every_s=every_s, recovery_s=60, seed=seed) for seed in range(20)]
                try:
                    runs = [simulate_plan(plan, tokens=ANSWER, prompt=PROMPT, failures=fate) for fate in fates]
                except ConfigurationError:  # they fail sooner than the text is computed again
                    yield [f"{count}", often, format_seconds(plain), "-", "never done"]
                    continue
                lost = sum(run.seconds for run in runs) / len(runs) - plain
                number = sum(run.failures for run in runs) / len(runs)
                yield [f"{count}", often, format_seconds(plain), f"{number:.2g}", f"{lost / plain:.1%}"]

    return table(["PCs", "each fails once", "without failures", "failures an answer", "longer on average by"], rows())


TABLES: dict[str, Callable[[], str]] = {"seventy": seventy, "large": large, "service": service, "failures": failures}


def measured(file: Path) -> str:
    """What was measured, beside what is planned and simulated for the same machines."""

    def rows() -> Iterator[Sequence[str]]:
        for run in json.loads(file.read_text(encoding="utf-8")):
            machines, texts = parse_machines(run["machines"]), int(run.get("texts", 1))
            plan = _plan_as_run(run, machines, texts)
            planned, passed = plan.seconds(texts), simulate_plan(plan, texts, tokens=32).pass_s
            seconds = [format_seconds(each) for each in (run["measured_s"], planned, passed)]
            yield [run["name"], f"{texts}", *seconds, f"{planned / run['measured_s']:.2f}", bound(plan, texts)]

    header = ["run", "texts", "measured, s a token", "planned", "simulated", "planned / measured", "bound by"]
    return table(header, rows())


def _plan_as_run(run: dict[str, Any], machines: Sequence[Machine], texts: int) -> StagesPlan:
    units = units_of(run["model"], run.get("compression")) if run["model"] in SHAPES else _units_in(Path(run["model"]))
    if "ranges" not in run:
        return plan_stages(units, machines, texts=texts)
    places = {machine.name: index for index, machine in enumerate(machines)}
    return row_of_stages(units, machines, [(places[name], range(*layers)) for name, *layers in run["ranges"]], texts=texts)


def _units_in(folder: Path) -> LayeredUnits:
    settings = read_settings({"device": "cpu"}, planned=True)
    return layers_of(folder, settings.source, settings.split, settings.stream)


def write(tables: dict[str, str]) -> None:
    """Put each table into the page, between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables.items():
        marks = re.compile(rf"(<!-- table: {name} -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
        places = list(marks.finditer(page))
        if len(places) != 1:
            raise SystemExit(f"{PAGE.name} has {len(places)} places for the table {name!r}")
        page = f"{page[: places[0].start()]}{places[0][1]}{text}{places[0][2]}{page[places[0].end() :]}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all by default")
    parser.add_argument("--write", action="store_true", help="put them into docs/scale.md")
    parser.add_argument("--measured", type=Path, help="runs on real machines, as JSON")
    given = parser.parse_args()
    tables: dict[str, Callable[[], str]] = {"measured": lambda: measured(given.measured)} if given.measured else TABLES
    found = {}
    for name in given.tables or tables:
        found[name] = tables[name]()
        print(f"{name}\n\n{found[name]}\n", flush=True)
    if given.write:
        write(found)


if __name__ == "__main__":
    main()
