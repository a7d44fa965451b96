"""Embeds texts as the checkpoint defines it, in sentence-transformers' files next to the weights.

`modules.json` lists the steps, `1_Pooling/config.json` how hidden states become one vector, `sentence_bert_config.json` the
longest text, and `config_sentence_transformers.json` the prompts that go before a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError, first_line
from rabbit_engine.storage.directio import damage_as, disk_errors, open_unchanged
from rabbit_engine.storage.jsonvalues import Fields, file_name, parse
from rabbit_engine.tasks.batches import Batch
from rabbit_engine.tasks.heads import base_of
from rabbit_engine.transformers_bridge.forwards import no_cache_argument


def _mean(states: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    weighted = mask if weights is None else mask * weights
    return (states * weighted[..., None]).sum(dim=1) / weighted.sum(dim=1, keepdim=True)


def _mean_by_root(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).sqrt()


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), mask.long().sum(dim=1) - 1]


_POOLINGS: Mapping[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = MappingProxyType(
    {  # in the order in which sentence-transformers joins several
        "cls": ("pooling_mode_cls_token", lambda states, _: states[:, 0]),
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
    """Hidden states into vectors: the `poolings`, joined if they are several, then normalized if it `normalizes`.

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

    def changed(self, pooling: str | None, normalize: bool | None) -> Embedder:
        """The same with another pooling, or with or without normalizing. Raises ConfigurationError for an unknown pooling."""
        if pooling is not None and pooling not in _POOLINGS:
            raise ConfigurationError(f"pooling={pooling!r}: expected one of {', '.join(_POOLINGS)}")
        poolings = self.poolings if pooling is None else (pooling,)
        return replace(self, poolings=poolings, normalizes=self.normalizes if normalize is None else normalize)

    def prompted(self, text: str, prompt: str | None) -> str:
        """The text after its prompt: a name among `prompts`, or the prompt itself; None is the checkpoint's default.

        Raises ConfigurationError for a word that is not among the names, or where the vector leaves out the prompt.
        """
        named = self.default_prompt if prompt is None else prompt
        if named is not None and named.isidentifier() and named not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ConfigurationError(f"the checkpoint has no prompt named {named!r}; its prompts are: {known}")
        before = "" if named is None else self.prompts.get(named, named)
        if before and not self.counts_prompt:
            raise ConfigurationError("the checkpoint's pooling leaves out the prompt (include_prompt), which is not supported")
        whole = before + text
        return whole.lower() if self.lowercases else whole

    def pool(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [texts, length, width] and their mask [texts, length], padded on the right, into float32
        [texts, width], not normalized yet."""
        states, mask = states.float(), mask.float()
        found = [_POOLINGS[name][1](states, mask) for name in self.poolings]
        return torch.cat(found, dim=-1).cpu()

    def finish(self, vectors: torch.Tensor, dimensions: int | None = None) -> torch.Tensor:
        """The first `dimensions` of [texts, width], normalized if it does: for models trained for it (Kusupati et al.,
        Matryoshka Representation Learning, 2022). Raises ConfigurationError for more than there are."""
        if dimensions is not None and not 0 < dimensions <= vectors.shape[-1]:
            raise ConfigurationError(f"dimensions={dimensions}: the model's vectors have {vectors.shape[-1]}")
        vectors = vectors[..., :dimensions]
        return functional.normalize(vectors, dim=-1) if self.normalizes else vectors


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
    if not steps:
        return None
    embedder = replace(_read_pooling(folder / part / "config.json"), normalizes="Normalize" in steps)
    return _with_length(_with_prompts(embedder, folder), folder)


def _read_pooling(path: Path) -> Embedder:
    with _parsed(path) as listed:
        config = Fields.of(listed)
        modes = {key for key in config.values if key.startswith("pooling_mode_") and config.flag(key)}
        named = config.values.get("pooling_mode")  # in newer files
        listed_names = config.items("pooling_mode") if isinstance(named, list) else [config.optional_text("pooling_mode")]
        counts_prompt = config.flag("include_prompt") if "include_prompt" in config.values else True
    known = [name for name, (key, _) in _POOLINGS.items() if key in modes]
    unknown = sorted(modes - {key for key, _ in _POOLINGS.values()})
    found = [str(name) for name in listed_names if name is not None] or [*known, *unknown]
    if not found or not set(found) <= set(_POOLINGS):
        raise ConfigurationError(f"{path} has a pooling that is not supported: {', '.join(found) or 'none is named'}")
    return Embedder(tuple(found), counts_prompt=counts_prompt)


def _with_prompts(embedder: Embedder, folder: Path) -> Embedder:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return embedder
    with _parsed(path) as listed:
        config = Fields.of(listed)
        prompts = config.texts("prompts") if config.values.get("prompts") else {}
        default = config.optional_text("default_prompt_name")
        if default is not None and default not in prompts:
            raise ValueError(f"default_prompt_name is {default!r}, which is not among the prompts")
    return replace(embedder, prompts=prompts, default_prompt=default)


def _with_length(embedder: Embedder, folder: Path) -> Embedder:
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return embedder
    with _parsed(path) as listed:
        config = Fields.of(listed)
        most = config.count("max_seq_length") if config.values.get("max_seq_length") is not None else None
        lowercases = config.flag("do_lower_case") if "do_lower_case" in config.values else False
    return replace(embedder, most_tokens=most, lowercases=lowercases)


@contextmanager
def _parsed(path: Path) -> Iterator[Any]:
    """The JSON of a file; an error in it or in its values names the file."""
    try:
        with damage_as(DamagedCheckpointError), open_unchanged(path, None) as file, disk_errors(path):
            raw = file.read()
        yield parse(raw)
    except ValueError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({first_line(error)}): download it again") from error
