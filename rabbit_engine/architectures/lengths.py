"""How long a text may be, by everything in a checkpoint that says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures.configfile import read_object

_LEARNT = "max_position_embeddings"
_IN_CONFIG = (
    _LEARNT,
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "max_target_positions",
)
_IN_FILES = (("tokenizer_config.json", "model_max_length"), ("sentence_bert_config.json", "max_seq_length"))

_NO_LIMIT = 2**31
"""Tokenizers without a limit state 10**30."""


def stated_lengths(model: PreTrainedModel, folder: Path) -> dict[str, int]:
    """Tokens, by the attribute that states them: of the text model's config, the tokenizer, and sentence-transformers' file.

    Positions that the class never uses, up to that of padding, are subtracted: RoBERTa's 514 are 512 tokens.
    """
    text = model.config.get_text_config(decoder=True)
    stated = {**model.config.to_dict(), **text.to_dict()} if text.model_type != model.config.model_type else text.to_dict()
    found = {name: stated[name] for name in _IN_CONFIG if _is_length(stated.get(name))}
    if _LEARNT in found:
        found[_LEARNT] -= _unused_positions(model)
    for file, name in _IN_FILES:
        values = read_object(folder / file, "download it again") if (folder / file).is_file() else {}
        if _is_length(values.get(name)):
            found[f"{file}: {name}"] = int(values[name])
    return found


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the layers with local attention see; None if there are none."""
    text: Any = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    layers = getattr(text, "layer_types", None)
    is_used = getattr(text, "use_sliding_window", True) and (layers is None or any("sliding" in kind for kind in layers))
    return window if is_used and _is_length(window) else None


def template_in(folder: Path) -> bool:
    """Whether the tokenizer in a folder has a chat template."""
    return (folder / "additional_chat_templates").exists() or bool(template_of(folder))


def template_of(folder: Path) -> str:
    """The chat template of the tokenizer in a folder; of several, the default one; empty without one."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text("utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        values: Mapping[str, Any] = read_object(file, "download it again") if file.is_file() else {}
        if found := values.get("chat_template"):
            return found if isinstance(found, str) else _default(found)
    return ""


def _default(templates: object) -> str:
    listed = [each for each in templates if isinstance(each, dict)] if isinstance(templates, list) else []
    ranked = sorted(listed, key=lambda each: each.get("name") != "default")
    return str(ranked[0].get("template", "")) if ranked else ""


def _is_length(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _NO_LIMIT


def _unused_positions(model: PreTrainedModel) -> int:
    """The learnt positions up to that of padding, which count from behind it."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [table.padding_idx for table in tables if isinstance(table, nn.Embedding) and table.padding_idx is not None]
    return paddings[0] + 1 if paddings else 0
