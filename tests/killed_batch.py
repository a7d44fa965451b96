"""Runs a batch in child processes that are killed with SIGKILL, then lets one finish.

    python killed_batch.py MODEL IN OUT TORN TIMED [LONGEST_S]

The n-th of TORN children kills itself in the middle of its (n + 1)-th write to OUT; each of TIMED ones is killed after a
random time of up to LONGEST_S. Prints, for every child, the whole lines in OUT when it ended.
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

from rabbit_engine import batch


def tear_write(number: int, path: str) -> None:
    """SIGKILL this process in the middle of its `number`-th write to `path`."""
    whole, seen = os.write, 0

    def write(handle: int, data: memoryview) -> int:
        nonlocal seen
        if os.path.samestat(os.fstat(handle), Path(path).stat()):
            seen += 1
            if seen == number:
                whole(handle, data[: len(data) * 2 // 3])
                os.kill(os.getpid(), signal.SIGKILL)
        return whole(handle, data)

    os.write = write


def start(files: list[str], torn: int | None) -> int:
    """The process id of a child that runs the batch."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if torn is not None:
            tear_write(torn, files[2])
        batch(*files, device="cpu", max_requests=4)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    files, torn, timed = sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
    longest_s = float(sys.argv[6]) if len(sys.argv) > 6 else 1.2
    random.seed(7)
    for number in range(torn + timed + 1):
        is_last = number == torn + timed
        child = start(files, number + 2 if number < torn else None)
        if torn <= number < torn + timed:
            time.sleep(random.uniform(0.2, longest_s))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if (os.WIFSIGNALED(status) and is_last) or os.WEXITSTATUS(status):  # a timed one may be done before
            sys.exit("the batch failed")
        print(Path(files[2]).read_bytes().count(b"\n") if Path(files[2]).exists() else 0)


if __name__ == "__main__":
    main()
