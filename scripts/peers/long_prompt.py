"""The first token after a long prompt: `python -m peers.long_prompt MODEL --tokens N [--engine rabbit | transformers]`.

Prints JSON: seconds to the first token, the growth of resident memory while it was computed, the parts, and the token.
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
from rabbit_engine.streaming.parts import run_in_parts


def main() -> None:
    """Run one engine once."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", type=Path)
    arguments.add_argument("--tokens", type=int, required=True)
    arguments.add_argument("--engine", choices=["rabbit", "transformers"], default="rabbit")
    options = arguments.parse_args()
    parts: list[int] = []
    model = load(options.model, options.engine, options.tokens, parts)
    ids = torch.randint(5, model.config.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.generate(ids[:, :16], max_new_tokens=2, do_sample=False, pad_token_id=0)  # kernels are compiled
        before, began = peak_bytes(), time.perf_counter()
        found = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    seconds, grown = time.perf_counter() - began, peak_bytes() - before
    print(json.dumps({"seconds": seconds, "grown_bytes": grown, "parts": parts, "token": int(found[0, -1])}))


def load(folder: Path, engine: str, tokens: int, parts: list[int]) -> Any:
    """The model; what it computes in parts is counted in `parts`."""
    if engine == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    run = run_in_parts

    def counted(source: Any, works: Any, layer_of: Any) -> None:
        parts.append(len(works))
        run(source, works, layer_of)

    mock.patch("rabbit_engine.model.long_prompts.run_in_parts", counted).start()
    return AutoModel.from_pretrained(folder, device="cpu", max_seq_len=tokens + 1)


def peak_bytes() -> int:
    """The most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
