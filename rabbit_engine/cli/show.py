"""`rabbit show MODEL`: what a checkpoint is and can do, before anything is downloaded."""

from __future__ import annotations

from typing import Annotated

from rich.console import Console

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import Only, takes_groups
from rabbit_engine.cli.loading import Loading
from rabbit_engine.utils.report import as_table

_OPTIONS = Only("dtype", "split", "compression", "saving_path", "onto", "gguf_file", "revision", "token", "trust_remote_code")


@takes_groups
def show(model: options.Model, *, loading: Annotated[Loading, _OPTIONS]) -> None:
    """Print what a model is: its task, class, length, attention, encodings, experts, and how it streams; reads headers only."""
    output.note(f"reading the headers of {model} ...")
    found = engine.capabilities.capabilities(model, **loading.keywords_of_headers())
    Console(highlight=False).print(as_table(found.rows(), model))
