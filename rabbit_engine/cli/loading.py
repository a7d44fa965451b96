"""Loading a model for a command: what is done, and what to expect of it, is said before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rabbit_engine.cli import engine, options, output


@contextmanager
def loaded(
    model: str, *, max_memory: str | None, attn: str = "auto", saving_path: Path | None = None, **keywords: Any
) -> Iterator[engine.model.StreamedModel]:
    """The streamed model, closed at the end; `keywords` are those of `AutoModel.from_pretrained`."""
    output.note(f"loading {model} ...")
    with engine.model.AutoModel.from_pretrained(
        model,
        max_memory=options.parse_memory(max_memory),
        attn_implementation=attn,
        layer_shards_saving_path=saving_path,
        **keywords,
    ) as streamed:
        output.note(streamed.plan.reason)
        yield streamed
