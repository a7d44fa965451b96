"""Reads the JSON files next to a tokenizer: special tokens, padding and chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from rabbit_engine.errors import TokenizerNotFoundError

ATTRIBUTES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_LIMIT = int(1e30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """tokenizer_config.json (with special_tokens_map.json where it applies), generation_config.json and config.json."""

    folder: Path
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    chat_template: Any

    @property
    def added(self) -> dict[int, AddedToken]:
        """`added_tokens_decoder`: id -> token."""
        entries = self.tokenizer.get("added_tokens_decoder") or {}
        return {int(index): as_token(entry) for index, entry in entries.items()}

    @property
    def additional(self) -> tuple[AddedToken, ...]:
        """`additional_special_tokens`, under either of its names."""
        listed = self.tokenizer.get("additional_special_tokens") or self.tokenizer.get("extra_special_tokens") or ()
        return tuple(as_token(entry) for entry in (listed.values() if isinstance(listed, dict) else listed))

    @property
    def keywords(self) -> dict[str, Any]:
        """The settings that every tokenizer class takes unchanged."""
        kept = {name: self.tokenizer[name] for name in ("padding_side", "truncation_side") if name in self.tokenizer}
        limit = self.tokenizer.get("model_max_length") or _NO_LIMIT
        return {"model_max_length": limit, "clean_up_tokenization_spaces": False, **kept}


def read_settings(folder: Path) -> Settings:
    """Read the files in `folder`; missing ones are empty. Raises TokenizerNotFoundError for one that cannot be read."""
    tokenizer = _read(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in tokenizer:  # transformers 4 reads the map only in this case
        tokenizer = {**tokenizer, **_read(folder / "special_tokens_map.json")}
    template = folder / "chat_template.jinja"
    return Settings(
        folder=folder,
        tokenizer=tokenizer,
        generation=_read(folder / "generation_config.json"),
        model=_read(folder / "config.json"),
        chat_template=template.read_text("utf-8") if template.is_file() else _templates(tokenizer.get("chat_template")),
    )


def read_attributes(config: Mapping[str, Any], defaults: Mapping[str, str | None]) -> dict[str, AddedToken]:
    """Special tokens by attribute, from `config` or else `defaults`."""
    named = {**defaults, **{name: config[name] for name in ATTRIBUTES if config.get(name)}}
    return {name: as_token(named[name]) for name in ATTRIBUTES if named.get(name)}


def as_token(entry: object) -> AddedToken:
    """A special token from a file: a string, or a dict of its properties. Its text is matched literally."""
    if not isinstance(entry, dict):
        return AddedToken(str(entry), special=True, normalized=False)
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(entry["content"], special=bool(entry.get("special", True)), normalized=False, **flags)


def _templates(entry: object) -> Any:
    """One template, or a dict of named ones."""
    return {item["name"]: item["template"] for item in entry} if isinstance(entry, list) else entry


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise TokenizerNotFoundError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
