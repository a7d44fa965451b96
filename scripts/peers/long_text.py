"""Decoding behind a long text whose cache lies on disk: `python -m peers.long_text MODEL --behind N [--max-memory BYTES]`.

The cache is filled with random states: no prompt is computed. Prints JSON: seconds and bytes of each token, and the disk's rate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from peers.timing import peak_rss_bytes, read_bytes
from rabbit_engine import AutoModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.tiered_caches import make_cache
from rabbit_engine.planning.demand import Demand
from rabbit_engine.streaming.transfer.disk_rate import measure_disk_rate

_FILL_TOKENS = 2048
_SAMPLE_BYTES = 2**28


def main() -> None:
    """All growing layers of the cache are on disk."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--behind", type=int, required=True, help="Tokens in the cache.")
    arguments.add_argument("--tokens", type=int, default=5, help="Tokens decoded and timed, after one that is not.")
    arguments.add_argument("--max-memory", type=int, help="Bytes for weights.")
    arguments.add_argument("--encoded", action="store_true", help="Keep keys and values in eight bits.")
    arguments.add_argument("--pieces", action="store_true", help="Attend to layers in pieces.")
    options = arguments.parse_args()
    memory: dict[int | str, int | str] | None = {"cpu": options.max_memory} if options.max_memory else None
    with AutoModel.from_pretrained(options.model, device="cpu", max_memory=memory, dtype="auto") as model:
        runtime = runtime_of(model)
        layers = runtime.partition.probe.growing_layers
        demand = Demand(options.behind, 64, tiered=layers, encoded=options.encoded, pieces=options.pieces)
        cache: Any = make_cache(runtime, demand)
        fill(cache, model.config, model.dtype, options.behind)
        decode(model, cache)
        steps = [timed(model, cache) for _ in range(options.tokens)]
        disk = measure_disk_rate(options.model, _SAMPLE_BYTES)
    record = {"steps": steps, "disk_rate": disk.median, "file_bytes": cache.text.file_bytes}
    print(json.dumps({**record, "peak_rss_bytes": peak_rss_bytes()}))


def fill(cache: Any, config: Any, dtype: torch.dtype, tokens: int) -> None:
    """Add random states of `tokens` tokens to every layer."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in cache.layers:
        for first in range(0, tokens, _FILL_TOKENS):
            shape = (1, config.num_key_value_heads, min(_FILL_TOKENS, tokens - first), width)
            layer.extend(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def decode(model: Any, cache: Any) -> None:
    """A pass over one token."""
    with torch.no_grad():
        model(torch.tensor([[5]]), use_cache=True, cache=cache)


def timed(model: Any, cache: Any) -> dict[str, float]:
    """A pass: its seconds, the bytes that it read, and those of the cache among them."""
    began, before, cached = time.perf_counter(), read_bytes(), cache.text.bytes_read
    decode(model, cache)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "read_bytes": read_bytes() - before, "cache_bytes": cache.text.bytes_read - cached}


if __name__ == "__main__":
    main()
