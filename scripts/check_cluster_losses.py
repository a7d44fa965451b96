"""Measures how long a text stands still when one of its machines is lost: with its cable cut, or with all of it killed.

    python scripts/check_cluster_losses.py MODEL [--nodes 3] [--memory 250MB] [--how cut kill] [--rounds 3] [--set NAME=VALUE ...]

Machines are Ray nodes in network namespaces of this one (Linux, root), each round with a cluster of its own. `--set` are
environment variables of every node, such as RAY_health_check_period_ms=1000. The machine is lost at the tenth token.
`noticed_s` is when Ray says that it is gone, `stood_s` the longest time between two tokens: the layers are loaded elsewhere, too.
The last line is JSON; ends with 1 if tokens differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

_TOKENS, _LOST_AT = 24, 10
_LOOK_S = 0.1
_LOSE, _RESULT = "lose ", "result "


def main() -> int:
    """Start the nodes, and this script inside of them; lose a machine when it says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--memory", default="250MB", help="for the model on each machine")
    parser.add_argument("--how", nargs="+", choices=["cut", "kill"], default=["cut", "kill"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="environment variables of the nodes")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        generate(given.model, given.memory)
        return 0
    variables = dict(one.split("=", 1) for one in given.set)
    found = {how: [_lose(given, how, variables) for _ in range(given.rounds)] for how in given.how}
    seconds = {how: {name: [one[name] for one in rounds] for name in ("noticed_s", "stood_s")} for how, rounds in found.items()}
    equal = all(one["equal"] for rounds in found.values() for one in rounds)
    print(json.dumps({"nodes": given.nodes, "set": variables, **seconds, "equal": equal}))
    return int(not equal)


def _lose(given: argparse.Namespace, how: str, variables: Mapping[str, str]) -> dict[str, Any]:
    """What one run tells."""
    from cluster.nodes import Shape, cluster_of_nodes

    command = [sys.executable, __file__, given.model, "--memory", given.memory, "--inside"]
    found: dict[str, Any] = {}
    with cluster_of_nodes(Shape(nodes=given.nodes, cpus=2), variables) as nodes:
        driver = nodes.open(command, stdout=subprocess.PIPE, text=True)
        for line in driver.stdout or ():
            print(f"{how}: {line}", end="", flush=True)
            if line.startswith(_LOSE):
                node = next(one for one in nodes.nodes if one.address == line.removeprefix(_LOSE).strip())
                node.space.cut() if how == "cut" else node.kill()
            elif line.startswith(_RESULT):
                found = json.loads(line.removeprefix(_RESULT))
                driver.kill()  # Ray would wait for the machine that is lost
        driver.wait()
    if not found:
        raise RuntimeError(f"the driver ended with {driver.returncode}")
    return found


def generate(name: str, memory: str) -> None:
    """A text whose last stage is lost at a token. Prints how long it stood still, and whether it has the tokens of an earlier
    text."""
    import torch

    from rabbit_engine import AutoModel
    from rabbit_engine.model.runtime import runtime_of

    model = AutoModel.from_pretrained(name, device="cpu", max_memory={"cpu": memory}, cluster=os.environ["RAY_ADDRESS"])
    keywords: dict[str, Any] = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    ids = torch.arange(100, 120)[None]
    expected = model.generate(ids, **keywords)
    clock = _Clock(runtime_of(model).assembly.stages[-1].name)
    found = model.generate(ids, streamer=clock, **keywords)
    gaps = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    equal = torch.equal(found, expected)
    told = {"noticed_s": round(clock.noticed_s, 1), "stood_s": round(max(gaps), 1), "equal": equal}
    print(f"{_RESULT}{json.dumps(told)}", flush=True)


class _Clock:
    """A streamer that notes when tokens come, asks for the loss of a machine, and watches for Ray's word of it."""

    def __init__(self, machine: str) -> None:
        self._machine = machine
        self.times: list[float] = []
        self.noticed_s = 0.0

    def put(self, _: Any) -> None:
        self.times.append(time.monotonic())
        if len(self.times) == _LOST_AT:
            print(f"{_LOSE}{self._machine}", flush=True)
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import ray

        began = time.monotonic()
        nodes: Any = ray.nodes
        while any(node["Alive"] and node["NodeManagerAddress"] == self._machine for node in nodes()):
            time.sleep(_LOOK_S)
        self.noticed_s = time.monotonic() - began

    def end(self) -> None:
        """Nothing is left to do."""


if __name__ == "__main__":
    sys.exit(main())
