"""Requests that a seed makes odd: fields with values of other types, out of range, missing, nested, or not JSON at all."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

DEEP = "__deep__"
"""Stands for a list in a list, two thousand times."""

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 5, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.5, 1e-40, 1e308, float("nan"), float("inf")),
    *("", " ", "x", "\x00", "\ud800", "é\u2028", "true", "1", "-1", "5m", "x" * 5000, "{{ 1 }}", "<tool_call>"),
    *([], [[]], [None], [1], ["a"], [{}], {}, {"a": 1}, {"type": "text"}, {"type": "object", "properties": {"a": 5}}, DEEP),
)


def odd_requests(bodies: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Paths and contents: one of the `bodies`, each with its path, with up to three changes."""
    chance = random.Random(seed)
    for _ in range(count):
        path, body = chance.choice(bodies)
        changed = copy.deepcopy(body)
        for _ in range(chance.choice((1, 1, 2, 3))):
            _change(changed, chance)
        content = bytearray(json.dumps(changed).replace(f'"{DEEP}"', "[" * 2000 + "]" * 2000).encode())
        if chance.random() < 0.1:
            for _ in range(chance.randrange(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        yield path, bytes(content)


def _change(body: dict[str, Any], chance: random.Random) -> None:
    """Change one value somewhere within, by chance."""
    holder: Any = body
    while True:
        keys = (
            [name for name in holder if name != "model" or chance.random() < 0.1]
            if isinstance(holder, dict)
            else [*range(len(holder))]
        )
        key = chance.choice(keys) if keys else None
        if key is None or not isinstance(holder[key], dict | list) or not holder[key] or chance.random() < 0.4:
            break
        holder = holder[key]
    value = copy.deepcopy(chance.choice(_VALUES))
    match holder:
        case dict() if key is None or chance.random() < 0.1:
            holder[chance.choice(("unheard_of", "stpo", "images", "max_tokens", "", "x" * 300))] = value
        case dict() if chance.random() < 0.15:
            del holder[key]
        case list() if key is None or chance.random() < 0.2:
            holder.append(value)
        case _:
            holder[key] = value
