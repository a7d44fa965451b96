"""Finds the key that breaks a config: the one whose removal makes it work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_SEARCH_S = 3.0
_MOST = 3
_KEPT = ("model_type", "architectures", "transformers_version")


def faulty_key_of_config(raw: Mapping[str, Any]) -> str:
    """A suffix for the error about a config.json that cannot be read, naming the faulty key; empty if none is found."""
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in CONFIG_MAPPING:
        return ""
    kind = CONFIG_MAPPING[raw["model_type"]]
    return _find_faulty(raw, lambda rest: repr(kind.from_dict(rest).get_text_config(decoder=True)))


def faulty_key_of_model(config: PretrainedConfig, attempt: Callable[[PretrainedConfig], Any]) -> str:
    """The same for a config with which `attempt` (such as building the model) fails."""
    try:
        raw = json.loads((Path(config.name_or_path or "") / "config.json").read_text("utf-8"))
        default = CONFIG_MAPPING[raw["model_type"]]().to_dict()
        changed = {key: value for key, value in raw.items() if key in _KEPT or key not in default or default[key] != value}
    except Exception:  # noqa: BLE001 - a missing file, or any error of a config class's own code
        return ""
    return _find_faulty(changed, lambda rest: attempt(CONFIG_MAPPING[raw["model_type"]].from_dict(rest)))


def _find_faulty(raw: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]) -> str:
    end = time.monotonic() + _SEARCH_S
    if _works(attempt, dict(raw)):
        return ""  # the failure has another cause
    found = []
    for path, value, rest in _without_each(raw):
        if time.monotonic() > end:
            break
        if _works(attempt, rest):
            found.append(f"{'.'.join(path)}={_shown(value)}")
    return f"; at fault is {' or '.join(found[:_MOST])}" if found else ""


def _works(attempt: Callable[[dict[str, Any]], Any], raw: dict[str, Any]) -> bool:
    try:
        attempt(raw)
    except Exception:  # noqa: BLE001 - third-party code that has failed once already
        return False
    return True


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without_each(raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Each key's path and value, and the config without it; nested keys come before the object that holds them."""
    for key, value in raw.items():
        if key in _KEPT:
            continue
        for inner in value if isinstance(value, dict) else ():
            yield (key, inner), value[inner], {**raw, key: {other: value[other] for other in value if other != inner}}
        yield (key,), value, {other: raw[other] for other in raw if other != key}
