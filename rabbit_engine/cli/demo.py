"""`rabbit demo`: a real model answers one question; then the statistics are printed."""

from __future__ import annotations

import sys
from typing import Annotated

from rich.console import Console

from rabbit_engine.cli import engine, output
from rabbit_engine.cli.groups import Only, takes_groups
from rabbit_engine.cli.loading import Loading
from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.report import as_table
from rabbit_engine.utils.sizes import format_bytes, format_rate


@takes_groups
def demo(loading: Annotated[Loading, Only("device", "max_memory")]) -> None:
    """Ask SmolLM2-135M-Instruct for the capital of France, streamed layer by layer, and show the statistics."""
    output.note("loading a small model ...")
    answer = engine.demo.ask(_print_now, on_loaded=_say_plan, device=loading.device, max_memory=loading.budget)
    title = f"{engine.demo.MODEL} from {answer.source}"
    Console(stderr=True, highlight=False).print(as_table(_rows(answer), title))


def _say_plan(plan: Plan) -> None:
    output.note(plan.reason)
    output.note(f"> {engine.demo.QUESTION}")


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _rows(answer: engine.demo.DemoResult) -> list[tuple[str, str]]:
    plan, profile = answer.plan, answer.profile
    held = f"{format_bytes(plan.device_bytes)} on {plan.device}: a ring of {format_bytes(plan.ring_bytes)} and "
    return [
        ("weights of the model", format_bytes(plan.weights_bytes)),
        ("most weights held at once", f"{held}{format_bytes(plan.resident_bytes)} that stay"),
        ("streamed", f"{profile.loads} units in {profile.passes} passes"),
        ("bytes read", f"{format_bytes(profile.bytes_read)} at {format_rate(profile.bytes_read, profile.read_s)}"),
        ("waited for the disk", f"{profile.wait_s:.2f} s of {answer.seconds:.2f} s"),
        ("seconds a token", f"{answer.seconds / answer.tokens:.3f} ({answer.tokens} tokens)"),
    ]
