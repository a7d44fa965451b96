"""Decoding allocates no more than its encoding says, and plans count that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_gguf_blocks import random_blocks
from torch.profiler import ProfilerActivity, profile

from rabbit_engine.quantization import Blocks4bit, Fp8Blocks, Gptq, Mxfp4, ScaledBlocks
from rabbit_engine.quantization.bitsandbytes_made import PackedBlocks4bit
from rabbit_engine.quantization.cast import Cast
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.four_bit_layouts import LAYOUTS
from rabbit_engine.quantization.gguf import BLOCKS, ArrangedColumns, ComputedValues, GgufBlocks, OrderedRows, RowOrder
from rabbit_engine.quantization.kernels import torch_operations

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmark_decoding import ENCODINGS, Stored, random_bytes, storable, words

Make = Callable[[int, int], Stored]
ORDER = RowOrder(torch.randperm(1024))
SMALL_BYTES = 16 * 2**10
"""Of tables, shifts and reductions, whatever the size of a weight."""


def gguf_blocks(kind: str, *, stepwise: bool = False) -> Make:
    return lambda rows, columns: Stored(
        GgufBlocks(kind, stepwise=stepwise), [torch.from_numpy(random_blocks(kind, rows, columns))], (rows, columns)
    )


def nested(rows: int, columns: int) -> Stored:
    blocks = rows * columns // 64
    scales = [random_bytes(blocks), torch.rand(-(-blocks // 256)), torch.rand(256)]
    return Stored(Blocks4bit("nf4", 64, 0.1), [random_bytes(rows * columns // 2), *scales], (rows, columns))


def gptq_of_three_bits(rows: int, columns: int) -> Stored:
    scales = torch.rand(columns // 32, rows).half()
    return Stored(Gptq(3, 32, 1), [words(columns * 3 // 32, rows), words(columns // 32, rows * 3 // 32), scales], (rows, columns))


def scaled(bits: int, group: int, *, in_groups: bool = False, with_zeros: bool = False) -> Make:
    def make(rows: int, columns: int) -> Stored:
        components = [words(rows, columns * bits // 32), torch.rand(rows, columns // group).bfloat16()]
        components += [words(rows * bits // 32, columns // group)] if with_zeros else []
        components += [torch.randint(columns // group, (columns,), dtype=torch.int32)] if in_groups else []
        return Stored(ScaledBlocks(bits, 1, group, with_zeros, in_groups), components, (rows, columns))

    return make


def fp8_rows(rows: int, columns: int) -> Stored:
    return Stored(Fp8Blocks(), [random_bytes(rows, columns).view(torch.float8_e5m2), random_bytes(rows, 1)], (rows, columns))


def mxfp4_of_large_scales(rows: int, columns: int) -> Stored:
    blocks, scales = random_bytes(1, rows, columns // 32, 16), torch.full((1, rows, columns // 32), 250, dtype=torch.uint8)
    return Stored(Mxfp4(), [blocks, scales], (1, columns, rows))


def ordered(rows: int, columns: int) -> Stored:
    return Stored(OrderedRows(RowOrder(torch.randperm(rows))), [torch.rand(rows, columns)], (rows, columns))


def arranged(rows: int, columns: int) -> Stored:
    return Stored(
        ArrangedColumns(GgufBlocks("Q4_K"), ORDER, transposed=True),
        gguf_blocks("Q4_K")(rows, columns).components,
        (columns, rows),
    )


def computed(rows: int, columns: int) -> Stored:
    encoding = ComputedValues(
        lambda values: -values.exp() - 1, (rows, columns), torch.float32, torch.bfloat16, GgufBlocks("Q8_0")
    )
    return Stored(encoding, gguf_blocks("Q8_0")(rows, columns).components, (rows, columns))


EVERY: dict[str, Make] = {
    **ENCODINGS,
    **{kind: gguf_blocks(kind) for kind in sorted(BLOCKS)},
    "Q5_K, each step rounded": gguf_blocks("Q5_K", stepwise=True),
    **{f"4bit, {layout}": storable(FourBitGroups(32, layout)) for layout in LAYOUTS},
    "nf4 with nested scales": nested,
    "nf4, packed": storable(PackedBlocks4bit("nf4")),
    "GPTQ of three bits": gptq_of_three_bits,
    "integers of eight bits": scaled(8, 128),
    "integers of four bits with zero points": scaled(4, 32, with_zeros=True),
    "integers of three bits with zero points": scaled(3, 32, with_zeros=True),
    "integers by activations": scaled(4, 128, in_groups=True, with_zeros=True),
    "fp8 rows": fp8_rows,
    "mxfp4 of large scales": mxfp4_of_large_scales,
    "cast": lambda rows, columns: Stored(Cast(), [torch.rand(rows, columns)], (rows, columns)),
    "rows in order": ordered,
    "columns in order, transposed": arranged,
    "computed": computed,
}


def most_allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held for `run` at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_decoding_allocates_no_more_than_it_says(name: str, compiled: bool) -> None:
    for rows in (128, 2048):  # at once, and in pieces
        stored = EVERY[name](rows, 1024)
        out = torch.empty(stored.shape, dtype=torch.bfloat16)
        with nullcontext() if compiled else torch_operations():
            said = stored.encoding.work_bytes(stored.components, out, out.device)
            stored.encoding.decode(stored.components, out)  # makes tables, and compiles
            found = most_allocated(lambda stored=stored, out=out: stored.encoding.decode(stored.components, out))
        assert found <= said + SMALL_BYTES
        assert said <= 2 * found + SMALL_BYTES
