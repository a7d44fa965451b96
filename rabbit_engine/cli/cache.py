"""`rabbit cache list` and `rabbit cache clear [MODEL]`: stored prefixes of texts, and copies of models that a cluster fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from rabbit_engine.cli import engine, output
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.utils.sizes import format_bytes

if TYPE_CHECKING:
    from rabbit_engine.cluster.stored import StoredCopy

_ID_CHARACTERS = 8

cache = typer.Typer(
    name="cache",
    help="List or delete stored prefixes (what was computed for the beginnings of texts), and copies of models that a machine "
    "of a cluster has fetched.",
)
Folder = Annotated[
    Path | None, typer.Option(file_okay=False, help="The folder of a store of prefixes, if it is not the default one.")
]


@cache.command("list")
def list_models(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the models that have stored prefixes, with tokens, bytes and last use, and the copies of models."""
    copies = _copies(folder)
    path = _find(folder, required=not copies)
    models = [] if path is None else _models(path)
    if as_json:
        rows = [{**asdict(copy), "folder": str(copy.folder)} for copy in copies]
        print(json.dumps({"prefixes": [asdict(model) for model in models], "copies": rows}, indent=1))
        return
    if models:
        print(f"{format_bytes(sum(model.nbytes for model in models))} in {path}")
        Console(highlight=False).print(_table(models))
    elif path is not None:
        print(f"no prefixes are stored in {path}")
    if copies:
        print(f"copies of models: {format_bytes(sum(copy.nbytes for copy in copies))} in {copies[0].folder.parent}")
        Console(highlight=False).print(_table_of_copies(copies))


@cache.command()
def clear(
    model: Annotated[str | None, typer.Argument(help="A name or an id from the list; all models without it.")] = None,
    folder: Folder = None,
    only: Annotated[Literal["prefixes", "copies"] | None, typer.Option(help="Delete only these.", case_sensitive=False)] = None,
) -> None:
    """Delete stored prefixes, of MODEL or of all models: nothing of their texts stays on disk. Copies of models go too, unless
    a process uses them.
    """
    copies = [] if only == "prefixes" else _named(_copies(folder), model)
    if only != "copies":
        path = _find(folder, required=not copies)
        if path is not None:
            _clear_prefixes(path, model, required=not copies)
    elif model is not None and not copies:
        known = ", ".join(sorted({copy.name for copy in _copies(folder)})) or "none"
        raise ConfigurationError(f"{model} has no copy; those that have: {known}")
    for copy in copies:
        if engine.stored_copies.delete_copy(copy):
            print(f"deleted the copy of {copy.name}, {format_bytes(copy.nbytes)}, in {copy.folder}")
        else:
            output.note(f"the copy of {copy.name} in {copy.folder} is in use and stays")


def _clear_prefixes(path: Path, model: str | None, *, required: bool) -> None:
    """Unless `required`, a model that has none is no error."""
    with engine.prefixes.PrefixStore(path, max_bytes=0) as store:
        try:
            deleted = store.clear(model)
        except ConfigurationError:
            if required:
                raise
            return
    blocks, nbytes = sum(one.blocks for one in deleted), sum(one.nbytes for one in deleted)
    print(f"deleted {blocks} blocks, {format_bytes(nbytes)}, in {path}")


def _find(folder: Path | None, *, required: bool) -> Path | None:
    """The folder of the prefixes; None if there is none, which is an error if it is `required`."""
    found = engine.prefixes.default_folder() if folder is None else folder.expanduser().absolute()
    if found is None and required:
        raise ConfigurationError(
            "RABBIT_ENGINE_PREFIXES or RABBIT_ENGINE_CACHE is empty, so no prefixes are stored: give --folder"
        )
    return found


def _models(path: Path) -> list[engine.prefixes.StoredModel]:
    with engine.prefixes.PrefixStore(path, max_bytes=0) as store:
        return store.models()


def _copies(folder: Path | None) -> list[StoredCopy]:
    """The copies of this machine; none beside a store of prefixes in another folder."""
    found = engine.stored_copies.copies_folder()
    return [] if found is None or folder is not None else engine.stored_copies.stored_copies(found)


def _named(copies: Sequence[StoredCopy], model: str | None) -> list[StoredCopy]:
    """Those of a model, by its name or the beginning of an id."""
    return [
        copy
        for copy in copies
        if model is None or copy.name == model or (len(model) >= _ID_CHARACTERS and copy.folder.name.startswith(model))
    ]


def _table(models: list[engine.prefixes.StoredModel]) -> Table:
    table = _columns("model", "id", "tokens", "size", "last used")
    for model in models:
        row = (model.model, model.space[:_ID_CHARACTERS], f"{model.tokens:,}", format_bytes(model.nbytes), _time(model.last_used))
        table.add_row(*row)
    return table


def _table_of_copies(copies: Sequence[StoredCopy]) -> Table:
    table = _columns("model", "id", "fetched from", "size", "last used", "in use")
    for copy in copies:
        own = (copy.name, copy.folder.name[:_ID_CHARACTERS], copy.driver, format_bytes(copy.nbytes), _time(copy.last_used))
        table.add_row(*own, "yes" if copy.in_use else "no")
    return table


def _columns(*names: str) -> Table:
    table = Table()
    for name in names:
        table.add_column(name, overflow="fold", justify="right" if name in ("tokens", "size") else "left")
    return table


def _time(used: float) -> str:
    return datetime.fromtimestamp(used).astimezone().strftime("%Y-%m-%d %H:%M")
