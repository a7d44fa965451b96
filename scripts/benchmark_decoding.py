"""How fast each encoding is decoded on a device: stored and decoded bytes per second of a matrix.

    python scripts/benchmark_decoding.py [--device cuda:0] [--rows 8192] [--columns 8192] [--rounds N]

On an accelerator the rate at which stored bytes arrive is printed too: an encoding that is decoded more slowly limits a pass
from host memory. Values are random; the matrix is decoded to bfloat16, as when its module runs. The last lines are JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from rabbit_engine.quantization import Awq, Blocks4bit, Fp8Blocks, Gptq, Int8Rows, Mxfp4, ScaledBlocks
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import layout_for
from rabbit_engine.quantization.gguf import GgufBlocks
from rabbit_engine.quantization.gguf.unpacking import LAYOUTS
from rabbit_engine.quantization.kernels import kernels_in_use
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.storage.encoding import Encoding
from rabbit_engine.streaming.transfer.measure import measure_link
from rabbit_engine.utils.platform import environment, find_device, has_streams
from rabbit_engine.utils.sizes import format_rate

GGUF_KINDS = ("Q4_K", "Q6_K", "Q8_0")


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight of `shape` as `components` that `encoding` decodes."""

    encoding: Encoding
    components: list[torch.Tensor]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(component.nbytes for component in self.components)


def random_bytes(*shape: int) -> torch.Tensor:
    """uint8 below 0x40 in each byte: no float made of them is infinite."""
    return torch.randint(0, 0x40, shape, dtype=torch.uint8)


def fp8(rows: int, columns: int) -> Stored:
    """e4m3 with a scale for each 128 x 128 values."""
    return Stored(
        Fp8Blocks(),
        [random_bytes(rows, columns).view(torch.float8_e4m3fn), torch.rand(rows // 128, columns // 128)],
        (rows, columns),
    )


def mxfp4(rows: int, columns: int) -> Stored:
    """One expert; it is decoded transposed."""
    scales = torch.randint(100, 130, (1, rows, columns // 32), dtype=torch.uint8)
    return Stored(Mxfp4(), [random_bytes(1, rows, columns // 32, 16), scales], (1, columns, rows))


def gguf(kind: str) -> Callable[[int, int], Stored]:
    """Blocks of that kind."""
    layout = LAYOUTS[kind]

    def make(rows: int, columns: int) -> Stored:
        return Stored(GgufBlocks(kind), [random_bytes(rows, columns // layout.values * layout.nbytes)], (rows, columns))

    return make


def storable(encoding: Storable) -> Callable[[int, int], Stored]:
    """Weights of a normal distribution, as shards store them."""

    def make(rows: int, columns: int) -> Stored:
        components = encoding.compress((torch.randn(rows, columns) * 0.02).bfloat16())
        assert components is not None
        return Stored(encoding, list(components), (rows, columns))

    return make


def blocks_4bit(rows: int, columns: int) -> Stored:
    """bitsandbytes' nf4 in blocks of 64."""
    codes = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8)
    return Stored(Blocks4bit("nf4", 64, whole_rows=True), [codes, torch.rand(rows * columns // 64)], (rows, columns))


def int8(rows: int, columns: int) -> Stored:
    """bitsandbytes' rows."""
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return Stored(Int8Rows(), [values, torch.rand(rows)], (rows, columns))


def words(*shape: int) -> torch.Tensor:
    """int32 of any bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def gptq(rows: int, columns: int) -> Stored:
    """Four bits in groups of 128 inputs, in the order of activations."""
    groups = torch.randperm(columns).div(128, rounding_mode="floor").int()
    scales = torch.rand(columns // 128, rows).half()
    return Stored(Gptq(4, 128, 1), [words(columns // 8, rows), words(columns // 128, rows // 8), scales, groups], (rows, columns))


def awq(rows: int, columns: int) -> Stored:
    """Groups of 128 inputs."""
    scales = torch.rand(columns // 128, rows).half()
    return Stored(Awq(128), [words(columns, rows // 8), words(columns // 128, rows // 8), scales], (rows, columns))


def packed_int4(rows: int, columns: int) -> Stored:
    """compressed-tensors' groups of 128 inputs."""
    scales = torch.rand(rows, columns // 128).bfloat16()
    return Stored(ScaledBlocks(4, 1, 128, by_rows=True), [words(rows, columns // 8), scales], (rows, columns))


ENCODINGS: Mapping[str, Callable[[int, int], Stored]] = {
    "fp8": fp8,
    "mxfp4": mxfp4,
    **{kind: gguf(kind) for kind in GGUF_KINDS},
    "bitsandbytes nf4": blocks_4bit,
    "bitsandbytes int8": int8,
    "GPTQ int4, desc_act": gptq,
    "AWQ": awq,
    "compressed-tensors int4": packed_int4,
    "lossless": storable(Lossless()),
    "8bit": storable(EightBitRows()),
    "4bit": storable(FourBitGroups(64, layout_for(64, find_device(None).type))),
}


def decode_s(stored: Stored, device: torch.device, rounds: int) -> list[float]:
    """Seconds of each round; the first, which compiles kernels, is not counted."""
    components = [component.to(device) for component in stored.components]
    out = torch.empty(stored.shape, dtype=torch.bfloat16, device=device)
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        stored.encoding.decode(components, out)
        if has_streams(device):
            torch.accelerator.synchronize(device)
        found.append(time.perf_counter() - start)
    return found[1:]


def main(
    device: Annotated[str | None, typer.Option(help="By default the best available.")] = None,
    rows: int = 8192,
    columns: int = 8192,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Print a table and the records."""
    place = find_device(device)
    link = measure_link(place) if has_streams(place) else None
    print(f"{place}, {rows} x {columns}, on a CPU with {kernels_in_use()}; link: {format_rate(link, 1) if link else 'none'}")
    print("| encoding | ms | stored | decoded |", "|---|---|---|---|", sep="\n")
    records = []
    for name, make in ENCODINGS.items():
        stored = make(rows, columns)
        found = decode_s(stored, place, rounds)
        median = statistics.median(found)
        print(
            f"| {name} | {1000 * median:.2f} | {format_rate(stored.nbytes, median)} | {format_rate(2 * rows * columns, median)} |"
        )
        records.append({"encoding": name, "stored_bytes": stored.nbytes, "rounds_s": found, "link_rate": link, **environment()})
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    typer.run(main)
