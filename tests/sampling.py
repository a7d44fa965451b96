"""A part of each test's parametrisations, for versions on which every mechanism should run but not every family, dtype and
budget: `pytest --sample 2 --whole "matrix bridge"`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest


def spread(number: int, most: int) -> list[int]:
    """At most `most` of `range(number)`, from the first to the last: `spread(9, 3) == [0, 4, 8]`."""
    if number <= most:
        return list(range(number))
    return [place * (number - 1) // max(most - 1, 1) for place in range(most)]


def left_out(items: Sequence[pytest.Item], most: int, whole: Collection[str]) -> list[pytest.Item]:
    """The parametrisations beyond `most` of each test, but for the files `test_NAME.py` with a name in `whole`."""
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.path.stem.removeprefix("test_") not in whole:
            of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [item for same in of_test.values() for i, item in enumerate(same) if i not in spread(len(same), most)]
