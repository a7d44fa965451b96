"""Kills workers, the driver and a machine amid `rabbit batch --cluster`, and compares the output with that of the local command.

    python scripts/check_cluster_batch.py MODEL [--lines 200] [--tokens 48] [--kills 20] [--nodes 2]

The cluster's nodes are network namespaces of this machine (Linux, root). The n-th kill comes as soon as the output has grown by
its share of the lines: in turn a worker of each node, every seventh time the actor that runs Ray Data; at half of them the
driver, which is started again with the same command, and with `--machine` also all processes of the last node, which returns
after 20 seconds, or is gone. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster.nodes import Node, NodesInNamespaces, Shape, cluster_of_nodes

_WORKER, _PIPELINE = "LineWorker", "AnswerPipeline"
_AWAY_S = 20.0
_LOOK_S = 0.2
Answers = dict[str, object]


@dataclass
class Attack:
    """What was killed, and when the output had how many lines."""

    cluster: NodesInNamespaces
    command: list[str]
    target: Path
    log: Path
    workers: list[int] = field(default_factory=list)
    pipelines: list[int] = field(default_factory=list)
    drivers: list[int] = field(default_factory=list)
    machines: list[int] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """All of them."""
        return len(self.workers) + len(self.pipelines) + len(self.drivers) + len(self.machines)

    def start(self) -> subprocess.Popen[bytes]:
        """The driver, on the head."""
        with self.log.open("ab") as log:
            return self.cluster.open(self.command, stdout=log, stderr=log)

    def kill_a_process(self, node: Node, name: str) -> bool:
        """Kill a process on the node, or on another, by the name of its class; whether there was one."""
        others = [other for other in self.cluster.nodes if other is not node]
        found = [process for place in (node, *others) for process in place.workers() if name in _command(process)]
        for process in found[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                (self.workers if name == _WORKER else self.pipelines).append(lines_in(self.target))
        return bool(found)

    def kill_the_machine(self, *, returns: bool) -> None:
        """All of the last node; it may return later."""
        node = self.cluster.nodes[-1]
        node.kill()
        self.machines.append(lines_in(self.target))
        if returns:
            time.sleep(_AWAY_S)
            node.start()


def lines_in(path: Path) -> int:
    """Whole lines."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(attack: Attack, lines: int, kills: int, machine: str | None) -> None:
    """Start the batch, and kill until it ends. Raises RuntimeError if it fails."""
    driver = attack.start()
    share, turns = lines / (kills + 2), 0
    while driver.poll() is None:
        time.sleep(_LOOK_S)
        if turns >= kills or lines_in(attack.target) < share * (turns + 1):
            continue
        if turns == kills // 2 and not attack.drivers:
            driver.kill()
            driver.wait()
            attack.drivers.append(lines_in(attack.target))
            driver = attack.start()
        elif turns > kills // 2 and machine and not attack.machines:
            attack.kill_the_machine(returns=machine == "returns")
        else:
            node = attack.cluster.nodes[turns % len(attack.cluster.nodes)]
            turns += attack.kill_a_process(node, _PIPELINE if turns % 7 == 6 else _WORKER)
    if driver.returncode:
        raise RuntimeError(f"the batch ended with {driver.returncode}: {attack.log.read_text()[-2000:]}")


def answers_in(path: Path) -> Answers:
    """The answers by id, without what differs from run to run. Raises RuntimeError for a line that is answered twice."""
    found: Answers = {}
    for text in path.read_text().splitlines():
        row = json.loads(text)
        body = {name: value for name, value in row["response"]["body"].items() if name not in ("id", "created")}
        if row["id"] in found:
            raise RuntimeError(f"{row['id']} is answered twice")
        found[row["id"]] = (row["custom_id"], row["response"]["status_code"], body, row["error"])
    return found


def write_lines(path: Path, count: int, tokens: int) -> None:
    """Prompts of which one is broken."""
    words = ("sea", "mountain", "river", "city", "forest", "island", "desert")
    prompts = [f"The {words[number % 7]} number {number} is" for number in range(count - 1)]
    asked = [{"custom_id": f"c{n}", "prompt": text, "max_tokens": tokens - n % 5} for n, text in enumerate(prompts)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in asked) + "{broken\n")


def _command(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def main() -> int:
    """Run both, compare, and print figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kills", type=int, default=20, help="of workers, the actor of Ray Data included")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--machine", choices=["returns", "gone"], help="kill a whole machine, too")
    parser.add_argument("--max-memory", default="400MB", help="of each worker")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, local, target = (folder / f"{part}.jsonl" for part in ("in", "local", "out"))
        write_lines(source, given.lines, given.tokens)
        batch = [sys.executable, "-m", "rabbit_engine", "batch", given.model, str(source)]
        options = ["--device", "cpu", "--max-memory", given.max_memory, "--prefix-store", "off", "--max-requests", "4"]
        began = time.monotonic()
        subprocess.run([*batch, str(local), *options], check=True, capture_output=True)
        local_s, began = time.monotonic() - began, time.monotonic()
        with cluster_of_nodes(Shape(nodes=given.nodes)) as cluster:
            attack = Attack(cluster, [*batch, str(target), *options, "--cluster", "auto"], target, folder / "log")
            run(attack, given.lines, given.kills, given.machine)
            print(attack.log.read_text())
        cluster_s, expected, found = time.monotonic() - began, answers_in(local), answers_in(target)
    equal = found == expected
    at = {"workers": attack.workers, "pipelines": attack.pipelines, "drivers": attack.drivers, "machines": attack.machines}
    print(json.dumps({"lines": given.lines, "equal": equal, "local_s": local_s, "cluster_s": cluster_s, "killed_at_line": at}))
    return 0 if equal and len(found) == given.lines else 1


if __name__ == "__main__":
    sys.exit(main())
