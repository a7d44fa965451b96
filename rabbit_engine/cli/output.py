"""What the commands say beside their results: plain lines on stderr, in whatever encoding the terminal has."""

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
"""What libraries tell programmers about their next version."""

_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a write may fail with. The library's own writes and reads have errors of their own: these are stdout's."""


def take_any_characters() -> None:
    """What a stream's encoding cannot hold is written, and read, as a backslash and its number: no text is lost."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prepare(*, verbose: bool) -> None:
    """Send logs and warnings to stderr, a line each; `verbose` shows what is decided and why, and what other libraries say."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rabbit_engine").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("rabbit_engine.checkpoints.prepare").setLevel(logging.INFO)  # what takes long is told before it begins
    for category in () if verbose else _NOT_FOR_USERS:
        warnings.simplefilter("ignore", category)
    warnings.showwarning = _show_warning


class _Line(logging.Formatter):
    """`warning: what happened`; the level is left out where nothing is wrong."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return level + as_options(super().format(record))


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """No file and no line of code, which say nothing to those who type commands."""
    name = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    note(f"warning: {name}{as_options(' '.join(str(message).split()))}")


def finish() -> None:
    """Write what is left for stdout. Exits with 1 where that fails, and says so unless nobody reads it any more."""
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
    """Python tries again to write what is left as it ends."""
    with suppress(OSError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def say_error(text: str) -> None:
    """What went wrong, in one line on stderr."""
    note(f"{typer.style('error', fg='red', bold=True)}: {as_options(text)}")


def say_unexpected(error: Exception) -> None:
    """An error that nobody foresaw: one line, and where it came from if asked for. One of stdout is foreseen."""
    if isinstance(error, OSError) and error.errno in _UNWRITTEN and error.filename is None:
        _drop_output()
        say_error(f"the output could not be written: {error.strerror}")
        return
    if logging.getLogger("rabbit_engine").isEnabledFor(logging.INFO):
        traceback.print_exception(error)
    say_error(f"{type(error).__name__}: {first_line(error)} (rabbit -v ... shows where)")
