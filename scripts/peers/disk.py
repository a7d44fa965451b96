"""The disk alone: `python -m peers.disk MODEL_DIR`. In place of a token it reads a gigabyte of the model's files directly."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers.timing import decode_by_iterator, parser, run

GIGABYTE = 10**9
_READ_BYTES = 8 * 2**20
_THREADS = 4


def pieces(folder: Path) -> Iterator[tuple[Path, int]]:
    """Places in the files, one behind another and from the start again. Raises SystemExit if no file is as long as a read."""
    sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    found = [(path, offset) for path, size in sizes.items() for offset in range(0, size - _READ_BYTES, _READ_BYTES)]
    if not found:
        raise SystemExit(f"{folder} has no safetensors file of {_READ_BYTES} bytes")
    return itertools.cycle(found)


def read(place: tuple[Path, int]) -> None:
    """One direct read."""
    handle = os.open(place[0], os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _READ_BYTES) as buffer:
            os.preadv(handle, [buffer], place[1])
    finally:
        os.close(handle)


def gigabytes(places: Iterator[tuple[Path, int]]) -> Iterator[int]:
    """Read one for each value asked for."""
    with ThreadPoolExecutor(_THREADS) as readers:
        while True:
            list(readers.map(read, [next(places) for _ in range(GIGABYTE // _READ_BYTES)]))
            yield 0


def main() -> None:
    """As many as tokens are asked for."""
    options = parser(__doc__).parse_args()

    def decode(folder: Any, _prompt_ids: list[int], count: int) -> Any:
        return decode_by_iterator(gigabytes(pieces(folder)), count)

    run(options, "disk", "", lambda: options.model, decode)


if __name__ == "__main__":
    main()
