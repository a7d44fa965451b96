"""Reads how a checkpoint embeds from sentence-transformers' files next to its weights.

`modules.json` lists the steps, `1_Pooling/config.json` how hidden states become one vector, `sentence_bert_config.json` the
longest text, and `config_sentence_transformers.json` the prompts that go before a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.storage.jsonvalues import Fields, file_name
from rabbit_engine.tasks.embedding import POOLINGS, Embedder
from rabbit_engine.tasks.jsonfiles import parsed
from rabbit_engine.tasks.steps import KINDS, read_step

_PACKAGE = "sentence_transformers"


def find_embedder(folder: Path) -> Embedder | None:
    """The embedder of the checkpoint in `folder`; None if it has no modules.json.

    Raises ConfigurationError for an unsupported step or pooling, DamagedCheckpointError for files that cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    with parsed(path) as listed:
        rows = Fields({"steps": listed}).rows("steps")
        listed_steps = [(row.text("type"), file_name(place) if (place := row.values.get("path")) else "") for row in rows]
    if not listed_steps:
        return None
    _require_known(listed_steps, path)
    kinds = [_class_of(kind) for kind, _ in listed_steps]
    part = listed_steps[kinds.index("Pooling")][1] if "Pooling" in kinds else "1_Pooling"
    after = [(kind, folder / place) for kind, (_, place) in zip(kinds, listed_steps, strict=True) if kind in KINDS]
    normalizes = bool(after) and after[-1][0] == "Normalize"
    steps = [read_step(kind, place) for kind, place in after]
    kept = tuple(step for step in (steps[:-1] if normalizes else steps) if step is not None)
    embedder = replace(_read_pooling(folder / part / "config.json"), normalizes=normalizes, steps=kept)
    return _with_length(_with_prompts(embedder, folder), folder)


def _class_of(kind: str) -> str:
    return kind.rpartition(".")[2]


def _require_known(steps: Sequence[tuple[str, str]], path: Path) -> None:
    """Raise ConfigurationError unless they are the model, pooling, and steps that are known, in this order."""
    kinds = [_class_of(kind) for kind, _ in steps]
    unknown = {each for each in kinds if each not in {"Transformer", "Pooling", *KINDS}}
    unknown |= {kind for kind, _ in steps if _class_of(kind) != "Transformer" and kind.partition(".")[0] != _PACKAGE}
    if unknown:
        raise ConfigurationError(f"{path} contains steps that are not supported: {', '.join(sorted(unknown))}")
    places = [("Transformer", "Pooling").index(kind) if kind not in KINDS else 2 for kind in kinds]
    if places != sorted(places) or any(kinds.count(kind) > 1 for kind in ("Transformer", "Pooling")):
        raise ConfigurationError(f"{path} has its steps in an order that is not supported: {', '.join(kinds)}")


def _read_pooling(path: Path) -> Embedder:
    with parsed(path) as listed:
        config = Fields.of(listed)
        modes = {key for key in config.values if key.startswith("pooling_mode_") and config.flag(key)}
        named = config.values.get("pooling_mode")  # in newer files
        listed_names = config.items("pooling_mode") if isinstance(named, list) else [config.optional_text("pooling_mode")]
        counts_prompt = config.flag("include_prompt") if "include_prompt" in config.values else True
    known = [name for name, (key, _) in POOLINGS.items() if key in modes]
    unknown = sorted(modes - {key for key, _ in POOLINGS.values()})
    found = [str(name) for name in listed_names if name is not None] or [*known, *unknown]
    if not found or not set(found) <= set(POOLINGS):
        raise ConfigurationError(f"{path} has a pooling that is not supported: {', '.join(found) or 'none is named'}")
    return Embedder(tuple(found), counts_prompt=counts_prompt)


def _with_prompts(embedder: Embedder, folder: Path) -> Embedder:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return embedder
    with parsed(path) as listed:
        config = Fields.of(listed)
        prompts = config.texts("prompts") if config.values.get("prompts") else {}
        default = config.optional_text("default_prompt_name")
        if default is not None and default not in prompts:
            raise ValueError(f"default_prompt_name is {default!r}, which is not among the prompts")
    return replace(embedder, prompts=prompts, default_prompt=default)


def _with_length(embedder: Embedder, folder: Path) -> Embedder:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return embedder
    with parsed(path) as listed:
        config = Fields.of(listed)
        most = config.count("max_seq_length") if config.values.get("max_seq_length") is not None else None
        lowercases = config.flag("do_lower_case") if "do_lower_case" in config.values else False
    return replace(embedder, most_tokens=most, lowercases=lowercases)
