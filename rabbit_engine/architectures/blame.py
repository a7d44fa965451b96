"""Which key of a config is at fault: the one without which it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

_SEARCH_S = 2.0
_KEPT = ("model_type", "architectures", "dtype", "transformers_version")


def blame_for_config(raw: Mapping[str, Any]) -> str:
    """What a message about a config.json that makes no config may add: the key at fault; empty where none is found."""
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in CONFIG_MAPPING:
        return ""
    return _blame(raw, lambda rest: CONFIG_MAPPING[raw["model_type"]].from_dict(rest))


def blame_for_model(config: PretrainedConfig, attempt: Callable[[PretrainedConfig], Any]) -> str:
    """The same for a config that `attempt`, such as building its model, fails with."""
    try:
        raw = config.to_diff_dict()
    except Exception:  # noqa: BLE001 - a config class's own code, over values it did not expect
        return ""
    return _blame(raw, lambda rest: attempt(type(config).from_dict(rest)))


def _blame(raw: Mapping[str, Any], attempt: Callable[[dict[str, Any]], Any]) -> str:
    end = time.monotonic() + _SEARCH_S
    for path, value, rest in _without_each(raw):
        if time.monotonic() > end:
            break
        with suppress(Exception):  # the attempt is foreign code that failed once already
            attempt(rest)
            return f"; at fault is {'.'.join(path)}={_shown(value)}"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _without_each(raw: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any, dict[str, Any]]]:
    """Each key's path and value, and the config without it; keys of objects inside before the objects."""
    for key, value in raw.items():
        if key in _KEPT:
            continue
        for inner in value if isinstance(value, dict) else ():
            yield (key, inner), value[inner], {**raw, key: {other: value[other] for other in value if other != inner}}
        yield (key,), value, {other: raw[other] for other in raw if other != key}
