"""The first token after a long prompt with llama.cpp: `python -m peers.long_prompt_llama FILE.gguf --tokens N --vocabulary V`.

Prints the JSON of peers.long_prompt. Needs xllamacpp, a build of llama.cpp as a wheel; its cache is in float16 by default.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import xllamacpp  # type: ignore[import-not-found, unused-ignore]

from peers.timing import peak_rss_bytes


def main() -> None:
    """One prompt in one context with just enough room."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--tokens", type=int, required=True)
    arguments.add_argument("--vocabulary", type=int, required=True, help="The number of token ids.")
    options = arguments.parse_args()
    ids = torch.randint(5, options.vocabulary, (options.tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    server = xllamacpp.Server(parameters(options.model, options.tokens))
    complete(server, ids[:16])
    before, began = peak_rss_bytes(), time.perf_counter()
    found = complete(server, ids)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "grown_bytes": peak_rss_bytes() - before, "parts": [], "tiered": 0, "token": found}))


def parameters(model: Path, tokens: int) -> Any:
    """One thread per core, one text, nothing kept of earlier ones."""
    found = xllamacpp.CommonParams()
    found.model.path = str(model)
    found.n_ctx, found.n_parallel, found.warmup = tokens + 64, 1, False
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    return found


def complete(server: Any, ids: list[int]) -> str:
    """The greedy token after `ids`, as text. Raises RuntimeError with what the server says."""
    asked = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return str(answer["choices"][0]["text"])


if __name__ == "__main__":
    main()
