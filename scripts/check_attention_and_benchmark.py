"""Which attention implementations work here and why; with `--benchmark`, their speed on a prompt and on a token.

    python scripts/check_attention_and_benchmark.py [--model M] [--benchmark] [--contexts 128,512,1024,2048] [--rounds N] [--json]

Works without a GPU. The model is the demo's small one by default. An implementation works if the model was loaded with it.
The benchmark streams the model from disk in the smallest budget, and runs it again with everything resident; implementations
and context lengths are interleaved in one process. `rabbit_engine/diagnostics/attention_benchmark.py` defines what counts as
attention. Where auto is one of the others, their difference is the noise.
"""

from __future__ import annotations

import json as jsonlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import logging as transformers_logging

from rabbit_engine import AutoModel
from rabbit_engine.config import ATTENTION_IMPLEMENTATIONS
from rabbit_engine.devices import parse_device
from rabbit_engine.diagnostics.attention_benchmark import PassSample, sample_passes
from rabbit_engine.diagnostics.benchmark import BenchmarkRow, decode_step, made_up_prompt, prefill
from rabbit_engine.diagnostics.demo import MODEL, load_small_model
from rabbit_engine.errors import AttentionUnavailableError, BudgetError, RabbitError
from rabbit_engine.model.attention import choose_attention
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.utils.platform import environment, free_memory_bytes, is_flash_attention_available
from rabbit_engine.utils.sizes import format_bytes

STREAMED, RESIDENT = "weights from disk", "everything resident"
DECODE, PROMPT = "decoding", "prompt"
HEADER = "| implementation | tokens | tokens/s | slowest to fastest | attention, ms | of the pass | waiting for weights |"
Loader = Callable[..., Any]
Step = Callable[[], None]
Memory = dict[int | str, int | str]


@dataclass(frozen=True, slots=True)
class Check:
    """Whether an implementation works here, and why."""

    implementation: str
    works: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Lane:
    """One condition: `implementation` as requested, `active` as in use; `tokens` of a prompt, or after which one is decoded."""

    placement: str
    phase: str
    implementation: str
    active: str
    tokens: int


def loader(model: str | None, **keywords: Any) -> Loader:
    """Loads the model, or the demo's, with these keywords and those of the call."""
    if model is None:
        return lambda **more: load_small_model(**keywords, **more)[0]
    return partial(AutoModel.from_pretrained, model, **keywords)


def place_of(device: torch.device) -> int | str:
    """The device's name in `max_memory`."""
    return "cpu" if device.type == "cpu" else device.index or 0


def smallest_memory(load: Loader, device: torch.device) -> Memory:
    """The smallest `max_memory`, which streams everything possible; on a GPU with no weights in host memory."""
    memory: Memory = {place_of(device): 1, "cpu": 1}
    for missing in dict.fromkeys(("cpu", place_of(device))):
        try:
            load(max_memory=memory).close()
        except BudgetError as error:
            memory[missing] = error.smallest_bytes
    return memory


def try_all(load: Loader, names: Sequence[str], stack: ExitStack) -> tuple[dict[str, Any], dict[str, AttentionUnavailableError]]:
    """The models by the implementation they were loaded with, and the errors of those that do not work; `stack` closes them."""
    models: dict[str, Any] = {}
    errors: dict[str, AttentionUnavailableError] = {}
    for name in names:
        try:
            models[name] = stack.enter_context(load(attn_implementation=name))
        except AttentionUnavailableError as error:
            errors[name] = error
    return models, errors


def checks(models: Mapping[str, Any], errors: Mapping[str, AttentionUnavailableError]) -> list[Check]:
    """A row for each implementation but auto, which is one of the others."""
    reasons = {
        "flash_attention_2": is_flash_attention_available()[1],
        "sdpa": f"loaded with it: the class has it, and torch {torch.__version__} brings it",
        "eager": "loaded with it: the class's own tensor operations",
    }
    return [Check(name, name in models, str(errors.get(name, reason))) for name, reason in reasons.items()]


def facts(model: Any, requested: str, source: str) -> str:
    """What the choice depends on, and the choice, one line each."""
    device, dtype, cls = runtime_of(model).device, runtime_of(model).dtype, runtime_of(model).architecture.cls
    gpu = "no CUDA device"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        gpu = f"{torch.cuda.get_device_name(0)}, compute capability {major}.{minor}; flash-attn needs 8.0"
    reason = choose_attention(requested, cls, dtype, device).reason
    rows = {
        "model": f"{cls.__name__}, {source}",
        "device": f"{device}, {str(dtype).removeprefix('torch.')}",
        "gpu": gpu,
        "flash-attn": is_flash_attention_available()[1],
        "in use": f"{model.active_attention_implementation} ({requested}: {reason})",
    }
    return "\n".join(f"{name:<12}{value}" for name, value in rows.items())


def prompt_step(model: Any, tokens: int) -> Step:
    """A prompt of `tokens` tokens, with its own cache."""
    ids = made_up_prompt(model, tokens)

    def step() -> None:
        prefill(model, ids)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return step


def lanes_of(placement: str, models: Mapping[str, Any], contexts: Sequence[int]) -> dict[Lane, tuple[Any, Step]]:
    """Model and step of each lane: every phase, context length and implementation."""
    lanes: dict[Lane, tuple[Any, Step]] = {}
    for phase, make in ((DECODE, decode_step), (PROMPT, prompt_step)):
        for tokens in contexts:
            for name, model in models.items():
                lane = Lane(placement, phase, name, model.active_attention_implementation, tokens)
                lanes[lane] = (model, make(model, tokens))
    return lanes


def measure(lanes: Mapping[Lane, tuple[Any, Step]], rounds: int, passes: int) -> list[BenchmarkRow]:
    """Every lane once a round, after an untimed pass of one token: a prompt once, a decoded token `passes` times."""
    found: dict[Lane, list[PassSample]] = {lane: [] for lane in lanes}
    for index in range(rounds):
        start = time.perf_counter()
        for lane, (model, step) in lanes.items():
            prefill(model, made_up_prompt(model, 1))
            found[lane].append(sample_passes(model, step, passes if lane.phase == DECODE else 1))
        typer.echo(f"round {index + 1} of {rounds}: {time.perf_counter() - start:.0f} s", err=True)
    return [record_of(lane, samples) for lane, samples in found.items()]


def record_of(lane: Lane, samples: Sequence[PassSample]) -> BenchmarkRow:
    """Every round of a lane; shares are of a pass, median by median."""
    pass_s = statistics.median(one.pass_s for one in samples)
    parts = {name: [getattr(one, f"{name}_s") for one in samples] for name in ("attention", "wait", "moving")}
    conditions = {
        **asdict(lane),
        **{f"{name}_s": values for name, values in parts.items()},
        **{f"{name}_share": statistics.median(values) / pass_s for name, values in parts.items()},
        "threads": torch.get_num_threads(),
        **environment(),
    }
    read = round(statistics.median(one.read_bytes for one in samples))
    name = f"{lane.placement}, {lane.phase}, {lane.implementation}, {lane.tokens} tokens"
    return BenchmarkRow(name, tuple(one.pass_s for one in samples), read, conditions)


def figure(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def as_row(record: BenchmarkRow) -> str:
    """A lane's medians as a row below HEADER."""
    c = record.conditions
    tokens = c["tokens"] if c["phase"] == PROMPT else 1
    name = f"auto ({c['active']})" if c["implementation"] == "auto" else c["implementation"]
    spread = f"{figure(tokens / max(record.rounds_s))} to {figure(tokens / min(record.rounds_s))}"
    attention = f"{figure(1000 * statistics.median(c['attention_s']))} | {c['attention_share']:.1%}"
    known = attention if c["attention_share"] else "not known | -"
    return f"| {name} | {c['tokens']} | {figure(tokens / record.median_s)} | {spread} | {known} | {c['wait_share']:.1%} |"


def as_tables(records: Sequence[BenchmarkRow], errors: Mapping[str, AttentionUnavailableError]) -> str:
    """A table for each placement and phase; what does not work has a row in each."""
    left_out = [f"| {name} | | left out: {error} | | | | |" for name, error in errors.items()]
    lines: list[str] = []
    for key in dict.fromkeys((record.conditions["phase"], record.conditions["placement"]) for record in records):
        own = [record for record in records if (record.conditions["phase"], record.conditions["placement"]) == key]
        moved = f", {format_bytes(own[0].bytes_moved)} a pass" if own[0].bytes_moved else ""
        lines += [f"{', '.join(key)}{moved}:", "", HEADER, "|---" * 7 + "|", *map(as_row, own), *left_out, ""]
    common = {name: records[0].conditions[name] for name in ("threads", *environment())}
    conditions = "; ".join(f"{name}: {value}" for name, value in common.items())
    return "\n".join([*lines, f"Medians of {len(records[0].rounds_s)} interleaved rounds. {conditions}."])


def share_text(record: BenchmarkRow) -> str:
    """Attention's share of a pass, with the figures it is made of."""
    c = record.conditions
    what = f"a decoded token behind {c['tokens']} tokens" if c["phase"] == DECODE else f"a prompt of {c['tokens']} tokens"
    if not c["attention_share"]:
        return f"not known of {what}, as this class does not ask transformers for its attention function"
    attention, whole = 1000 * statistics.median(c["attention_s"]), 1000 * record.median_s
    return f"{c['attention_share']:.2%} of {what} ({attention:.4g} ms of {whole:.4g} ms)"


def conclusion(records: Sequence[BenchmarkRow], requested: str) -> str:
    """Attention's share at the longest context, of the implementation asked for; of a streamed token last."""
    longest: dict[tuple[str, str], BenchmarkRow] = {}
    for record in records:  # contexts ascend
        if record.conditions["implementation"] == requested:
            longest[record.conditions["placement"], record.conditions["phase"]] = record
    last = longest.pop((STREAMED, DECODE))
    others = [f"{placement}: attention itself: {share_text(record)}" for (placement, _), record in longest.items()]
    waiting, moving = last.conditions["wait_share"], last.conditions["moving_share"]
    weights = f"waiting for weights: {waiting:.1%}, weights on their way during {moving:.1%}"
    return "\n".join([*others, f"Attention itself, {STREAMED}: {share_text(last)}; {weights}."])


def parse_contexts(text: str, model: Any) -> list[int]:
    """`"128,512"` as ascending numbers of tokens, without those that exceed the model's positions."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"--contexts {text} is not a list of numbers of tokens, such as 128,512")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    wanted = sorted({int(part) for part in text.split(",")})
    fitting = [tokens for tokens in wanted if most is None or tokens < most]
    if not fitting:
        raise typer.BadParameter(f"--contexts {text}: the model has {most} positions, and one must be left to decode")
    if fitting != wanted:
        typer.echo(f"the model has {most} positions: skipping longer contexts", err=True)
    return fitting


def no_room(whole_bytes: int, count: int, free_bytes: int) -> str | None:
    """Why the resident lanes are left out: all models may take half of what is free."""
    if count * whole_bytes <= free_bytes // 2:
        return None
    return f"{RESIDENT}: left out, {count} models take {format_bytes(count * whole_bytes)} of {format_bytes(free_bytes)} free"


def benchmark(load: Loader, models: Mapping[str, Any], contexts: Sequence[int], rounds: int, passes: int) -> list[BenchmarkRow]:
    """The streamed `models`, then the same with everything resident if there is room."""
    first = next(iter(models.values()))
    device, whole_bytes = runtime_of(first).device, first.plan.weights_bytes + first.plan.staging_bytes
    records = measure(lanes_of(STREAMED, models, contexts), rounds, passes)
    reason = no_room(whole_bytes, len(models), free_memory_bytes(device))
    if reason is not None:
        typer.echo(reason, err=True)
        return records
    memory = dict.fromkeys((place_of(device), "cpu"), whole_bytes)
    with ExitStack() as stack:
        resident, _ = try_all(partial(load, max_memory=memory), list(models), stack)
        return [*records, *measure(lanes_of(RESIDENT, resident, contexts), rounds, passes)]


def main(
    model: Annotated[str | None, typer.Option(help=f"A repo id, a folder, or a .gguf file; the default is {MODEL}.")] = None,
    benchmark_: Annotated[bool, typer.Option("--benchmark", help="Measure those that work.")] = False,
    attn_implementation: Annotated[str, typer.Option(help=f"What to use: {', '.join(ATTENTION_IMPLEMENTATIONS)}.")] = "auto",
    contexts: Annotated[str, typer.Option(help="Tokens of context.")] = "128,512,1024,2048",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; tables hold medians.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens a round.")] = 3,
    device: Annotated[str | None, typer.Option(help="cuda:0, xpu:0, mps or cpu; the default is the best available.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print checks and records as JSON lines too.")] = False,
) -> None:
    """Check every implementation by loading the model with it; with --benchmark, measure those that work."""
    transformers_logging.set_verbosity_error()
    target = parse_device(device)
    load = loader(model, device=target, dtype=dtype, profiling_mode=True)
    streamed = partial(load, max_memory=smallest_memory(load, target))
    with ExitStack() as stack:
        models, errors = try_all(streamed, list(dict.fromkeys((attn_implementation, *ATTENTION_IMPLEMENTATIONS))), stack)
        if attn_implementation in errors:
            raise errors[attn_implementation]
        rows = checks(models, errors)
        print(facts(models[attn_implementation], attn_implementation, model or MODEL))
        print("\n| implementation | works here | why |\n|---|---|---|")
        print(
            *(f"| {row.implementation} | {'yes' if row.works else 'no'} | {row.reason} |" for row in rows), sep="\n", flush=True
        )
        records: list[BenchmarkRow] = []
        if benchmark_:
            lengths = parse_contexts(contexts, models[attn_implementation])
            records = benchmark(load, models, lengths, rounds, tokens)
            print("", as_tables(records, errors), sep="\n")
        if json:
            print("", *(jsonlib.dumps(asdict(row)) for row in rows), *(record.as_json() for record in records), sep="\n")
        if records:
            print("", conclusion(records, attn_implementation), sep="\n")


if __name__ == "__main__":
    try:
        typer.run(main)
    except RabbitError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
