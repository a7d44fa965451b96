"""rabbit_engine on the CPU: `python -m peers.rabbit MODEL [--max-memory BYTES] [--compression 4bit --shards DIR]`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import rabbit_engine
from peers.timing import decode_by_generate, parser, run
from rabbit_engine import AutoModel, DraftModel, Lookup, Merged, SelfDraft
from rabbit_engine.cli import main as split
from rabbit_engine.decoding import Draft


def prepare(model: Path, compression: str, shards: str) -> None:
    """Make the shards. Loading might leave the compression out, where it gains nothing. Raises SystemExit if that fails."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            split(["split", str(model), "--compression", compression, "--saving-path", shards])
        except SystemExit as end:
            if end.code:
                raise
    print("{}")


def draft_of(names: list[str]) -> Draft | None:
    """One draft of those named."""
    drafts = [Lookup() if name == "lookup" else SelfDraft() if name == "4bit" else DraftModel(name) for name in names]
    return Merged(*drafts) if len(drafts) > 1 else next(iter(drafts), None)


def main() -> None:
    """Without --max-memory the engine uses the free memory."""
    arguments = parser(__doc__, "the model's folder, or a GGUF file")
    arguments.add_argument("--max-memory", type=int, help="Bytes for weights.")
    arguments.add_argument("--compression", help="How shards store the weights; by default the model's files are streamed.")
    arguments.add_argument("--shards", help="Where they are.")
    arguments.add_argument("--fused-products", action="store_true", help="Multiply few rows by weights as they are stored.")
    arguments.add_argument("--draft", action="append", help='Guesses tokens: "lookup", "4bit" or a folder. May be repeated.')
    options = arguments.parse_args()
    if options.prepare and options.compression:
        prepare(options.model, options.compression, options.shards)
        return
    max_memory: dict[int | str, int | str] | None = {"cpu": options.max_memory} if options.max_memory else None

    def load() -> Any:
        return AutoModel.from_pretrained(
            options.model,
            device="cpu",
            max_memory=max_memory,
            compression=options.compression,
            layer_shards_saving_path=options.shards,
            fused_products=options.fused_products or None,
            dtype="bfloat16",
            speculate=draft_of(options.draft or []),
        )

    run(options, "rabbit_engine", rabbit_engine.__version__, load, decode_by_generate)


if __name__ == "__main__":
    main()
