"""Compares lm-evaluation-harness on a streamed model and on the same one in memory: exit code 1 if any answer differs.

python scripts/check_lm_eval.py MODEL [MAX_MEMORY]     needs `pip install lm-eval`, and memory for twice MODEL.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoModelForCausalLM

from rabbit_engine import AutoModel

CHOICES = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London"),
    ("2 + 2 =", " 4"),
    ("Water boils at", " 100 degrees"),
]


def answers(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    """Likelihoods of the choices, text until a full stop, and the likelihood of a whole text, as the harness requests them."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)

    def ask(kind: str, *requests: tuple[Any, ...]) -> Any:
        return getattr(lm, kind)([Instance(kind, {}, one, index) for index, one in enumerate(requests)], disable_tqdm=True)

    written = ask("generate_until", (CHOICES[0][0], {"until": ["."], "max_gen_toks": 8}))
    return ask("loglikelihood", *CHOICES), written, ask("loglikelihood_rolling", ("Rabbits eat grass and run.",))


def main(model: str, max_memory: str = "150MB") -> None:
    """Compare, and print both if they differ."""
    with AutoModel.from_pretrained(model, device="cpu", max_memory={"cpu": max_memory}) as streamed:
        got = answers(streamed, streamed.tokenizer)
        want = answers(AutoModelForCausalLM.from_pretrained(model), streamed.tokenizer)
    print(f"streamed {got}\nin memory {want}\n{'equal' if got == want else 'NOT EQUAL'}")
    sys.exit(got != want)


if __name__ == "__main__":
    main(*sys.argv[1:])
