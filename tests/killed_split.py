"""Splits checkpoints in child processes that SIGKILL themselves (or are killed after a while), then lets one finish.

Reads jobs from stdin, a JSON list a line: `[CHECKPOINT, SAVING_PATH, "events" | "timer" | "both", *WORDS]`, where a word is
"delete", "4bit" or "onto" (two folders in SAVING_PATH); writes the number of children killed, a line each.

`events`: child n kills itself at its n-th file operation, over what child n - 1 left, until a child finishes.
`timer`: 25 children are killed after a random time, then one finishes. `both`: two at once, of which none is killed.

A child is a fork of this process, which has imported all that a split needs and has no other thread.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from rabbit_engine.checkpoints import prepare
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "os.listdir"}


def kill_at(event_number: int, folders: tuple[str, ...]) -> None:
    """SIGKILL this process at its `event_number`-th file operation below `folders`."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(folders):
            return
        seen += 1
        if seen == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def split(checkpoint: Path, saving_path: Path, words: list[str]) -> None:
    compression = CompressionConfig(method="4bit") if "4bit" in words else None
    delete = "delete" in words
    first, *more = [saving_path / disk for disk in "ab"] if "onto" in words else [saving_path]
    config = SplitConfig(
        mode="always", saving_path=first, more_paths=tuple(more), delete_original=delete, compression=compression
    )
    prepare(checkpoint, SourceConfig(), config, progress=False)


def split_in_child(checkpoint: Path, saving_path: Path, words: list[str], event_number: int | None = None) -> int:
    """The child's process id."""
    child = os.fork()
    if child:
        return child
    if event_number is not None:
        kill_at(event_number, (str(checkpoint), str(saving_path)))
    status = 1
    try:
        split(checkpoint, saving_path, words)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def killed(child: int) -> bool:
    """Whether it was killed; exits where it failed in another way."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit("the split failed")
    return False


def run(checkpoint: Path, saving_path: Path, mode: str, words: list[str]) -> int:
    """The number of children killed."""
    kills = 0
    if mode == "both":
        return sum([killed(child) for child in [split_in_child(checkpoint, saving_path, words) for _ in range(2)]])
    if mode == "events":
        while killed(split_in_child(checkpoint, saving_path, words, event_number=kills + 1)):
            kills += 1
        return kills
    random.seed(11)
    for _ in range(25):
        child = split_in_child(checkpoint, saving_path, words)
        time.sleep(random.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        kills += killed(child)
    assert not killed(split_in_child(checkpoint, saving_path, words))
    return kills


def import_all(checkpoint: Path, words: list[str]) -> None:
    """What a split imports on its way, it imports here once, instead of in every child."""
    with tempfile.TemporaryDirectory() as folder:
        split(checkpoint, Path(folder), [word for word in words if word != "delete"])
    assert threading.active_count() == 1, "a fork has no other thread"


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        checkpoint, saving_path, mode, *words = json.loads(line)
        import_all(Path(checkpoint), words)
        print(run(Path(checkpoint), Path(saving_path), mode, words), flush=True)


if __name__ == "__main__":
    main()
