"""Numbers of layers as text."""

from __future__ import annotations

from collections.abc import Iterable


def format_spans(numbers: Iterable[int]) -> str:
    """Ascending numbers, with those that follow one another as a span: "0-3, 8, 10-11"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def format_layers(numbers: Iterable[int]) -> str:
    """The same, said of layers: "layers 0-3, 8", "layer 2"."""
    spans = format_spans(numbers)
    return f"layer{'' if spans.isdecimal() else 's'} {spans}"
