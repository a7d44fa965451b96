"""Seconds a token of a model over 1, 2 and 4 machines with the same memory each, beside what the plan said.

    python scripts/benchmark_cluster.py MODEL --nodes 1 2 4 --memory 2.2GB --rate 1gbit --rounds 5 --ranges 1 32

Machines are Ray nodes in network namespaces of this one (Linux, root), with shaped links and a limit of memory each; they share
its processors. With `--disk 500MB/s` each reads its own disk, at that rate; without, they share the machine's. The nodes
of a round run one behind another, rounds alternate. With `--ranges 1 32` each number of nodes runs twice: with one range of
layers a machine, and with up to 32 in turn. With one node nothing is a cluster: the same call without `cluster`. Prints one JSON
line a run, and a table; `--runs FILE` is for `scale_tables.py --measured`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

Kind = tuple[int, int]
"""Nodes, and the most ranges of layers on each."""

OVERHEAD_BYTES = 2_000_000_000
"""What a node's group may take besides the model: Ray's processes, its object store, Python and torch of driver and worker."""


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory", default="2.2GB", help="for the model on each machine")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--texts", type=int, default=8, help="of the session")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ranges", type=int, nargs="+", default=[32], help="of layers on a machine, at most")
    parser.add_argument("--disk", help="the rate of a disk of each machine's own")
    parser.add_argument("--runs", type=Path, help="where to write the runs of several nodes")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cluster", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given)))
        return
    results: dict[Kind, list[dict[str, Any]]] = {
        (count, ranges): [] for count in given.nodes for ranges in (given.ranges if count > 1 else [1])
    }
    for _ in range(given.rounds):
        for (count, ranges), runs in results.items():
            runs.append(run_on(count, ranges, given))
            print(json.dumps({"nodes": count, "most_ranges": ranges, **runs[-1]}), flush=True)
    print_table(results)
    if given.runs is not None:
        given.runs.write_text(json.dumps([run for kind in results for run in runs_of(given, kind, results[kind])], indent=1))


def runs_of(given: argparse.Namespace, kind: Kind, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The medians of one number of nodes, as `scale_tables.py` takes them."""
    count, ranges = kind
    if count == 1:
        return []
    middle = results[len(results) // 2]
    name = f"{count} nodes, {'one range each' if ranges == 1 else 'in turns'}"
    shared = {"name": name, "model": given.model, "machines": middle["machines"], "ranges": middle["ranges"]}
    times = ((1, "token_s"), (given.texts, "session_token_s"))
    return [
        {**shared, "texts": texts, "measured_s": statistics.median(result[name] for result in results)} for texts, name in times
    ]


def run_on(count: int, ranges: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run over `count` nodes, with at most so many ranges of layers on each."""
    from cluster.network import Link
    from cluster.nodes import Shape, cluster_of_nodes
    from peers.memory_group import ReadLimit

    from rabbit_engine.utils.sizes import parse_bytes, parse_rate

    disk = None if given.disk is None else ReadLimit(Path(given.model), int(parse_rate(given.disk)))
    limit = parse_bytes(given.memory) + OVERHEAD_BYTES
    shape = Shape(nodes=count, memory_bytes=limit, read_limit=disk, link=Link(rate=given.rate), cpus=2)
    command = [sys.executable, __file__, given.model, "--measure", "--memory", given.memory]
    command += ["--tokens", str(given.tokens), "--texts", str(given.texts), *(["--cluster"] if count > 1 else [])]
    command += ["--ranges", str(ranges), *(["--disk", given.disk] if given.disk else [])]
    with cluster_of_nodes(shape) as nodes:
        done = nodes.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the run over {count} nodes ended with {done.returncode}: {done.stdout[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Load, generate one text and a session of several, in this process."""
    import torch

    model, memory, tokens, texts, is_cluster = given.model, given.memory, given.tokens, given.texts, given.cluster
    if given.disk:
        have_own_disks()
    limit_ranges(given.ranges[0])

    from rabbit_engine import AutoModel, Session
    from rabbit_engine.model.runtime import runtime_of

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("rabbit_engine.model.cluster").setLevel(logging.INFO)
    where: dict[str, Any] = {"cluster": os.environ["RAY_ADDRESS"]} if is_cluster else {}
    start = time.perf_counter()
    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": memory}, **where) as loaded:
        load_s = time.perf_counter() - start
        loaded.tokenizer = no_words()
        ids = torch.arange(100, 132)[None]
        times: list[float] = []

        class Clock:
            def put(self, _: object) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        found = loaded.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=Clock())
        steps = [after - before for before, after in itertools.pairwise(times[2:])]  # the first learns the layers
        with Session(loaded, prefix_store=None, max_requests=texts) as session:
            prompts = [[100 + text, *range(101, 116)] for text in range(texts)]
            seconds = []
            for count in (1, tokens):  # the first is that of the prompts
                start = time.perf_counter()
                answers = session.generate(prompts, max_new_tokens=count, min_new_tokens=count)
                seconds.append(time.perf_counter() - start)
        assembly = runtime_of(loaded).assembly
        plan = assembly.stages_plan
        return {
            "load_s": round(load_s, 2),
            "token_s": round(statistics.median(steps), 4),
            "planned_s": round(plan.seconds(1) if plan is not None else loaded.plan.pass_s, 4),
            "session_token_s": round((seconds[1] - seconds[0]) / (tokens - 1), 4),
            "session_planned_s": round(plan.seconds(texts), 4) if plan is not None else None,
            "tokens": found[0].tolist()[32:],
            "session_tokens": [list(answer.tokens) for answer in answers],
            "machines": [as_listed(one) for one in plan.machines] if plan is not None else [],
            "ranges": [[one.machine.name, one.first, one.stop] for one in plan.stages] if plan is not None else [],
            "pass_bytes": plan.pass_bytes if plan is not None else loaded.plan.pass_bytes,
        }


def as_listed(machine: Any) -> dict[str, Any]:
    """A machine as `rabbit plan --machines` reads it; the driver has no link."""
    link = {} if machine.link_rate == math.inf else {"link_rate": machine.link_rate, "link_latency_s": machine.link_latency_s}
    rates = {"disk_rate": machine.disk_rate, "compute_rate": 1 / machine.seconds_per_byte}
    processors = {"processors": machine.processors, "processors_share": machine.processors_share}
    return {"name": machine.name, "memory": machine.memory_bytes, "disk": machine.disk, **processors, **rates, **link}


def have_own_disks() -> None:
    """Machines of this kernel read from disks of their own, which the planner takes for one."""
    from rabbit_engine.model import cluster

    shared = cluster.machines_of
    cluster.machines_of = lambda *given: [dataclasses.replace(one, disk="") for one in shared(*given)]


def limit_ranges(most: int) -> None:
    """Let the planner give each machine at most so many ranges."""
    from rabbit_engine.model import cluster

    setattr(cluster, "MOST_ROUNDS", most)  # noqa: B010 - of another module


def no_words() -> Any:
    """A tokenizer without words: prompts are token ids, and no answer ends early."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0}, unk_token="x")))


def print_table(results: dict[Kind, list[dict[str, Any]]]) -> None:
    """Medians over the rounds."""
    first = next(iter(results.values()))[0]
    print("nodes  ranges  s a token  planned  session: s a token of each  planned  equal tokens")
    for (count, _), runs in results.items():
        middle = {name: statistics.median(run[name] or 0 for run in runs) for name in ("token_s", "planned_s", "session_token_s")}
        equal = all(run[name] == first[name] for run in runs for name in ("tokens", "session_tokens"))
        planned = statistics.median(run["session_planned_s"] or 0 for run in runs)
        seconds = f"{middle['token_s']:9.3f}  {middle['planned_s']:7.3f}  {middle['session_token_s']:26.3f}  {planned:7.3f}"
        print(f"{count:5}  {max(1, len(runs[0]['ranges'])):6}  {seconds}  {equal}")


if __name__ == "__main__":
    main()
