"""Kills workers of a model in stages amid its answers, and compares each answer with that of transformers.

    python scripts/check_cluster_kills.py MODEL --kills 20 --nodes 3 --memory 200MB

Machines are Ray nodes in network namespaces of this one (Linux, root). Answers are of one text at a time, beams, and a session of
several texts by turns. Ends with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    """Start the nodes, and this script inside of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--memory", default="200MB", help="for the model on each machine")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        raise SystemExit(check(given.model, given.memory, given.kills))
    from cluster.nodes import Shape, cluster_of_nodes

    with cluster_of_nodes(Shape(nodes=given.nodes, cpus=2)) as nodes:
        command = [sys.executable, __file__, given.model, "--inside", "--kills", str(given.kills), "--memory", given.memory]
        raise SystemExit(nodes.run(command).returncode)


def check(name: str, memory: str, kills: int) -> int:
    """Answers until so many workers were killed. The number of those that differ, at most 1."""
    import torch
    from transformers import AutoModelForCausalLM

    from rabbit_engine import AutoModel, Session
    from rabbit_engine.model.runtime import runtime_of

    def texts_of(model: Any) -> list[Any]:
        keywords: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        ids = torch.arange(100, 120)[None]
        found = [model.generate(ids, **keywords).tolist(), model.generate(ids, num_beams=2, **keywords).tolist()]
        prompts = [[100 + text, *range(101, 110)] for text in range(4)]
        if hasattr(model, "plan"):
            with Session(model) as session:
                answers = session.generate(prompts, max_new_tokens=24, min_new_tokens=24)
                return [*found, *(list(answer.tokens) for answer in answers)]
        return [*found, *(model.generate(torch.tensor([one]), **keywords)[0, len(one) :].tolist() for one in prompts)]

    with AutoModel.from_pretrained(name, device="cpu", max_memory={"cpu": memory}, cluster=os.environ["RAY_ADDRESS"]) as model:
        expected = texts_of(AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype).eval())
        stages = runtime_of(model).assembly.stages
        killed: list[int] = []
        done = threading.Event()

        def kill() -> None:
            choose = random.Random(1)
            while not done.is_set() and len(killed) < kills:
                time.sleep(choose.uniform(2, 10))
                process = choose.choice(stages).process  # type: ignore[attr-defined]
                if process not in killed:
                    subprocess.run(["kill", "-9", str(process)], check=False)
                    killed.append(process)
                    print(f"killed {len(killed)}: {process}", flush=True)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        rounds = differing = 0
        while rounds < 1 or thread.is_alive():
            found = texts_of(model)
            differing += sum(mine != theirs for mine, theirs in zip(found, expected, strict=True))
            rounds += 1
            print(f"round {rounds}: {len(expected)} answers, {differing} differ so far", flush=True)
        done.set()
    print(f"{len(killed)} workers killed amid {rounds * len(expected)} answers: {differing} differ")
    return int(differing > 0)


if __name__ == "__main__":
    main()
