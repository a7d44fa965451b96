"""Where the keys and values of long texts lie that memory does not hold, and what a plan says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

from rabbit_engine.planning.demand import Demand, cache_bytes, tier_bytes
from rabbit_engine.planning.probe import Probe
from rabbit_engine.storage.cached import cache_folder
from rabbit_engine.utils.sizes import format_bytes, format_seconds
from rabbit_engine.utils.speeds import Speeds

_KEPT_FREE = 0.1
"""The fraction of free disk that caches leave."""


def texts_folder() -> Path | None:
    """Where the files of caches are made, which have no names; None if the caller wants none."""
    folder = cache_folder()
    return None if folder is None else folder / "texts"


def disk_room() -> int:
    """Bytes of disk that caches may take."""
    folder = texts_folder()
    if folder is None:
        return 0
    there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), None)
    return 0 if there is None else int(shutil.disk_usage(there).free * (1 - _KEPT_FREE))


def note_on_texts(probe: Probe, text: Demand, speeds: Speeds) -> str:
    """What a token of `text` takes, where it lies, and what its end costs."""
    tokens = text.prompt + text.answer
    saved = text.tiered * (probe.growing_token_bytes - probe.int8_token_bytes) if text.encoded else 0
    token_bytes = probe.cache_token_bytes - saved
    total = cache_bytes(probe, Demand(text.prompt, text.answer, is_computed=True)) - saved * tokens
    grown = f"keys and values take {format_bytes(token_bytes)} a token, {format_bytes(total)} for {tokens:,} tokens"
    if text.held or not text.in_tiers:
        return f"{grown}, in memory"
    far = tier_bytes(probe, text)
    pieces = "; a layer is never whole in memory, and attention is exact up to rounding" if text.pieces else ""
    return (
        f"{grown}: of a text as long, {format_bytes(far)} lie on disk and are read for each token, in about "
        f"{format_seconds(far / speeds.disk)} beside the weights{pieces}"
    )
