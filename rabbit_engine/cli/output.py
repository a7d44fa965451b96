"""Everything the commands print except their results: plain lines on stderr, in the terminal's encoding."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress

import typer

from rabbit_engine.cli.wording import as_options
from rabbit_engine.errors import first_line

_NOT_FOR_USERS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
"""Warnings for programmers about future library versions."""

_ALWAYS_SHOWN = ("rabbit_engine.checkpoints.preparation", "rabbit_engine.decoding.speculation")
"""Loggers of long work, announced before it begins, and of why a text is decoded without the speculation that was asked for."""

_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of writing to stdout; the library's own reads and writes raise RabbitErrors."""


def take_any_characters() -> None:
    """Write and read characters that a stream's encoding lacks as backslash escapes, so that no text is lost."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prepare(*, verbose: bool) -> None:
    """Send logs and warnings to stderr, one line each; `verbose` adds decisions and the messages of other libraries."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rabbit_engine").setLevel(logging.INFO if verbose else logging.WARNING)
    for name in _ALWAYS_SHOWN:
        logging.getLogger(name).setLevel(logging.INFO)
    for category in () if verbose else _NOT_FOR_USERS:
        warnings.simplefilter("ignore", category)
    warnings.showwarning = _show_warning


class _Line(logging.Formatter):
    """`warning: what happened`; levels below warning are not shown."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + as_options(super().format(record))


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Without file and line number, which mean nothing to users of commands."""
    name = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    note(f"warning: {name}{as_options(' '.join(str(message).split()))}")


def finish() -> None:
    """Flush stdout. If that fails, exit with 1, and report it unless the pipe is closed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            _drop_output()
        else:
            say_unexpected(error)
        sys.exit(1)


def _drop_output() -> None:
    """Discard what is left, as Python would try again to flush it at exit."""
    with suppress(OSError):  # a stream without a file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print a line on stderr."""
    typer.echo(text, err=True)


def say_error(text: str) -> None:
    """Print an error as one line on stderr."""
    note(f"{typer.style('error', fg='red', bold=True)}: {as_options(text)}")


def say_unexpected(error: Exception) -> None:
    """An unexpected error: one line, and the traceback with -v. Failed writes to stdout get a message of their own."""
    if isinstance(error, OSError) and error.errno in _UNWRITTEN and error.filename is None:
        _drop_output()
        say_error(f"the output could not be written: {error.strerror}")
        return
    if logging.getLogger("rabbit_engine").isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    say_error(f"{type(error).__name__}: {first_line(error)} (rabbit -v ... shows where)")
