"""Splits that deleted the files they were made from: the only copy of the weights, and what to pass to load it."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rabbit_engine.checkpoints.shards import read_journal, read_manifest
from rabbit_engine.errors import DamagedShardError

_QUOTE = '"'

_OVER = re.compile(r"-over([0-9]+)$")
"""How the name of a folder ends that has a part of a split."""


@dataclass(frozen=True, slots=True)
class OnlyCopy:
    """A split whose originals are deleted, or of which it has deleted some before it was interrupted.

    `dtype` is named as in torch; `compression` is the fingerprint of how weights are stored, if that is not plain. It is spread
    over `folders`, of which `folder` is one.
    """

    folder: Path
    dtype: str
    compression: Mapping[str, Any] | None
    finished: bool
    folders: int = 1

    def keywords(self, dtype: str, *, compressed: bool, folders: int = 1) -> dict[str, str]:
        """What to pass in place of this `dtype` and compression and so many folders, as Python; None is to be left out."""
        found = {} if dtype == self.dtype else {"dtype": f'"{self.dtype}"'}
        if folders != self.folders:
            found["layer_shards_saving_path"] = f"[all {self.folders} folders]" if self.folders > 1 else "its folder"
        if self.compression is None:
            return found | ({"compression": "None"} if compressed else {})
        if self.compression["method"] != "bnb":
            return found | {"compression": f'"{self.compression["method"]}"'}
        return found | {"quantization_config": _bitsandbytes(self.compression)}


def find_only_copies(root: Path, prefix: str = "") -> Iterator[OnlyCopy]:
    """Those below `root` whose folders begin with `prefix` and a dtype."""
    for folder in sorted(path for path in root.glob(f"{glob.escape(prefix)}*") if path.is_dir()):
        try:
            manifest, journal = read_manifest(folder), read_journal(folder)
        except DamagedShardError:  # reported or repaired when this split is opened
            continue
        if (manifest and manifest.source["deleted"]) or (journal and journal.deleted):
            made_from = manifest or journal
            assert made_from is not None  # noqa: S101 - for mypy
            dtype = folder.name.removeprefix(prefix).partition("-")[0]
            over = _OVER.search(folder.name)
            compression = made_from.source.get("compression")
            yield OnlyCopy(folder, dtype, compression, manifest is not None, int(over[1]) if over else 1)


def _bitsandbytes(made: Mapping[str, Any]) -> str:
    """The config that asks for weights as they were made."""
    bits = ["load_in_8bit=True"] if made["kind"] == "int8" else ["load_in_4bit=True", f'bnb_4bit_quant_type="{made["kind"]}"']
    nested = ["bnb_4bit_use_double_quant=True"] if made["nested"] else []
    skip = [] if made["skip"] is None else [f"llm_int8_skip_modules={made['skip']}"]
    return f"BitsAndBytesConfig({', '.join((*bits, *nested, *skip))})"


def advice_to_load(copy: OnlyCopy, name: str, keywords: Mapping[str, str], saving_path: Path | None) -> str:
    """What is left of the model `name`, whose splits are in `saving_path`, and the keywords and the command that load it."""
    passed = ", ".join(f"{keyword}={value}" for keyword, value in keywords.items())
    left = f"{'a' if copy.finished else 'an interrupted'} split of them is in {copy.folder}"
    return f"the original weights of {name} were deleted, {left}: pass {passed}{_command(name, keywords, saving_path)}"


def _command(name: str, keywords: Mapping[str, str], saving_path: Path | None) -> str:
    """Empty if the command line has no such options."""
    if {"quantization_config", "layer_shards_saving_path"} & keywords.keys() or "None" in keywords.values():
        return ""
    place = [] if saving_path is None else [f"--saving-path {saving_path}"]
    options = [f"--{keyword} {value.strip(_QUOTE)}" for keyword, value in keywords.items()]
    return f" (`rabbit run {name} {' '.join((*options, *place))}`)"
