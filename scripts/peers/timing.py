"""Shared by all runners: the arguments, a clock that is a transformers streamer, and the JSON line.

Only the standard library is imported here: each peer's Python must be able to run it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PROMPT_IDS = tuple(range(2, 18))


def parser(described: str | None, model: str = "the model's folder") -> argparse.ArgumentParser:
    """MODEL, --tokens, --prompt-ids and --prepare; a runner adds the options of its peer."""
    arguments = argparse.ArgumentParser(description=described)
    arguments.add_argument("model", type=Path, help=model)
    arguments.add_argument("--tokens", type=int, default=3, help="Tokens decoded and timed after the first one.")
    arguments.add_argument("--prompt-ids", type=parse_ids, default=list(PROMPT_IDS), help="For example 1,5,9.")
    arguments.add_argument("--prepare", action="store_true", help="Only load, so that a peer writes the files it needs once.")
    return arguments


def parse_ids(text: str) -> list[int]:
    """`parse_ids("1,5,9") -> [1, 5, 9]`."""
    return [int(part) for part in text.split(",")]


def read_bytes() -> int:
    """Bytes this process has read from disk so far, by system calls and page faults; without what the page cache served."""
    return _number_after("/proc/self/io", "read_bytes:")


def peak_rss_bytes() -> int:
    """Peak memory of this process, including pages of mapped files."""
    return 1024 * _number_after("/proc/self/status", "VmHWM:")


def _number_after(path: str, name: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


class Clock:
    """Records the time and the bytes read at every token. A streamer for `generate()`: the first `put` is the prompt."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._times_s: list[float] = []
        self._read: list[int] = []

    def start(self) -> None:
        """Start the clock."""
        self._times_s.append(time.perf_counter())
        self._read.append(read_bytes())

    def note(self, token: int) -> None:
        """Record the arrival of `token`."""
        self.tokens.append(token)
        self._times_s.append(time.perf_counter())
        self._read.append(read_bytes())

    def put(self, ids: Any) -> None:
        """The prompt `[1, prompt_tokens]` starts the clock; the tokens after it are recorded as they come, one or several."""
        if not self._times_s:
            self.start()
            return
        for token in ids.reshape(-1).tolist():
            self.note(token)

    def end(self) -> None:
        """Nothing to close."""

    def figures(self) -> dict[str, Any]:
        """Seconds of the first token and of each later one; bytes read for the first and for all later ones."""
        steps = [after - before for before, after in zip(self._times_s, self._times_s[1:], strict=False)]
        return {
            "first_token_s": steps[0],
            "token_s": steps[1:],
            "tokens": self.tokens,
            "first_token_read_bytes": self._read[1] - self._read[0],
            "read_bytes": self._read[-1] - self._read[1],
        }


def run(
    options: argparse.Namespace,
    peer: str,
    version: str,
    load: Callable[[], Any],
    decode: Callable[[Any, list[int], int], Clock],
) -> None:
    """Load, decode `tokens + 1` tokens, print the record. Importing the peer is not part of `load_s`."""
    start = time.perf_counter()
    model = load()
    record: dict[str, Any] = {"peer": peer, "version": version, "load_s": time.perf_counter() - start}
    if not options.prepare:
        record |= decode(model, options.prompt_ids, options.tokens + 1).figures()
    print(json.dumps({**record, "peak_rss_bytes": peak_rss_bytes()}), flush=True)


def decode_by_generate(model: Any, prompt_ids: list[int], count: int, **keywords: Any) -> Clock:
    """`count` greedy tokens by one call of a `generate()` like transformers', with its KV cache."""
    import torch

    clock = Clock()
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": count, "min_new_tokens": count}
    model.generate(ids, attention_mask=mask, streamer=clock, do_sample=False, use_cache=True, **lengths, **keywords)
    return clock


def decode_by_iterator(tokens: Iterable[int], count: int) -> Clock:
    """`count` tokens from a peer that yields them one at a time."""
    clock = Clock()
    clock.start()
    for token in tokens:
        clock.note(token)
        if len(clock.tokens) == count:
            break
    return clock
