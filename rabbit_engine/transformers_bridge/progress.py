"""Switches transformers' own progress bars off temporarily."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import logging, modeling_gguf_pytorch_utils


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Show no bars of transformers within the block; that of its older GGUF reader ignores the switch, so it is replaced."""
    gguf_reader: Any = modeling_gguf_pytorch_utils
    enabled, gguf_bar = logging.is_progress_bar_enabled(), getattr(gguf_reader, "tqdm", tqdm)
    logging.disable_progress_bar()
    gguf_reader.tqdm = functools.partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        if enabled:
            logging.enable_progress_bar()
