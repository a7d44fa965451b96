"""transformers with bitsandbytes, quantised to nf4 at load: `python -m peers.transformers_bnb MODEL_DIR`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peers.timing import decode_by_generate, parser, run


def main() -> None:
    """The whole model in memory: nf4 linear layers, the head and the embedding in bfloat16."""
    options = parser(__doc__).parse_args()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.bfloat16, device_map="cpu", quantization_config=nf4
        )

    run(options, "transformers with bitsandbytes", transformers.__version__, load, decode_by_generate)


if __name__ == "__main__":
    main()
