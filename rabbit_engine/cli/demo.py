"""`rabbit demo`: a real model answers one question, then what happened is printed."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rabbit_engine import demo as demo_model
from rabbit_engine.cli.run import parse_memory
from rabbit_engine.units import format_bytes, format_rate


def demo(
    device: Annotated[str | None, typer.Option(help="cuda:0, mps or cpu; the default is the best there is.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="What weights may take: 100MB, or 0=100MB,cpu=1GiB.")] = None,
) -> None:
    """Ask SmolLM2-135M-Instruct for the capital of France, streamed layer by layer, and say what that took."""
    console = Console(stderr=True, highlight=False)
    console.print(f"> {demo_model.QUESTION}")
    answer = demo_model.ask(_print_now, device=device, max_memory=parse_memory(max_memory))
    console.print(_table(answer))


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _table(answer: demo_model.Answer) -> Table:
    plan, profile = answer.plan, answer.profile
    table = Table(title=f"{demo_model.MODEL} from {answer.source}", title_justify="left", show_header=False)
    rows = {
        "weights of the model": format_bytes(plan.weights_bytes),
        "weights held at once, at most": f"{format_bytes(plan.device_bytes)} on {plan.device}: a ring of "
        f"{format_bytes(plan.ring_bytes)} and {format_bytes(plan.resident_bytes)} that stay",
        "streamed": f"{profile.loads} units in {profile.passes} passes",
        "bytes read": f"{format_bytes(profile.bytes_read)} at {format_rate(profile.bytes_read, profile.read_s)}",
        "waited for the disk": f"{profile.wait_s:.2f} s of {answer.seconds:.2f} s",
        "seconds a token": f"{answer.seconds / answer.tokens:.3f} ({answer.tokens} tokens)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
