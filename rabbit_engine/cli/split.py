"""`rabbit split MODEL`: make the shards now instead of at the first run."""

from __future__ import annotations

from typing import Annotated

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.cli.groups import Only, takes_groups
from rabbit_engine.cli.loading import Loading
from rabbit_engine.utils.sizes import format_bytes

_OPTIONS = Only("compression", "saving_path", "onto", "dtype", "gguf_file", "revision", "token", "trust_remote_code")


@takes_groups
def split(
    model: options.Model,
    delete_original: Annotated[bool, typer.Option(help="Delete each original once its shards are verified.")] = False,
    *,
    loading: Annotated[Loading, _OPTIONS],
) -> None:
    """Split MODEL into one shard a layer; resumes an interrupted split, and rebuilds damaged shards."""
    output.note(f"reading the headers of {model} ...")
    settings = engine.model.read_settings({**loading.keywords(), "split": "always", "delete_original": delete_original})
    prepared = engine.checkpoints.prepare(model, settings.source, settings.split, repair=True)
    assert prepared.manifest is not None  # noqa: S101 - a split was requested
    total = sum(path.stat().st_size for path in prepared.paths)
    kind = f"{prepared.manifest.dtype}{f' in {loading.compression}' if loading.compression else ''}"
    folders = " and ".join(map(str, prepared.request.folders))
    print(f"{len(prepared.manifest.shards)} shards, {format_bytes(total)}, {kind}, in {folders}")
