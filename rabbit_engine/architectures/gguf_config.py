"""The config of a GGUF file: made of its header by transformers once, then kept in the user's cache folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rabbit_engine.storage.cached import recall, remember
from rabbit_engine.storage.jsonvalues import sealed, unsealed
from rabbit_engine.transformers_bridge.gguf import read_gguf_config

_KIND = "gguf_configs"


@dataclass(frozen=True, slots=True)
class GgufConfigFile:
    """The GGUF file at `path`, whose header has this checksum."""

    path: Path
    header_checksum: str

    def read(self) -> dict[str, Any]:
        """The config's attributes. Raises ImportError without the package gguf, and whatever transformers raises."""
        versions = [metadata.version(package) for package in ("transformers", "gguf")]
        key = "-".join((self.header_checksum, *versions))
        kept = unsealed(recall(_KIND, key))
        if isinstance(kept, dict):
            return kept
        found: dict[str, Any] = json.loads(json.dumps(read_gguf_config(self.path)))
        remember(_KIND, key, sealed(found))
        return found

    @contextmanager
    def as_folder(self) -> Iterator[Path]:
        """A temporary folder with these attributes as config.json. Raises as `read`."""
        attributes = self.read()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(attributes), encoding="utf-8")
            yield Path(folder)
