"""Kills workers of a model in stages amid its answers and a long chat, and compares each answer with that of an unharmed run.

    python scripts/check_cluster_kills.py MODEL --kills 20 --nodes 3 --memory 200MB [--turns 12] [--rate 1gbit]

Machines are Ray nodes in network namespaces of this one (Linux, root). Rounds of texts (one at a time, beams, and a session of
several by turns: the tokens of transformers) and a chat of many turns (`continue_last`: the tokens of the same chat before the
first kill) follow one another until so many workers were killed. Each turn must give one reply, whose tokens arrived once each
and in order. The last line is JSON; ends with 1 if an answer differs, is lost or doubled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

_TOKENS = 24
_QUESTIONS = (
    "Name an animal that lives in the sea.",
    "How large does it grow?",
    "What does it eat?",
    "Name another one, which is smaller.",
    "Which of the two lives longer?",
    "Where would I see it?",
    "Write a sentence about its colour.",
    "Say the same in other words.",
    "Is it dangerous?",
    "What would a child ask about it?",
    "Answer that question.",
    "Say goodbye in one sentence.",
)


@dataclass
class Found:
    """What one run gave, and how many of its answers did not come exactly once."""

    answers: list[Any] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0


@dataclass
class Kills:
    """Kills the workers of `stages` at random moments, half of them amid texts and half amid chats."""

    stages: Any
    most: int
    phase: str = ""
    killed: list[int] = field(default_factory=list)
    amid: Counter[str] = field(default_factory=Counter)
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Kill until all were killed, or `done` is set."""
        choose = random.Random(1)
        while len(self.killed) < self.most and not self.done.wait(choose.uniform(2, 10)):
            stage = choose.choice(self.stages)
            process = stage.process
            phase = self.phase
            kind = phase.partition(" ")[0]
            if process in self.killed or self.amid[kind] >= -(-self.most // 2):
                continue
            subprocess.run(["kill", "-9", str(process)], check=False)
            self.killed.append(process)
            self.amid[kind] += 1
            print(f"killed {len(self.killed)}: {process} on {stage.name}, amid {phase}", flush=True)


def main() -> None:
    """Start the nodes, and this script inside of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--turns", type=int, default=len(_QUESTIONS), help="of the chat")
    parser.add_argument("--memory", default="200MB", help="for the model on each machine")
    parser.add_argument("--rate", default="1gbit", help="of each node's cable, each way, as tc writes it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        raise SystemExit(check(given))
    from cluster.network import Link
    from cluster.nodes import Shape, cluster_of_nodes

    with cluster_of_nodes(Shape(nodes=given.nodes, cpus=2, link=Link(rate=given.rate))) as nodes:
        raise SystemExit(nodes.run([sys.executable, *sys.argv, "--inside"]).returncode)


def check(given: argparse.Namespace) -> int:
    """Texts and chats by turns until so many workers were killed. 1 if an answer is not what it was without kills."""
    from transformers import AutoModelForCausalLM

    from rabbit_engine import AutoModel
    from rabbit_engine.model.runtime import runtime_of

    keywords: dict[str, Any] = {"device": "cpu", "max_memory": {"cpu": given.memory}, "cluster": os.environ["RAY_ADDRESS"]}
    with AutoModel.from_pretrained(given.model, **keywords) as model:
        stages = runtime_of(model).assembly.stages
        expected_texts = texts_of(AutoModelForCausalLM.from_pretrained(given.model, dtype=model.dtype).eval())
        began = time.monotonic()
        expected_chat = chat_of(model, given.turns)
        chat_s = time.monotonic() - began
        kills = Kills(stages, given.kills)
        thread = threading.Thread(target=kills.run, daemon=True)
        thread.start()
        began, rounds, differing, lost, doubled = time.monotonic(), 0, 0, 0, 0
        while rounds < 1 or thread.is_alive():
            for expected, found in (
                (expected_texts, texts_of(model, kills)),
                (expected_chat, chat_of(model, given.turns, kills)),
            ):
                differing += sum(mine != theirs for mine, theirs in zip(found.answers, expected.answers, strict=True))
                lost, doubled = lost + found.lost, doubled + found.doubled
            rounds += 1
            print(f"round {rounds}: {differing} answers differ so far, {lost} lost, {doubled} doubled", flush=True)
        kills.done.set()
        figures = {
            "nodes": given.nodes,
            "stages": len(stages),
            "killed": len(kills.killed),
            "killed_amid": dict(kills.amid),
            "texts": rounds * len(expected_texts.answers),
            "turns": rounds * given.turns,
            "differing": differing,
            "lost": lost,
            "doubled": doubled,
            "chat_s_unharmed": round(chat_s, 1),
            "seconds": round(time.monotonic() - began, 1),
        }
    print(json.dumps(figures))
    return int(differing + lost + doubled > 0)


def texts_of(model: Any, kills: Kills | None = None) -> Found:
    """One text, beams, and four texts of a session; with transformers' own model one after another."""
    import torch

    from rabbit_engine import Session

    if kills is not None:
        kills.phase = "texts"
    keywords: dict[str, Any] = {"max_new_tokens": _TOKENS, "min_new_tokens": _TOKENS, "do_sample": False}
    ids = torch.arange(100, 120)[None]
    found = Found([model.generate(ids, **keywords).tolist(), model.generate(ids, num_beams=2, **keywords).tolist()])
    prompts = [[100 + text, *range(101, 110)] for text in range(4)]
    if hasattr(model, "plan"):
        with Session(model) as session:
            answers = session.generate(prompts, max_new_tokens=_TOKENS, min_new_tokens=_TOKENS)
            found.answers += [list(answer.tokens) for answer in answers]
    else:
        found.answers += [model.generate(torch.tensor([one]), **keywords)[0, len(one) :].tolist() for one in prompts]
    return found


def chat_of(model: Any, turns: int, kills: Kills | None = None) -> Found:
    """A conversation in which each turn continues the cache of the last."""
    from rabbit_engine import Session

    found, messages = Found(), []
    with Session(model, continue_last=True) as session:
        for turn in range(turns):
            messages.append({"role": "user", "content": _QUESTIONS[turn % len(_QUESTIONS)]})
            reply = _ask(session, messages, f"chat turn {turn + 1}", kills, found)
            found.answers.append(list(reply.tokens))
            messages.append({"role": "assistant", "content": reply.text})
    return found


def _ask(session: Any, messages: list[dict[str, str]], phase: str, kills: Kills | None, found: Found) -> Any:
    """The reply of a turn. Counts tokens that came in pieces but not in the reply, the other way round, and second replies."""
    from rabbit_engine.sessions import Reply

    if kills is not None:
        kills.phase = phase
    inbox: SimpleQueue[Any] = SimpleQueue()
    session.ask([session.request(messages, max_new_tokens=_TOKENS, temperature=0.0)], lambda _, event: inbox.put(event))
    tokens: list[int] = []
    while not isinstance(event := inbox.get(), Reply):
        if isinstance(event, BaseException):
            raise event
        tokens += [] if event.token is None else [event.token]
        if kills is not None:
            kills.phase = f"{phase}, token {len(tokens)}"
    found.lost += max(0, len(event.tokens) - len(tokens))
    found.doubled += max(0, len(tokens) - len(event.tokens)) + inbox.qsize()
    if list(event.tokens) != tokens and len(event.tokens) == len(tokens):
        raise RuntimeError(f"{phase}: the pieces had the tokens {tokens}, the reply {list(event.tokens)}")
    return event


if __name__ == "__main__":
    main()
