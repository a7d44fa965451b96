"""The first token after a long prompt: `python -m peers.long_prompt MODEL --tokens N [--engine rabbit|transformers|offloaded]`.

Prints JSON: seconds to the first token, the growth of resident memory while it was computed, the parts, the layers of the
cache on disk, and the token. "offloaded" is transformers with its weights on disk; `cache_implementation="offloaded"` needs CUDA.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from rabbit_engine import AutoModel
from rabbit_engine.model.tiered_caches import make_cache
from rabbit_engine.planning.demand import Demand
from rabbit_engine.streaming.parts import run_in_parts


def main() -> None:
    """Run one engine once."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--tokens", type=int, required=True)
    arguments.add_argument("--engine", choices=["rabbit", "transformers", "offloaded"], default="rabbit")
    arguments.add_argument("--offload-mb", type=int, default=30, help='Memory for weights of the engine "offloaded".')
    options = arguments.parse_args()
    parts: list[int] = []
    tiered: list[int] = []
    model = load(options.model, options, parts, tiered)
    ids = torch.randint(5, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.generate(ids[:, :16], max_new_tokens=2, do_sample=False, pad_token_id=0)  # kernels are compiled
        before, began = peak_bytes(), time.perf_counter()
        found = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    seconds, grown = time.perf_counter() - began, peak_bytes() - before
    how = {"parts": parts, "tiered": tiered[-1] if tiered else 0}
    print(json.dumps({"seconds": seconds, "grown_bytes": grown, **how, "token": int(found[0, -1])}))


def load(folder: Path, options: argparse.Namespace, parts: list[int], tiered: list[int]) -> Any:
    """The model; `parts` counts what it computes in parts, `tiered` the layers of each cache that are on disk."""
    if options.engine == "offloaded":
        offload: dict[str, Any] = {
            "device_map": "auto",
            "max_memory": {"cpu": options.offload_mb * 10**6},
            "offload_folder": str(folder / "offload"),
        }
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **offload).eval()
    if options.engine == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    run, make = run_in_parts, make_cache

    def counted(source: Any, works: Any, *rest: Any) -> None:
        parts.append(len(works))
        run(source, works, *rest)

    def noted(runtime: Any, demand: Demand) -> Any:
        tiered.append(demand.tiered)
        return make(runtime, demand)

    mock.patch("rabbit_engine.model.long_prompts.run_in_parts", counted).start()
    mock.patch("rabbit_engine.model.mixin.make_cache", noted).start()
    return AutoModel.from_pretrained(folder, device="cpu", max_seq_len=options.tokens + 1)


def peak_bytes() -> int:
    """The most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
