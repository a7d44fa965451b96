"""`rabbit verify DIR_OR_MODEL`: read every shard from end to end and compare checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rabbit_engine.config import SourceConfig
from rabbit_engine.errors import DamagedShardError
from rabbit_engine.hub import find_repo
from rabbit_engine.prepare import SHARDS_FOLDER
from rabbit_engine.shards import find_splits, read_manifest, verify_shard


def verify(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A folder with shards at or below it, or a model.")],
) -> None:
    """Check every shard's size, header and data against its manifest; exit code 1 when one differs."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    failed = False
    for folder in find_splits(_root(target)):
        manifest = read_manifest(folder)
        assert manifest is not None  # noqa: S101 - find_splits lists folders that hold one
        damaged = 0
        for record in manifest.shards:
            try:
                verify_shard(folder, record)
            except DamagedShardError as error:
                damaged += 1
                console.print(f"damaged: {error}", markup=False)
        failed = failed or damaged > 0
        print(f"{folder}: {len(manifest.shards) - damaged} of {len(manifest.shards)} shards are whole")
    if failed:
        raise typer.Exit(1)


def _root(target: str) -> Path:
    path = Path(target).expanduser()
    if path.is_dir():
        return path
    return find_repo(target, SourceConfig(local_files_only=True)).folder.parent.parent / SHARDS_FOLDER
