"""What a draft is: a source of guesses for the tokens that follow a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel

from rabbit_engine.decoding.tree import ROOT, Tree
from rabbit_engine.errors import ConfigurationError


def check_nodes(nodes: int | None) -> None:
    """Raises ConfigurationError unless `nodes` can be the fixed size of a tree."""
    if nodes is not None and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1):
        raise ConfigurationError(f"nodes={nodes!r} is not a number of guesses: pass an integer from 1, or None")


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a tree may cost: at most `nodes` nodes, down to `depth`; `token_s` are the seconds that a token takes at present.

    Drafting for another t seconds pays if it adds more than t / `token_s` expected tokens: the sum of its nodes' probabilities.
    """

    nodes: int
    depth: int
    token_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the model made of a tree, which is the one proposed or a part of it.

    `path` are the nodes that the text took, from the root down. Row 0 of `logits` [1 + nodes, vocabulary], in the model's dtype,
    are those after the text, row 1 + i those after node i. `next` is the token that the text took after the path.
    """

    tree: Tree
    path: tuple[int, ...]
    logits: torch.Tensor = field(repr=False)
    next: int

    def row_of(self, node: int) -> torch.Tensor:
        """The logits [vocabulary] after a node, or after ROOT."""
        return self.logits[node - ROOT]


class Heads(Protocol):
    """The multi-token heads of a checkpoint, as a model of their own: see `transformers_bridge.multi_token`."""

    @property
    def config(self) -> PretrainedConfig:
        """Of the heads."""

    @property
    def count(self) -> int:
        """The number of heads."""

    @property
    def nbytes(self) -> int:
        """Memory of the device that they take."""

    @property
    def is_closed(self) -> bool:
        """Whether they were closed, with the model they belong to."""

    def __call__(
        self, tokens: Sequence[int], states: torch.Tensor, cache: Cache, position: int, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the head at `depth` over tokens from that position on, each with the state [tokens, width] before it.

        Returns the logits [1, vocabulary] after the last token, and the head's own states [tokens, width].
        """


class TargetModel(Protocol):
    """The streamed model that verifies guesses, as drafts see it."""

    @property
    def config(self) -> PretrainedConfig:
        """The checkpoint's config, as the class reads it."""

    @property
    def tokenizer(self) -> object:
        """The checkpoint's tokenizer. Raises TokenizerNotFoundError."""

    @property
    def device(self) -> torch.device:
        """The device that computes."""

    @property
    def name_or_path(self) -> str:
        """The name it was loaded by."""

    def load_heads(self) -> Heads:
        """The checkpoint's multi-token heads, streaming; from now on drafters that are `StatesReader` see the model's states.

        Raises DraftError if they cannot be streamed.
        """

    def load_draft(self, name: str | Path | None, compression: str | None) -> PreTrainedModel:
        """A model that guesses for this one, whole in the memory of its device; None names the target's own checkpoint.

        Raises DraftError if there is no such model, or memory is too small for it.
        """


class Drafter(Protocol):
    """Guesses for one text. It must not draw from torch's generators: the text would be another one."""

    def read(self, ids: Sequence[int]) -> None:
        """Take note of the text so far, once before the first `propose`: its seconds are not those of guesses."""

    def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
        """Guesses for what follows `ids`, the prompt and the answer so far."""

    def accepted(self, verdict: Verdict) -> None:
        """Learn what the model made of the last tree. Called once for each tree of which any part was verified."""

    def close(self) -> None:
        """Free what belongs to this text."""


@runtime_checkable
class StatesReader(Protocol):
    """A drafter that reads the model's states."""

    def see(self, states: torch.Tensor) -> None:
        """The last states [tokens, width] of the text's next tokens that a pass computed, up to the newest token but one."""


@runtime_checkable
class Draft(Protocol):
    """A source of guesses for all texts of a model."""

    @property
    def name(self) -> str:
        """What profiles and logs call it."""

    @property
    def nodes(self) -> int | None:
        """The number of nodes of each tree, as the user fixed it; None: as many as pay, measured."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes on the model's device; 0 if not worth naming."""

    def attach(self, target: TargetModel) -> None:
        """Prepare for guessing what `target` says. Raises DraftError if it cannot."""

    def start(self) -> Drafter:
        """Begin a text. Several may be under way."""
