"""`rabbit split MODEL`: make the shards now instead of at the first run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rabbit_engine.config import SourceConfig, SplitConfig, parse_dtype
from rabbit_engine.prepare import prepare
from rabbit_engine.units import format_bytes


def split(
    model: Annotated[str, typer.Argument(help="A repo id, a folder, or a .gguf file.")],
    saving_path: Annotated[Path | None, typer.Option(help="Where the shards go; the default is beside the checkpoint.")] = None,
    dtype: Annotated[str | None, typer.Option(help="The default is the checkpoint's own.")] = None,
    delete_original: Annotated[bool, typer.Option(help="Delete each original once its shards are verified.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="Which GGUF file of the folder or repo.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    token: Annotated[str | None, typer.Option(help="For gated repos; HF_TOKEN is read too.", show_default=False)] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that the repository brings.")] = False,
) -> None:
    """Split MODEL into one shard a layer; goes on where an interrupted split stopped, and makes damaged shards anew."""
    prepared = prepare(
        model,
        SourceConfig(token=token, revision=revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file),
        SplitConfig(mode="always", dtype=parse_dtype(dtype), saving_path=saving_path, delete_original=delete_original),
        repair=True,
    )
    assert prepared.manifest is not None  # noqa: S101 - a split was asked for
    total = sum(record.file_bytes for record in prepared.manifest.shards)
    print(f"{len(prepared.manifest.shards)} shards, {format_bytes(total)}, {prepared.manifest.dtype}, in {prepared.folder}")
