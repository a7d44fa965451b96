"""All commands, and how errors end them: one line on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from rabbit_engine import __version__
from rabbit_engine.cli import output
from rabbit_engine.cli.batch import batch
from rabbit_engine.cli.bench import bench
from rabbit_engine.cli.cache import cache
from rabbit_engine.cli.chat import chat
from rabbit_engine.cli.demo import demo
from rabbit_engine.cli.doctor import doctor
from rabbit_engine.cli.models import models
from rabbit_engine.cli.plan import plan
from rabbit_engine.cli.run import run
from rabbit_engine.cli.serve import serve
from rabbit_engine.cli.show import show
from rabbit_engine.cli.split import split
from rabbit_engine.cli.verify import verify
from rabbit_engine.errors import ConfigurationError, RabbitError

WRONG_USAGE, INTERRUPTED = 2, 130

app = typer.Typer(
    name="rabbit",
    help="Run Hugging Face models that do not fit your memory, one decoder layer at a time.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (run, chat, batch, show, plan, doctor, models, bench, serve, demo, split, verify):
    app.command()(command)
app.add_typer(cache)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show decisions with their reasons, and tracebacks of errors."),
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),  # noqa: ARG001
) -> None:
    """Run Hugging Face models that do not fit your memory, one decoder layer at a time."""
    output.prepare(verbose=verbose)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 1 for a failure, 2 for wrong usage, 130 for Ctrl-C."""
    output.take_any_characters()
    try:
        app(arguments, prog_name="rabbit")
    except SystemExit as done:
        if done.code == INTERRUPTED:
            output.note("interrupted")
        output.finish()
        raise
    except RabbitError as error:
        output.say_error(str(error))
        sys.exit(WRONG_USAGE if isinstance(error, ConfigurationError) else 1)
    except Exception as error:  # noqa: BLE001 - the last boundary: users get one line
        output.say_unexpected(error)
        sys.exit(1)
