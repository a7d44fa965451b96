"""The commands in one place, and what becomes of errors: one line on stderr and an exit code."""

from __future__ import annotations

import logging
import math
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from rabbit_engine import __version__
from rabbit_engine.cli.bench import bench
from rabbit_engine.cli.chat import chat
from rabbit_engine.cli.demo import demo
from rabbit_engine.cli.doctor import doctor
from rabbit_engine.cli.models import models
from rabbit_engine.cli.plan import plan
from rabbit_engine.cli.run import run
from rabbit_engine.cli.serve import serve
from rabbit_engine.cli.split import split
from rabbit_engine.cli.verify import verify
from rabbit_engine.errors import BudgetError, RabbitError

app = typer.Typer(
    name="rabbit",
    help="Run Hugging Face models that do not fit your memory, one decoder layer at a time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, chat, plan, doctor, models, bench, serve, demo, split, verify):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Say what is decided and why."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),  # noqa: ARG001
) -> None:
    """Run Hugging Face models that do not fit your memory, one decoder layer at a time."""
    from transformers.utils import logging as transformers_logging

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("rabbit_engine").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        transformers_logging.set_verbosity_error()


def main() -> None:
    """Entry point: exit code 1 for an error of ours, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        app()
    except RabbitError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error[/]:", escape(_on_the_command_line(error)), highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _on_the_command_line(error: RabbitError) -> str:
    """The error's text, with the option beside the keyword of Python."""
    if isinstance(error, BudgetError) and error.smallest_bytes:
        return f"{error} (here: --max-memory {math.ceil(error.smallest_bytes / 1e6)}MB)"
    return str(error)
