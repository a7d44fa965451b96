"""transformers' disk offload on the CPU: `python -m peers.transformers_offload MODEL_DIR [--resident-bytes N]`.

accelerate fills N bytes of memory, less the largest layer, with modules and leaves the rest in the checkpoint's own files.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM

from peers.timing import decode_by_generate, parser, run


def main() -> None:
    """Raises SystemExit if the offload copied weights: this measures offloading in place."""
    arguments = parser(__doc__)
    arguments.add_argument("--resident-bytes", type=int, default=1_000_000_000, help="max_memory for the CPU.")
    arguments.add_argument("--assistant", help='Guesses tokens: "lookup" in the prompt, or a folder.')
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as offload_folder:

        def load() -> Any:
            model = AutoModelForCausalLM.from_pretrained(
                options.model,
                dtype="auto",
                device_map="auto",
                max_memory={"cpu": options.resident_bytes},
                offload_folder=offload_folder,
            )
            if copies := [path for path in Path(offload_folder).rglob("*") if path.suffix in (".dat", ".safetensors")]:
                raise SystemExit(f"the offload wrote {len(copies)} files of weights instead of reading the checkpoint")
            return model

        run(
            options,
            "transformers",
            transformers.__version__,
            load,
            partial(decode_by_generate, **assistant_of(options.assistant)),
        )


def assistant_of(name: str | None) -> dict[str, Any]:
    """The keywords of `generate`."""
    if name is None:
        return {}
    if name == "lookup":
        return {"prompt_lookup_num_tokens": 10}
    return {"assistant_model": AutoModelForCausalLM.from_pretrained(name, dtype="auto")}


if __name__ == "__main__":
    main()
