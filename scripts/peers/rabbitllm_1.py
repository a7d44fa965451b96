"""RabbitLLM on the CPU: `python -m peers.rabbitllm_1 MODEL_DIR --shards DIR [--supply-rotary]`.

The first load splits the model into DIR. RabbitLLM 1.1.0 passes rotary embeddings to decoded tokens only in its Qwen classes, so
a plain Llama fails at the second token; --supply-rotary gives it the method of the Qwen2 class.
"""

from __future__ import annotations

import json
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rabbitllm import AutoModel  # type: ignore[import-not-found]
from rabbitllm.models.qwen2 import RabbitLLMQWen2  # type: ignore[import-not-found]

from peers.timing import decode_by_generate, parser, run


def read_dtype(folder: Path) -> torch.dtype:
    """The checkpoint's dtype, which RabbitLLM 1.1.0 does not read from every config.json (it then computes in float16)."""
    config = json.loads((folder / "config.json").read_text())
    dtype: torch.dtype = getattr(torch, config.get("dtype") or config["torch_dtype"])
    return dtype


def main() -> None:
    """As in its README, with device="cpu" and the checkpoint's dtype."""
    arguments = parser(__doc__)
    arguments.add_argument("--shards", type=Path, required=True, help="The folder for the split.")
    arguments.add_argument("--supply-rotary", action="store_true", help="Give a Llama the rotary embeddings of the Qwen2 class.")
    options = arguments.parse_args()
    options.shards.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        model = AutoModel.from_pretrained(
            str(options.model),
            device="cpu",
            dtype=read_dtype(options.model),
            layer_shards_saving_path=str(options.shards),
            show_layer_progress=False,
        )
        if options.supply_rotary:
            model.get_pos_emb_args = types.MethodType(RabbitLLMQWen2.get_pos_emb_args, model)
        return model

    run(options, "rabbitllm", version("rabbitllm"), load, decode_by_generate)


if __name__ == "__main__":
    main()
