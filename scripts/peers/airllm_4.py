"""AirLLM on the CPU: `python -m peers.airllm_4 MODEL_DIR --shards DIR [--compression 4bit]`. The first load splits the model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from airllm import AutoModel  # type: ignore[import-not-found]

from peers.timing import decode_by_generate, parser, run


def main() -> None:
    """As in its README, with device="cpu"."""
    arguments = parser(__doc__)
    arguments.add_argument("--shards", type=Path, required=True, help="The folder for the split.")
    arguments.add_argument("--compression", help="4bit or 8bit, made by bitsandbytes.")
    options = arguments.parse_args()
    options.shards.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        return AutoModel.from_pretrained(
            str(options.model),
            device="cpu",
            layer_shards_saving_path=str(options.shards),
            compression=options.compression,
        )

    run(options, "airllm", version("airllm"), load, decode_by_generate)


if __name__ == "__main__":
    main()
