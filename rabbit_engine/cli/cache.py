"""`rabbit cache list` and `rabbit cache clear [MODEL]`: the stored prefixes of texts."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rabbit_engine.cli import engine
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.sizes import format_bytes

_ID_CHARACTERS = 8

cache = typer.Typer(name="cache", help="List or delete stored prefixes: what was computed for the beginnings of texts.")
Folder = Annotated[Path | None, typer.Option(file_okay=False, help="The folder of the store, if it is not the default one.")]


@cache.command("list")
def list_models(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the models that have stored prefixes, with tokens, bytes and last use."""
    path = _find(folder)
    with engine.prefixes.PrefixStore(path, max_bytes=0) as store:
        models = store.models()
    if as_json:
        print(json.dumps([asdict(model) for model in models], indent=1))
    elif models:
        print(f"{format_bytes(sum(model.nbytes for model in models))} in {path}")
        Console(highlight=False).print(_table(models))
    else:
        print(f"no prefixes are stored in {path}")


@cache.command()
def clear(
    model: Annotated[str | None, typer.Argument(help="A name or an id from the list; all models without it.")] = None,
    folder: Folder = None,
) -> None:
    """Delete stored prefixes, of MODEL or of all models: nothing of their texts stays on disk."""
    path = _find(folder)
    with engine.prefixes.PrefixStore(path, max_bytes=0) as store:
        deleted = store.clear(model)
    blocks, nbytes = sum(one.blocks for one in deleted), sum(one.nbytes for one in deleted)
    print(f"deleted {blocks} blocks, {format_bytes(nbytes)}, in {path}")


def _find(folder: Path | None) -> Path:
    found = engine.prefixes.default_folder() if folder is None else folder.expanduser().absolute()
    if found is None:
        raise ConfigurationError(
            "RABBIT_ENGINE_PREFIXES or RABBIT_ENGINE_CACHE is empty, so no prefixes are stored: give --folder"
        )
    return found


def _table(models: list[engine.prefixes.StoredModel]) -> Table:
    table = Table()
    for name in ("model", "id", "tokens", "size", "last used"):
        table.add_column(name, overflow="fold", justify="right" if name in ("tokens", "size") else "left")
    for model in models:
        used = datetime.fromtimestamp(model.last_used).astimezone().strftime("%Y-%m-%d %H:%M")
        row = (model.model, model.space[:_ID_CHARACTERS], f"{model.tokens:,}", format_bytes(model.nbytes), used)
        table.add_row(*row)
    return table
