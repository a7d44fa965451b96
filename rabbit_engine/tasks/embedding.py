"""Turns the hidden states of a text into its vector: pooling, and what the checkpoint does to the vector after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.tasks.batches import Batch
from rabbit_engine.tasks.heads import base_of
from rabbit_engine.tasks.steps import Step, normalize
from rabbit_engine.transformers_bridge.forwards import no_cache_argument

_NOT_ZERO = 1e-9
"""Divides the sum of a text without a token to pool."""


def _mean(states: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    weighted = mask if weights is None else mask * weights
    return (states * weighted[..., None]).sum(dim=1) / weighted.sum(dim=1, keepdim=True).clamp(min=_NOT_ZERO)


def _mean_by_root(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=_NOT_ZERO).sqrt()


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), mask.long().argmax(dim=1)]


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, states.shape[1] + 1, device=states.device) * mask
    return states[torch.arange(len(states), device=states.device), places.argmax(dim=1)]


POOLINGS: Mapping[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = MappingProxyType(
    {  # in the order in which sentence-transformers joins several
        "cls": ("pooling_mode_cls_token", _first),
        "max": ("pooling_mode_max_tokens", lambda states, mask: states.masked_fill(mask[..., None] == 0, -1e9).amax(dim=1)),
        "mean": ("pooling_mode_mean_tokens", _mean),
        "mean_sqrt_len_tokens": ("pooling_mode_mean_sqrt_len_tokens", _mean_by_root),
        "weightedmean": (
            "pooling_mode_weightedmean_tokens",
            lambda states, mask: _mean(states, mask, torch.arange(1, states.shape[1] + 1, device=states.device)),
        ),
        "lasttoken": ("pooling_mode_lasttoken", _last),
    }
)


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
    """Hidden states into vectors: the `poolings`, joined if they are several, the `steps`, then normalized if it `normalizes`.

    `prompts` are texts by name that go before a text, `default_prompt` names the one that goes before every text, and
    `most_tokens` is the length that the checkpoint was trained for. It `counts_prompt` unless the vector leaves out the tokens
    of a prompt.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalizes: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    most_tokens: int | None = None
    lowercases: bool = False
    counts_prompt: bool = True
    steps: tuple[Step, ...] = ()

    def changed(self, pooling: str | None, normalize: bool | None) -> Embedder:
        """The same with another pooling, or with or without normalizing. Raises ConfigurationError for an unknown pooling."""
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigurationError(f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}")
        poolings = self.poolings if pooling is None else (pooling,)
        return replace(self, poolings=poolings, normalizes=self.normalizes if normalize is None else normalize)

    def prompt(self, named: str | None) -> str:
        """The prompt before every text: a name among `prompts`, or the prompt itself; None is the checkpoint's default.

        Raises ConfigurationError for a word that is not among the names.
        """
        name = self.default_prompt if named is None else named
        if name is not None and name.isidentifier() and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ConfigurationError(f"the checkpoint has no prompt named {name!r}; its prompts are: {known}")
        return self.spelled("" if name is None else self.prompts.get(name, name))

    def spelled(self, text: str) -> str:
        """A text as the tokenizer should get it."""
        return text.lower() if self.lowercases else text

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [texts, length, width] and their mask [texts, length], padded on the right, into float32
        [texts, width], not normalized yet."""
        states, mask = states.float(), mask.float()
        found = [POOLINGS[name][1](states, mask) for name in self.poolings]
        return torch.cat(found, dim=-1).cpu()

    def finish(self, vectors: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
        """The first `dimensions` of pooled vectors [texts, width] after the steps, normalized if it does: for models trained
        for it (Kusupati et al., Matryoshka Representation Learning, 2022). Raises ConfigurationError for more than there are."""
        if self.steps:
            vectors = torch.cat([self._stepped(row) for row in vectors.split(1)])  # rows of one product round differently
        if dimensions is not None and not 0 < dimensions <= vectors.shape[-1]:
            raise ConfigurationError(f"dimensions={dimensions}: the model's vectors have {vectors.shape[-1]}")
        vectors = vectors[..., :dimensions]
        return normalize(vectors) if self.normalizes else vectors

    def _stepped(self, vectors: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            vectors = step(vectors)
        return vectors


def embedding_base(model: EmbeddingModel) -> nn.Module:
    """The part of a model that computes hidden states: its encoder if it has one; an adapter stays in it."""
    own = base_of(model)
    if getattr(own.config, "is_encoder_decoder", False):
        return own.get_encoder()  # type: ignore[no-any-return]
    return own.base_model  # type: ignore[no-any-return]


def hidden_states(base: nn.Module, batch: Batch) -> torch.Tensor:
    """The last hidden states [texts, length, width] of a batch."""
    arguments = batch.arguments(base.forward)
    return base(**arguments, **no_cache_argument(base.forward)).last_hidden_state  # type: ignore[no-any-return]
