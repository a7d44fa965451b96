"""How fast each encoding is decoded, and multiplied by as it is stored, next to the memory's own rates in the same rounds.

    python scripts/benchmark_decoding.py [--device cuda:0] [--threads 1,2] [--rows N] [--columns N] [--rounds N] [--only PATTERN]

A round runs every encoding once, so that none finds its bytes in a cache. Values are random; the matrix is decoded to bfloat16,
as when its module runs. On an accelerator the rate at which stored bytes arrive is printed too: an encoding that is decoded
more slowly limits a pass from host memory. The last lines are JSON.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated

import torch
import typer
from torch.nn import functional

from rabbit_engine.quantization import Awq, Blocks4bit, Fp8Blocks, Gptq, Int8Rows, Mxfp4, ScaledBlocks
from rabbit_engine.quantization.bitsandbytes_made import PackedBlocks4bit, packs_weights
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import layout_for
from rabbit_engine.quantization.gguf import BLOCKS, GgufBlocks
from rabbit_engine.quantization.gguf.unpacking import LAYOUTS
from rabbit_engine.quantization.kernels import kernels_in_use
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.storage.encoding import Encoding, Product
from rabbit_engine.streaming.transfer.measure import measure_link
from rabbit_engine.utils.platform import environment, find_device, has_streams
from rabbit_engine.utils.sizes import format_rate

REFERENCE_BYTES = 2**29
MOST_ROWS = 1024


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

    @property
    def numel(self) -> int:
        """Values of the weight."""
        return math.prod(self.shape)

    def on(self, device: torch.device) -> Stored:
        """The same on `device`."""
        return replace(self, components=[component.to(device) for component in self.components])


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
    **{f"GGUF {kind}": gguf(kind) for kind in sorted(BLOCKS)},
    "bitsandbytes nf4": blocks_4bit,
    "bitsandbytes int8": int8,
    **({"bitsandbytes nf4, packed": storable(PackedBlocks4bit("nf4", nested=False))} if packs_weights("cpu") else {}),
    "GPTQ int4, desc_act": gptq,
    "AWQ": awq,
    "compressed-tensors int4": packed_int4,
    "lossless": storable(Lossless()),
    "8bit": storable(EightBitRows()),
    "4bit": storable(FourBitGroups(64, layout_for(64, find_device(None).type))),
}


@dataclass(slots=True)
class Measured:
    """One encoding with one number of threads: seconds of each round. `fused_s` is empty if nothing multiplies by it as stored;
    `most_rows` of states are multiplied so."""

    encoding: str
    threads: int | None
    stored_bytes: int
    values: int
    most_rows: int
    decode_s: list[float] = field(default_factory=list)
    then_multiply_s: list[float] = field(default_factory=list)
    fused_s: list[float] = field(default_factory=list)

    @property
    def decode(self) -> float:
        """The median."""
        return statistics.median(self.decode_s)

    @property
    def decoded_product(self) -> float:
        """The median of decoding and then multiplying one row."""
        return statistics.median(map(sum, zip(self.decode_s, self.then_multiply_s, strict=True)))

    @property
    def fused(self) -> float | None:
        """The median of one row."""
        return statistics.median(self.fused_s) if self.fused_s else None


@dataclass(frozen=True, slots=True)
class Memory:
    """What every lane needs on the device: two large buffers, a decoded matrix, and one row of states."""

    device: torch.device
    source: torch.Tensor
    target: torch.Tensor
    out: torch.Tensor
    states: torch.Tensor

    @classmethod
    def claim(cls, device: torch.device, rows: int, columns: int) -> Memory:
        """In bfloat16, filled."""
        large = partial(torch.ones, REFERENCE_BYTES // 8, dtype=torch.int64, device=device)
        matrix, states = torch.randn(rows, columns), torch.randn(1, columns)
        return cls(device, large(), large(), matrix.to(device, torch.bfloat16), states.to(device, torch.bfloat16))

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call."""
        start = time.perf_counter()
        run()
        if has_streams(self.device):
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - start

    def references(self) -> dict[str, float]:
        """Seconds to read a buffer, to copy it, and to multiply one row by the decoded matrix."""
        return {
            "read": self.seconds(self.source.max),
            "copy": self.seconds(lambda: self.target.copy_(self.source)),
            "product": self.seconds(lambda: functional.linear(self.states, self.out)),
        }


def most_rows(encoding: Encoding, device: torch.device) -> int:
    """How many rows of states are multiplied by a weight as it is stored, up to MOST_ROWS."""
    if not isinstance(encoding, Product):
        return 0
    return sum(encoding.gains(rows, torch.bfloat16, device) for rows in range(1, MOST_ROWS + 1))


def measure(
    weights: Mapping[str, Stored], memory: Memory, threads: int | None, rounds: int
) -> tuple[list[Measured], dict[str, list[float]]]:
    """Every encoding and the references; the first round, which compiles kernels, is not counted."""
    if threads is not None:
        torch.set_num_threads(threads)
    found = [
        Measured(name, threads, stored.nbytes, stored.numel, most_rows(stored.encoding, memory.device))
        for name, stored in weights.items()
    ]
    references: dict[str, list[float]] = {"read": [], "copy": [], "product": []}
    for number in range(rounds + 1):
        times = memory.references()
        decoded = [decode_once(stored, memory) for stored in weights.values()]
        fused = [
            fused_once(stored, memory) if one.most_rows else None for one, stored in zip(found, weights.values(), strict=True)
        ]
        if not number:
            continue
        for name, seconds in times.items():
            references[name].append(seconds)
        for one, (decode_s, multiply_s), fused_s in zip(found, decoded, fused, strict=True):
            one.decode_s.append(decode_s)
            one.then_multiply_s.append(multiply_s)
            one.fused_s += [] if fused_s is None else [fused_s]
    return found, references


def decode_once(stored: Stored, memory: Memory) -> tuple[float, float]:
    """Seconds to decode, and then to multiply one row."""
    out = memory.out.view(stored.shape)
    return (
        memory.seconds(lambda: stored.encoding.decode(stored.components, out)),
        memory.seconds(lambda: functional.linear(memory.states, memory.out)),
    )


def fused_once(stored: Stored, memory: Memory) -> float:
    """Seconds to multiply one row by the weight as it is stored."""
    product = stored.encoding
    assert isinstance(product, Product)
    return memory.seconds(lambda: product.linear(memory.states, stored.components, stored.shape))


def gigabytes(nbytes: int, seconds: float) -> str:
    """`gigabytes(10**9, 0.5) -> "2.0"`."""
    return f"{nbytes / seconds / 1e9:.1f}"


def decode_table(runs: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """A row for each encoding; for each number of threads the stored and the written bytes a second."""
    heads = [f"from stored GB/s{_with(run[0])} | written GB/s{_with(run[0])}" for run in runs]
    yield f"| encoding | bits a value | {' | '.join(heads)} |"
    yield "|" + "---|" * (2 + 2 * len(runs))
    for same in zip(*runs, strict=True):
        bits = f"{8 * same[0].stored_bytes / same[0].values:.2f}"
        rates = (f"{gigabytes(one.stored_bytes, one.decode)} | {gigabytes(2 * one.values, one.decode)}" for one in same)
        yield f"| {same[0].encoding} | {bits} | {' | '.join(rates)} |"


def product_table(runs: Sequence[Sequence[Measured]]) -> Iterator[str]:
    """A row for each encoding that is multiplied as stored: milliseconds of one row, and its stored bytes a second."""
    columns = ("fused ms", "decoded ms", "fused from stored GB/s")
    heads = [" | ".join(f"{column}{_with(run[0])}" for column in columns) for run in runs]
    yield f"| encoding | {' | '.join(heads)} | fused up to rows |"
    yield "|" + "---|" * (2 + len(columns) * len(runs))
    for same in zip(*runs, strict=True):
        cells = [
            f"{1000 * one.fused:.2f} | {1000 * one.decoded_product:.2f} | {gigabytes(one.stored_bytes, one.fused)}"
            for one in same
            if one.fused is not None
        ]
        most = "any" if same[0].most_rows == MOST_ROWS else same[0].most_rows
        if cells:
            yield f"| {same[0].encoding} | {' | '.join(cells)} | {most} |"


def _with(one: Measured) -> str:
    return "" if one.threads is None else f", {one.threads} thread{'s' if one.threads > 1 else ''}"


def said(threads: int | None, references: Mapping[str, Sequence[float]], values: int) -> str:
    """The memory's rates as a line."""
    median = {name: statistics.median(seconds) for name, seconds in references.items()}
    name = "" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}: "
    return (
        f"{name}memory is read at {gigabytes(REFERENCE_BYTES, median['read'])} GB/s and copied at "
        f"{gigabytes(REFERENCE_BYTES, median['copy'])} GB/s (each byte read and written once); one row by the matrix in bfloat16 "
        f"takes {1000 * median['product']:.2f} ms, {gigabytes(2 * values, median['product'])} GB/s"
    )


def main(
    device: Annotated[str | None, typer.Option(help="By default the best available.")] = None,
    threads: Annotated[str, typer.Option(help="Numbers of threads of a CPU, each measured in turn.")] = "1,2",
    rows: int = 4096,
    columns: int = 4096,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[str, typer.Option(help="Only encodings whose names this pattern finds.")] = "",
) -> None:
    """Print the tables and the records."""
    place = find_device(device)
    counts = [None] if has_streams(place) else [int(part) for part in threads.split(",")]
    link = measure_link(place) if has_streams(place) else None
    memory = Memory.claim(place, rows, columns)
    weights = {name: make(rows, columns).on(place) for name, make in ENCODINGS.items() if re.search(only, name)}
    runs, references = zip(*(measure(weights, memory, count, rounds) for count in counts), strict=True)
    print(f"{place}, {rows} x {columns}, on a CPU with {kernels_in_use()}; link: {format_rate(link, 1) if link else 'none'}")
    for count, found in zip(counts, references, strict=True):
        print(said(count, found, rows * columns))
    print("", *decode_table(runs), "", *product_table(runs), "", sep="\n")
    for run, found in zip(runs, references, strict=True):
        for one in run:
            print(json.dumps({**asdict(one), "references_s": found, "link_rate": link, **environment()}))


if __name__ == "__main__":
    typer.run(main)
