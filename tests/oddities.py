"""Odd requests: valid ones that were changed at random, in JSON or in bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *("", " ", "x", "\0", "\n", "é", "🙂", "\u202e", "a" * 5000, "{{ messages }}", "<|im_end|>", "<tool_call>", "<think>"),
    *([], {}, [[]], [None], {"": None}, {"type": None}, {"type": "text"}, {"type": "text", "text": 5}, {"type": "image"}),
    *(["x"] * 50, [{"type": "text", "text": "x"}], {"role": "user", "content": "x"}, {"$ref": "#"}, {"a": {"b": {"c": []}}}),
)
RAW: tuple[bytes, ...] = (b"", b"null", b"[]", b"{", b"NaN", b'{"a": 1e999}', b'{"model": "\\ud800"}', b"\xff\xfe", b"[" * 3000)


def odd_bodies(bases: Sequence[Mapping[str, Any]], seed: int) -> Iterator[bytes]:
    """Endless bodies, the same for a seed."""
    dice = random.Random(seed)
    while True:
        body: Any = copy.deepcopy(dict(dice.choice(bases)))
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            _change(dice, body, bases)
        raw = json.dumps(body).encode()
        kind = dice.random()
        if kind < 0.03:
            yield dice.choice(RAW)
        elif kind < 0.06:
            at = dice.randrange(len(raw))
            yield raw[:at] + bytes([dice.randrange(256)]) + raw[at + dice.choice((0, 1)) :]
        else:
            yield raw


def _change(dice: random.Random, body: Any, bases: Sequence[Mapping[str, Any]]) -> None:
    """Replace, remove, repeat, nest or add a value somewhere."""
    places = list(_places(body))
    if not places:
        return
    holder, key = dice.choice(places)
    match dice.randrange(8):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(dice.choice(ODD))
        case 3:
            del holder[key]
        case 4:
            holder[key] = [holder[key]] * dice.choice((1, 2, 40))
        case 5:
            value = holder[key]
            for _ in range(dice.choice((1, 3, 200))):
                value = {"type": value} if dice.random() < 0.5 else [value]
            holder[key] = value
        case 6:
            other = dice.choice(list(_places(dict(dice.choice(bases)))))
            holder[key] = copy.deepcopy(other[0][other[1]])
        case _:
            if isinstance(holder, dict):
                holder[dice.choice(("x", "stop", "n", "seed", "type", "role", "id", "text", "format"))] = copy.deepcopy(
                    dice.choice(ODD)
                )


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in it, with each of its keys."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)
