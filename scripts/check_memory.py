"""Checks memory limits: prompts and sessions within memory cgroups, and random plans within their budgets (Linux).

    python scripts/check_memory.py limits [--runs 60]   needs root: each run has its own cgroup
    python scripts/check_memory.py plans [--runs 100]
    python scripts/check_memory.py parts

`limits` passes no max_memory, so that the library judges what is free. A run succeeds, or is refused by name; one that the
kernel kills fails the check. `plans` loads random models with random budgets and compares the growth of resident memory, up to
the end of a generation, with the budget and the predicted need of the prompt. What a process allocates once for all models
(modules that the first load imports, compiled kernels) is allocated before. `parts` compares the growth during a prompt computed
in parts with its predicted need, for a few families, each in a process of its own that computed a shorter one before.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rabbit_engine.model.runtime import runtime_of

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

LIMITS_GB = (0.6, 0.8, 1.0, 1.4, 2.0)
PROMPTS = (16, 256, 1000, 2048)
MODES = ("generate", "session", "padded")
_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_MARGIN_BYTES = 5 * 10**6
"""Margin of a plan: the heap of small blocks (kernels that replace others among them), Python's objects for units and views."""
_WARM_UP = 12
"""The first plans do not count: what a process allocates once, it has after them."""
_PARTS: dict[str, dict[str, Any]] = {
    "llama": {"cls": "Llama"},
    "llama, float32": {"cls": "Llama", "dtype": "float32"},
    "llama, all heads": {"cls": "Llama", "num_key_value_heads": 8},
    "llama, eager": {"cls": "Llama", "attention": "eager"},
    "llama, padded": {"cls": "Llama", "sequences": 3, "padded": True},
    "llama, batch": {"cls": "Llama", "sequences": 3},
    "llama, parts of 1024": {"cls": "Llama", "rows": 1024},
    "llama, 16384 tokens": {"cls": "Llama", "tokens": 16384},
    "gemma3": {"cls": "Gemma3", "sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"cls": "Qwen3"},
    "phi3": {"cls": "Phi3", "original_max_position_embeddings": 2**16},
}
"""Models and prompts of `parts`; what is not an option is a keyword of the config."""
_WAYS: tuple[dict[str, Any], ...] = ({}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4})


def main() -> int:
    """Run a part, print its figures; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["limits", "plans", "parts", "child", "child-parts"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--runs", type=int)
    options = parser.parse_args()
    if options.part == "child":
        return run_child(Path(options.rest[0]), int(options.rest[1]), options.rest[2])
    if options.part == "child-parts":
        return run_parts(Path(options.rest[0]), options.rest[1])
    check = {"limits": check_limits, "plans": check_plans, "parts": check_parts}[options.part]
    with tempfile.TemporaryDirectory(prefix="check-memory-") as folder:
        return check(Path(folder), options.runs or (60 if options.part == "limits" else 100))


def check_limits(folder: Path, runs: int) -> int:
    """Run every limit with every prompt in every mode, in a fixed shuffled order."""
    cases = list(itertools.product(LIMITS_GB, PROMPTS, MODES))
    random.Random(0).shuffle(cases)
    write_model(folder, vocab_size=200_000, hidden_size=1024, intermediate_size=512, num_hidden_layers=25)
    outcomes: Counter[str] = Counter()
    for limit, tokens, mode in cases[:runs]:
        outcome, peak = run_limited(int(limit * 1e9), folder, tokens, mode)
        outcomes[outcome.partition(":")[0]] += 1
        print(f"{limit} GB, {mode}, {tokens} tokens: {outcome}, peak {peak / 1e6:.0f} MB", flush=True)
    print(f"{sum(outcomes.values())} runs: {dict(outcomes)}; killed: {outcomes['killed']}")
    return int(outcomes["killed"] + outcomes["failed"] > 0)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[tuple[Path, Path]]:
    """A cgroup with a limit, and the file with its peak. Exits if the system does not allow it."""
    v1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if v1 else _V2) / f"check-memory-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
    except OSError as error:
        raise SystemExit(f"no memory cgroup can be made here ({error}): run it as root on Linux") from error
    try:
        yield group, group / ("memory.max_usage_in_bytes" if v1 else "memory.peak")
    finally:
        group.rmdir()


def run_limited(limit_bytes: int, folder: Path, tokens: int, mode: str) -> tuple[str, int]:
    """The outcome of a child within the limit, and its peak in bytes."""
    with memory_cgroup(limit_bytes) as (group, peak):
        enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
        command = [sys.executable, __file__, "child", str(folder), str(tokens), mode]
        done = subprocess.run(["sh", "-c", enter, "sh", *command], capture_output=True, text=True, check=False)
        told = done.stdout.strip().splitlines()
        if done.returncode in (-9, 137):
            return "killed", int(peak.read_text())
        if done.returncode or not told:
            return f"failed: {done.stderr.strip()[-300:]}", int(peak.read_text())
        return told[-1], int(peak.read_text())


def run_child(folder: Path, tokens: int, mode: str) -> int:
    """One load and prompt with the library's own budget; prints "answered" or "refused: why"."""
    import torch

    from rabbit_engine import AutoModel, Session, errors

    torch.set_num_threads(1)
    try:
        with AutoModel.from_pretrained(folder, device="cpu") as model:
            if mode == "session":
                model.tokenizer = NoTokenizer()
                with Session(model, max_requests=8) as session:
                    session.generate([[3 + index] * tokens for index in range(8)], max_new_tokens=2, temperature=0)
            else:
                ids = torch.randint(3, 100, (4 if mode == "padded" else 1, tokens))
                mask = torch.ones_like(ids)
                mask[1:, : tokens // 2] = 0
                model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
            print("answered")
    except (errors.PromptTooLongError, errors.BudgetError) as error:
        print(f"refused: {error}")
    return 0


class NoTokenizer:
    """For prompts that are token ids."""

    pad_token_id, eos_token_id, padding_side, all_special_ids = 0, 2, "left", ()

    def decode(self, *_: Any, **__: Any) -> str:
        """Nothing."""
        return ""


def write_model(folder: Path, **shape: Any) -> None:
    """A Llama in bf16 whose matrices all repeat the same numbers."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        **{"num_key_value_heads": heads // 2} | shape, num_attention_heads=heads, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    numbers = (torch.randn(2**20) * 0.02).to(torch.bfloat16)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        count = tensor.numel()
        return numbers.repeat(-(-count // len(numbers)))[:count].view(tensor.shape).clone()

    save_file({name: fill(tensor) for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def check_plans(folder: Path, runs: int) -> int:
    """Random models in random budgets; the first few warm the process up and do not count."""
    import torch

    torch.set_num_threads(1)
    fill_kernels()
    chosen = random.Random(0)
    over = []
    for index in range(-_WARM_UP, runs):
        own = folder / "model"
        own.mkdir()
        shape = random_shape(chosen)
        write_model(own, **shape)
        beyond, text = run_plan(own, chosen)
        shutil.rmtree(own)
        if index >= 0:
            over.append(beyond)
            print(f"{index}: {shape}: {text}", flush=True)
    beyond_margin = sum(nbytes > _MARGIN_BYTES for nbytes in over)
    print(f"{runs} plans: peak over plan median {statistics.median(over) / 1e6:.1f} MB, worst {max(over) / 1e6:.1f} MB; ", end="")
    print(f"{beyond_margin} beyond the margin of {_MARGIN_BYTES / 1e6:.0f} MB")
    return int(beyond_margin > 0)


def random_shape(chosen: random.Random) -> dict[str, Any]:
    """Keywords of a LlamaConfig."""
    hidden = chosen.choice([256, 512, 1024])
    return {
        "vocab_size": chosen.choice([4000, 16_000, 64_000]),
        "hidden_size": hidden,
        "intermediate_size": chosen.choice([1000, 1408, 2816]),
        "num_hidden_layers": chosen.randint(2, 8),
        "num_key_value_heads": hidden // 64 // chosen.choice([1, 2, 4]),
        "tie_word_embeddings": chosen.random() < 0.5,
    }


def fill_kernels() -> None:
    """Compile as many of torch's bf16 kernels as the process will keep."""
    import torch

    import rabbit_engine  # noqa: F401 - sets how many, before the first

    for size in range(64, 128):
        torch.ones(size, 256, dtype=torch.bfloat16) @ torch.ones(256, 8 * size, dtype=torch.bfloat16)


def run_plan(folder: Path, chosen: random.Random) -> tuple[int, str]:
    """The bytes by which the peak of loading and generating exceeds the budget and the need of the prompt."""
    import torch

    from rabbit_engine import AutoModel, errors
    from rabbit_engine.model.admission import demand_of
    from rabbit_engine.planning.demand import need_bytes
    from rabbit_engine.transformers_bridge.generation import settings_of

    tokens, answer, way = chosen.choice([16, 100, 500]), chosen.choice([3, 3, 40]), chosen.choice(_WAYS)
    inside = tokens + answer if not way and chosen.random() < 0.3 else None
    try:
        AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": 1}, max_seq_len=inside).close()
    except errors.BudgetError as error:
        smallest = error.smallest_bytes
    budget = int(smallest + chosen.random() * 1.2 * (folder / "model.safetensors").stat().st_size)
    asked = {"max_new_tokens": answer, "do_sample": False} | way
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    with AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": budget}, max_seq_len=inside) as model:
        prompt = torch.randint(3, 100, (1, tokens))
        model.generate(prompt, **asked)
        demand = demand_of(prompt, asked, settings_of(asked, None, model.generation_config))
        need = 0 if inside else need_bytes(runtime_of(model).partition.probe, demand)
    grown = _resident("VmHWM") - before
    beyond = grown - budget - need
    how = f"{tokens} tokens, {answer} to come{', inside' if inside else ''} {way or ''}"
    return beyond, f"budget {budget / 1e6:.1f} MB, {how}: {need / 1e6:.1f}, grew by {grown / 1e6:.1f}: {beyond / 1e6:+.1f} MB"


def check_parts(folder: Path, _: int) -> int:
    """Compute a prompt in parts with each model: 1 if one took more than predicted."""
    over = 0
    for name in _PARTS:
        command = [sys.executable, __file__, "child-parts", str(folder / name.replace(" ", "-")), name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed: {done.stderr.strip()[-300:]}")
            return 1
        grown, need = map(int, done.stdout.split()[-2:])
        over += grown > need + _MARGIN_BYTES
        print(f"{name}: predicted {need / 1e6:.1f} MB, grew by {grown / 1e6:.1f}: {need / max(1, grown):.2f} times", flush=True)
    return int(over > 0)


def run_parts(folder: Path, name: str) -> int:
    """One model and prompt of `_PARTS`; prints the bytes by which memory grew, and those predicted."""
    import torch

    from rabbit_engine import AutoModel, errors
    from rabbit_engine.planning.demand import Demand, need_bytes
    from rabbit_engine.utils.heap import give_free_memory_back

    torch.set_num_threads(1)
    shape = dict(_PARTS[name])
    tokens, rows, sequences = (int(shape.pop(key, usual)) for key, usual in (("tokens", 6144), ("rows", 512), ("sequences", 1)))
    padded, attention = bool(shape.pop("padded", False)), shape.pop("attention", "sdpa")
    write_random_model(folder, **shape)
    fill_kernels()
    fixed: dict[str, Any] = {"device": "cpu", "max_seq_len": 4 * sequences * tokens, "attn_implementation": attention}
    try:
        AutoModel.from_pretrained(folder, **fixed, max_memory={"cpu": 1}).close()
    except errors.BudgetError as error:  # so that weights move, and parts wait for each other
        fixed["max_memory"] = {"cpu": error.smallest_bytes}
    with AutoModel.from_pretrained(folder, **fixed) as model:
        assert runtime_of(model).computes_parts
        assert model.plan.streamed
        for length in (2 * rows + 1, tokens):
            gc.collect()
            give_free_memory_back()
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmRSS")
            ids = torch.randint(3, 100, (sequences, length))
            mask = torch.ones_like(ids)
            if padded:
                mask[1:, : length // 3] = 0
            model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, prefill_chunk_size=rows, pad_token_id=0)
        grown = _resident("VmHWM") - before
        demand = Demand(tokens, 2, sequences=sequences, padded=padded, chunk=rows)
        print(grown, need_bytes(runtime_of(model).partition.probe, demand))
    return 0


def write_random_model(folder: Path, cls: str, dtype: str = "bfloat16", **shape: Any) -> None:
    """A model of that class with random weights."""
    import torch
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 64,
        "num_key_value_heads": 2, "vocab_size": 4000, "max_position_embeddings": 2**16, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    config = getattr(transformers, f"{cls}TextConfig" if cls == "Gemma3" else f"{cls}Config")(**sizes | shape)
    getattr(transformers, f"{cls}ForCausalLM")(config).to(getattr(torch, dtype)).save_pretrained(folder)


def _resident(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
