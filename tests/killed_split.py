"""Splits a checkpoint in child processes that SIGKILL themselves (or are killed after a while), then lets one finish.

    python killed_split.py CHECKPOINT SAVING_PATH {events,timer,none} [delete] [4bit]

`events`: child n kills itself at its n-th file operation, over what child n - 1 left, until a child finishes.
`timer`: 25 children are killed after a random time, then one finishes; `none`: only that one. Prints the number of children
killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
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


def split_in_child(checkpoint: Path, saving_path: Path, words: list[str], event_number: int | None) -> int:
    """The child's process id."""
    child = os.fork()
    if child:
        return child
    if event_number is not None:
        kill_at(event_number, (str(checkpoint), str(saving_path)))
    status = 1
    try:
        prepare(
            checkpoint,
            SourceConfig(),
            SplitConfig(
                mode="always",
                saving_path=saving_path,
                delete_original="delete" in words,
                compression=CompressionConfig(method="4bit") if "4bit" in words else None,
            ),
            progress=False,
        )
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


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    checkpoint, saving_path, mode, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:]
    kills = 0
    if mode == "events":
        while killed(split_in_child(checkpoint, saving_path, words, event_number=kills + 1)):
            kills += 1
    else:
        random.seed(11)
        for _ in range(25 if mode == "timer" else 0):
            child = split_in_child(checkpoint, saving_path, words, event_number=None)
            time.sleep(random.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            kills += killed(child)
        assert not killed(split_in_child(checkpoint, saving_path, words, event_number=None))
    print(kills)


if __name__ == "__main__":
    main()
