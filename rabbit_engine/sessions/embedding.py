"""Vectors of texts, from checkpoints that say how: sentence-transformers' files beside the weights.

`modules.json` lists the steps; `1_Pooling/config.json` says how hidden states become one vector.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from rabbit_engine.errors import ConfigurationError

_POOLING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pooling_mode_lasttoken": lambda states: states[-1],
    "pooling_mode_cls_token": lambda states: states[0],
    "pooling_mode_mean_tokens": lambda states: states.mean(dim=0),
    "pooling_mode_max_tokens": lambda states: states.max(dim=0).values,
}


@dataclass(frozen=True, slots=True)
class Embedder:
    """Hidden states [length, width] into a vector [width]."""

    pooling: str
    normalizes: bool

    def embed(self, model: Any, ids: Sequence[int]) -> torch.Tensor:
        """The vector of a text, float32 [width] on the CPU."""
        states = model.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).last_hidden_state
        vector = _POOLING[self.pooling](states[0].float()).cpu()
        return functional.normalize(vector, dim=0) if self.normalizes else vector


def find_embedder(model: Any) -> Embedder | None:
    """How the checkpoint embeds; None where it does not say that it does. Raises ConfigurationError for a way unknown here."""
    folder = Path(model._prepared.repo.folder)
    steps = _read(folder / "modules.json")
    kinds = [str(step.get("type", "")).rpartition(".")[2] for step in steps] if isinstance(steps, list) else []
    if not kinds:
        return None
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise ConfigurationError(f"this model embeds in steps that are unknown here: {', '.join(sorted(unknown))}")
    where = next((str(step.get("path", "")) for step in steps if str(step.get("type", "")).endswith("Pooling")), "1_Pooling")
    config = _read(folder / where / "config.json") or {}
    modes = [name for name, chosen in config.items() if name.startswith("pooling_mode_") and chosen is True]
    named = config.get("pooling_mode")
    if isinstance(named, str):  # the newer files name it
        modes = [f"pooling_mode_{ {'lasttoken': 'lasttoken', 'cls': 'cls_token'}.get(named, f'{named}_tokens') }"]
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise ConfigurationError(f"this model pools in a way that is unknown here: {', '.join(modes) or 'none is named'}")
    return Embedder(modes[0], "Normalize" in kinds)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
