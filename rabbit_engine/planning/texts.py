"""Where the keys and values of long texts lie that memory does not hold, and what a plan says of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rabbit_engine.planning.demand import Demand, cache_bytes, tier_bytes
from rabbit_engine.planning.probe import Probe
from rabbit_engine.storage.cached import VARIABLE, cache_folder
from rabbit_engine.utils.platform import IN_MEMORY, file_system_of
from rabbit_engine.utils.sizes import format_bytes, format_seconds
from rabbit_engine.utils.speeds import Speeds

_KEPT_FREE = 0.1
"""The fraction of free disk that caches leave."""


def texts_folder() -> Path | None:
    """Where the files of caches are made, which have no names; None if the caller wants none."""
    folder = cache_folder()
    return None if folder is None else folder / "texts"


def why_no_disk() -> str:
    """Why no text may lie on disk; empty if one may."""
    folder = texts_folder()
    if folder is None:
        return f"{VARIABLE} is empty"
    kind = file_system_of(folder) if sys.platform == "linux" else None
    return f"{folder} is memory ({kind})" if kind in IN_MEMORY else ""


def disk_room() -> int:
    """Bytes of disk that caches may take."""
    folder = texts_folder()
    if folder is None or why_no_disk():
        return 0
    there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), None)
    return 0 if there is None else int(shutil.disk_usage(there).free * (1 - _KEPT_FREE))


def note_on_texts(probe: Probe, text: Demand, speeds: Speeds, host_bytes: int = 0) -> str:
    """What a token of `text` takes, where it lies, and what its end costs; a device of its own has `host_bytes` of host memory
    beside it."""
    tokens = text.prompt + text.answer
    saved = text.tiered * (probe.growing_token_bytes - probe.int8_token_bytes) if text.encoded else 0
    token_bytes = probe.cache_token_bytes - saved
    total = cache_bytes(probe, Demand(text.prompt, text.answer, is_computed=True)) - saved * tokens
    grown = f"keys and values take {format_bytes(token_bytes)} a token, {format_bytes(total)} for {tokens:,} tokens"
    if text.held or not text.in_tiers:
        return f"{grown}, in memory"
    far = tier_bytes(probe, text)
    place, rate = ("in host memory", speeds.link or speeds.disk) if far <= host_bytes else ("on disk", speeds.disk)
    pieces = "; a layer is never whole in memory, and attention is exact up to rounding" if text.pieces else ""
    return (
        f"{grown}: of a text as long, {format_bytes(far)} lie {place} and are read for each token, in about "
        f"{format_seconds(far / rate)} beside the weights{pieces}"
    )
