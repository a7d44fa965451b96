"""The tokenizer of a GGUF file: converted by transformers once, then kept as tokenizer.json in the user's cache folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rabbit_engine.errors import first_line
from rabbit_engine.storage.cached import recall, remember
from rabbit_engine.storage.jsonvalues import sealed, unsealed
from rabbit_engine.transformers_bridge.gguf_reader import quick_reader

logger = logging.getLogger(__name__)

_KIND = "gguf_tokenizers"
_FILES = frozenset({"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"})
_ALIKE = (
    *("special_tokens_map", "chat_template", "model_max_length", "padding_side", "truncation_side", "add_bos_token"),
    *("add_eos_token", "clean_up_tokenization_spaces", "model_input_names"),
)


def load_gguf_tokenizer(source: Mapping[str, Any], header_checksum: str) -> Any:
    """The tokenizer that `AutoTokenizer.from_pretrained(**source)` converts from the file with this header.

    A kept one was compared with the converted one when it was kept. Raises whatever transformers raises.
    """
    versions = [metadata.version(package) for package in ("transformers", "tokenizers")]
    key = "-".join((header_checksum, *versions))
    kept = _restored(_checked(unsealed(recall(_KIND, key))))
    if kept is not None:
        kept.name_or_path = source["pretrained_model_name_or_path"]
        return kept
    with quick_reader():
        converted = AutoTokenizer.from_pretrained(**source)
    files = _saved(converted)
    if _are_alike(_restored(files), converted):
        remember(_KIND, key, sealed(files))
    return converted


def _saved(tokenizer: Any) -> dict[str, str]:
    """The tokenizer's files by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir() if path.name in _FILES}


def _checked(files: Any) -> dict[str, str] | None:
    """The files that were kept; None if there are none, or they are not a tokenizer's."""
    return files if isinstance(files, dict) and "tokenizer.json" in files and _FILES.issuperset(files) else None


def _restored(files: Mapping[str, str] | None) -> Any:
    """The tokenizer of kept files; None if there are none, or they do not make one."""
    if files is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, text in files.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            return AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # noqa: BLE001 - the file is converted again, whatever is wrong with the kept one
            logger.info("a kept tokenizer cannot be loaded, and is made again: %s", first_line(error))
            return None


def _are_alike(kept: Any, converted: Any) -> bool:
    """Whether two tokenizers give the same tokens and texts, and have the same settings."""
    if type(kept) is not type(converted) or any(getattr(kept, name, None) != getattr(converted, name, None) for name in _ALIKE):
        return False
    return bool(kept.backend_tokenizer.to_str() == converted.backend_tokenizer.to_str())
