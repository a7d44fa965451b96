"""The generation config of a model: that of its checkpoint's folder, or one that the caller gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from rabbit_engine.architectures import require_generation_config
from rabbit_engine.checkpoints import Streamable
from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError, first_line
from rabbit_engine.transformers_bridge.generation import read_generation_config
from rabbit_engine.utils.foreign import foreign_code


def set_own_generation_config(model: Any, checkpoint: Streamable) -> None:
    """Set that of the checkpoint's folder, with the ends of its chat template. Raises DamagedCheckpointError."""
    folder, trusts_code = str(checkpoint.repo.folder), checkpoint.request.source.trust_remote_code
    require_generation_config(Path(folder), getattr(model.config.get_text_config(), "vocab_size", None))
    told = f"{folder}/generation_config.json cannot be used"
    with foreign_code(lambda error: DamagedCheckpointError(f"{told}: {first_line(error)}")):
        read_generation_config(model, folder, trust_remote_code=trusts_code)
        _drop_empty(model.generation_config)
    _end_at(model.generation_config, checkpoint.architecture.chat_ends)


def set_generation_config(model: Any, generation_config: Any) -> None:
    """Set a copy of the caller's. Raises ConfigurationError."""
    if not isinstance(generation_config, GenerationConfig):
        raise ConfigurationError(f"generation_config={generation_config!r} is not a transformers GenerationConfig")
    model.generation_config = GenerationConfig.from_dict(generation_config.to_dict())
    _drop_empty(model.generation_config)


def _drop_empty(generation_config: Any) -> None:
    """Drop empty lists: `generate` rejects them, or fails."""
    for name in ("stop_strings", "bad_words_ids", "sequence_bias", "eos_token_id"):
        value = getattr(generation_config, name, None)
        if isinstance(value, list | dict | str) and not value:
            setattr(generation_config, name, None)


def _end_at(generation_config: Any, tokens: tuple[int, ...]) -> None:
    """Let an answer also end at `tokens`."""
    eos = generation_config.eos_token_id
    known = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokens:
        generation_config.eos_token_id = list(dict.fromkeys([*known, *tokens]))
