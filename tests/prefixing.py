"""Blocks whose contents follow from their tokens, and processes that share one prefix store.

    python prefixing.py FOLDER killed KILLS      writers are killed with SIGKILL after a random time, or at a file operation
    python prefixing.py FOLDER crowd SECONDS     three processes write, read, evict and clear at once

After each kill, and at every lookup, what is found must be right. Prints the number of blocks that were found.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rabbit_engine.prefixes import PrefixSpace, PrefixStore, blockfile

BLOCK = 4
IDENTITY = {"fingerprint": "abc", "dtype": "bfloat16"}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "os.utime"}


def block_of(tokens: list[int], index: int) -> dict[str, torch.Tensor]:
    """The tensors of a block, made of all tokens up to its end."""
    seen = np.asarray(tokens[: (index + 1) * BLOCK], "<i8").tobytes()
    random_state = torch.Generator().manual_seed(zlib.crc32(seen))
    keys = torch.randn(2, BLOCK, 3, generator=random_state)
    return {"keys.0": keys.to(torch.bfloat16), "state": torch.randn(700, generator=random_state)}


def write(space: PrefixSpace, tokens: list[int]) -> list[bool]:
    """Store all whole blocks of a text."""
    return [space.write(tokens, index, block_of(tokens, index)) for index in range(len(tokens) // BLOCK)]


def count_right(space: PrefixSpace, tokens: list[int]) -> int:
    """The number of blocks of a text that are found, each of which must be right."""
    count = 0
    for index, block in enumerate(space.find(tokens).blocks()):
        expected = block_of(tokens, index)
        assert list(block) == list(expected)
        assert all(torch.equal(block[name], tensor) for name, tensor in expected.items()), (tokens, index)
        count += 1
    return count


def draw_text(source: random.Random) -> list[int]:
    """One of a few texts, which share beginnings."""
    return [source.randint(0, 1) for _ in range(2)] * BLOCK + [source.randint(0, 3)] * 12


def start(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, whose process id is returned."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_at(event: str, number: int, folder: str) -> None:
    """SIGKILL this process at its `number`-th "operation" on files below `folder`, or before it writes its n-th "tensor"."""
    counts, whole = {"operation": 0, "tensor": 0}, blockfile.write_padded

    def count(kind: str) -> None:
        counts[kind] += 1
        if kind == event and counts[kind] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_padded(file: Any, *arguments: Any) -> None:
        file.flush()
        count("tensor")
        whole(file, *arguments)

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name in FILE_EVENTS and str(arguments[0]).startswith(folder):
            count("operation")

    blockfile.write_padded = write_padded  # type: ignore[attr-defined]
    sys.addaudithook(hook)


def write_texts(folder: Path, seed: int, event: str, number: int) -> None:
    """What is killed: writes texts, and evicts others, until then."""
    source = random.Random(seed)
    kill_at(event, number, str(folder))
    with PrefixStore(folder, max_bytes=150_000, block_tokens=BLOCK) as store:
        space = store.space(IDENTITY, "a model")
        while True:
            write(space, draw_text(source))
            store.flush()


def be_killed(folder: Path, kills: int) -> int:
    """Kill writers; after each one, check every text."""
    source, found = random.Random(5), 0
    texts = {tuple(draw_text(random.Random(seed))) for seed in range(40)}
    for seed in range(kills):
        event, number = ("time", "operation", "tensor")[seed % 3], seed // 3
        child = start(
            lambda seed=seed, event=event, number=number: write_texts(folder, seed, event, number * 12 + 1)  # type: ignore[misc]
        )
        if event == "time":
            time.sleep(source.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "a writer failed"
        with PrefixStore(folder, max_bytes=150_000, block_tokens=BLOCK) as store:
            assert not list(folder.glob("writing/*")), "a file under way was left"
            space = store.space(IDENTITY, "a model")
            found += sum(count_right(space, list(text)) for text in texts)
    return found


class Complaints(logging.Handler):
    """A handler that keeps what the store says: nothing, where nothing is damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("rabbit_engine").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def mingle(folder: Path, seed: int, until: float) -> None:
    """One of a crowd."""
    source, found, complaints = random.Random(seed), 0, Complaints()
    with PrefixStore(folder, max_bytes=150_000, memory_bytes=40_000, block_tokens=BLOCK) as store:
        space = store.space(IDENTITY, "a model")
        while time.monotonic() < until or not found:
            text = draw_text(source)
            found += count_right(space, text)
            write(space, text)
            if source.random() < 0.02:
                store.clear()
    assert not complaints.texts, complaints.texts


def crowd(folder: Path, seconds: float) -> int:
    """Three processes at once; the limit holds at any time."""
    until = time.monotonic() + seconds
    children = [start(lambda seed=seed: mingle(folder, seed, until)) for seed in range(3)]  # type: ignore[misc]
    most = 0
    with PrefixStore(folder, max_bytes=150_000, block_tokens=BLOCK) as store:
        while time.monotonic() < until:
            most = max(most, sum(model.nbytes for model in store.models()))
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0], "one failed"
    assert 0 < most <= 150_000, most
    return most


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # what a killed process wrote stays: only a machine without power would lose it
    folder, mode, number = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    print(be_killed(folder, int(number)) if mode == "killed" else crowd(folder, number))


if __name__ == "__main__":
    main()
