"""Embeds texts as the checkpoint defines it, in sentence-transformers' files next to the weights.

`modules.json` lists the steps; `1_Pooling/config.json` defines how hidden states become one vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError, first_line
from rabbit_engine.storage.directio import damage_as, disk_errors, open_unchanged
from rabbit_engine.storage.jsonvalues import Fields, file_name, parse

_POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pooling_mode_lasttoken": lambda states: states[-1],
    "pooling_mode_cls_token": lambda states: states[0],
    "pooling_mode_mean_tokens": lambda states: states.mean(dim=0),
    "pooling_mode_max_tokens": lambda states: states.max(dim=0).values,
}


class EmbeddingModel(Protocol):
    """A model whose base returns hidden states."""

    @property
    def base_model(self) -> nn.Module:
        """Token ids [texts, length] into `last_hidden_state` [texts, length, width]."""

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""


@dataclass(frozen=True, slots=True)
class Embedder:
    """Hidden states [length, width] into a vector [width]."""

    pooling: str
    normalizes: bool

    def embed(self, model: EmbeddingModel, ids: Sequence[int]) -> torch.Tensor:
        """The vector of a text, float32 [width] on the CPU."""
        states = model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).last_hidden_state
        vector = _POOLING[self.pooling](states[0].float()).cpu()
        return functional.normalize(vector, dim=0) if self.normalizes else vector


def find_embedder(folder: Path) -> Embedder | None:
    """The embedder of the checkpoint in `folder`; None if it has no modules.json.

    Raises ConfigurationError for an unsupported step or pooling, DamagedCheckpointError for files that cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    with _parsed(path) as listed:
        steps = {step.text("type").rpartition(".")[2]: step for step in Fields({"steps": listed}).rows("steps")}
        part = file_name(steps["Pooling"].text("path")) if "Pooling" in steps else "1_Pooling"
    unknown = set(steps) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ConfigurationError(f"{path} contains steps that are not supported: {', '.join(sorted(unknown))}")
    return Embedder(_find_pooling(folder / part / "config.json"), "Normalize" in steps) if steps else None


def _find_pooling(path: Path) -> str:
    with _parsed(path) as listed:
        config = Fields.of(listed)
        modes = [key for key in config.values if key.startswith("pooling_mode_") and config.flag(key)]
        named = config.optional_text("pooling_mode")
    if named is not None:  # newer files name it
        modes = [f"pooling_mode_{ {'lasttoken': 'lasttoken', 'cls': 'cls_token'}.get(named, f'{named}_tokens') }"]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ConfigurationError(f"{path} has a pooling that is not supported: {', '.join(modes) or 'none is named'}")
    return modes[0]


@contextmanager
def _parsed(path: Path) -> Iterator[Any]:
    """The JSON of a file; an error in it or in its values names the file."""
    try:
        with damage_as(DamagedCheckpointError), open_unchanged(path, None) as file, disk_errors(path):
            raw = file.read()
        yield parse(raw)
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): download it again") from error
