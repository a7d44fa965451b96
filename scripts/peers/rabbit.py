"""rabbit_engine on the CPU: `python -m peers.rabbit MODEL_DIR [--max-memory BYTES]`."""

from __future__ import annotations

from typing import Any

import rabbit_engine
from peers.timing import decode_by_generate, parser, run
from rabbit_engine import AutoModel


def main() -> None:
    """Without --max-memory the engine uses the free memory."""
    arguments = parser(__doc__)
    arguments.add_argument("--max-memory", type=int, help="Bytes for weights.")
    options = arguments.parse_args()
    max_memory: dict[int | str, int | str] | None = {"cpu": options.max_memory} if options.max_memory else None

    def load() -> Any:
        return AutoModel.from_pretrained(options.model, device="cpu", max_memory=max_memory)

    run(options, "rabbit_engine", rabbit_engine.__version__, load, decode_by_generate)


if __name__ == "__main__":
    main()
