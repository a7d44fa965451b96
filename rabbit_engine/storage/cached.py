"""What was learnt about a checkpoint and helps the next start: JSON files in `HF_HOME/rabbit_engine`, none of them needed.

`RABBIT_ENGINE_CACHE` names another folder; if it is empty, nothing is kept.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import constants

from rabbit_engine.errors import first_line
from rabbit_engine.storage.jsonvalues import parse
from rabbit_engine.storage.tensorfiles import written_whole

logger = logging.getLogger(__name__)

VARIABLE = "RABBIT_ENGINE_CACHE"
_MOST_BYTES = 64 * 2**20


def cache_folder() -> Path | None:
    """The folder for such files, which may not exist yet; None if the caller wants none."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    return Path(named or Path(constants.HF_HOME) / "rabbit_engine").expanduser().absolute()


def recall(kind: str, key: str) -> Any:
    """The value that `remember` kept; None if there is none, or its file cannot be read. Check it before use."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        logger.debug("%s is not used: %s", path, first_line(error))
        return None


def remember(kind: str, key: str, value: Any) -> None:
    """Keep a JSON value of a `kind` for a checkpoint, which `key` identifies. A folder that cannot be written is left alone."""
    path = _path(kind, key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(json.dumps(value).encode())
    except OSError as error:
        logger.debug("%s is not kept: %s", path, first_line(error))


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / kind / f"{xxhash.xxh3_128_hexdigest(key.encode())}.json"
