"""`rabbit split MODEL`: make the shards now instead of at the first run."""

from __future__ import annotations

from typing import Annotated

import typer

from rabbit_engine.cli import engine, options, output
from rabbit_engine.utils.sizes import format_bytes


def split(
    model: options.Model,
    saving_path: options.SavingPath = None,
    dtype: options.Dtype = None,
    delete_original: Annotated[bool, typer.Option(help="Delete each original once its shards are verified.")] = False,
    gguf_file: options.GgufFile = None,
    revision: options.Revision = None,
    token: options.Token = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Split MODEL into one shard a layer; resumes an interrupted split, and rebuilds damaged shards."""
    output.note(f"reading the headers of {model} ...")
    config = engine.config
    prepared = engine.checkpoints.prepare(
        model,
        config.SourceConfig(token=token, revision=revision, trust_remote_code=trust_remote_code, gguf_file=gguf_file),
        config.SplitConfig(
            mode="always", dtype=config.parse_dtype(dtype), saving_path=saving_path, delete_original=delete_original
        ),
        repair=True,
    )
    assert prepared.manifest is not None  # noqa: S101 - a split was asked for
    total = sum(record.file_bytes for record in prepared.manifest.shards)
    print(f"{len(prepared.manifest.shards)} shards, {format_bytes(total)}, {prepared.manifest.dtype}, in {prepared.folder}")
