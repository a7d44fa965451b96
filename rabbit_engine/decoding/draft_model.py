"""Models as drafts: another, smaller one with the same tokenizer, or a compressed copy of the model itself."""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from rabbit_engine.config import CompressionConfig
from rabbit_engine.decoding.draft import Drafter, TargetModel, check_nodes
from rabbit_engine.decoding.draft_context import Context, Predictor, TreeContext, find_context
from rabbit_engine.decoding.model_drafter import ModelDrafter, Reach, RoundCosts
from rabbit_engine.decoding.vocabulary import Vocabulary, require_same_tokens, require_similar_size
from rabbit_engine.errors import ConfigurationError, DraftError, TokenizerNotFoundError
from rabbit_engine.planning.plan import Plan
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)


class ModelDraft(ABC):
    """A draft that is a model. One serves all texts of a model.

    `nodes` fixes the number of guesses in each tree; None measures how many pay. Guesses are weighed by the model's
    probabilities at `temperature`.
    """

    def __init__(self, model: PreTrainedModel | None, nodes: int | None, temperature: float) -> None:
        check_nodes(nodes)
        if not temperature > 0:
            raise ConfigurationError(f"temperature={temperature!r} is not a number above 0")
        self._model: Any = model
        self._is_named = model is None
        self._nodes, self._temperature = nodes, temperature
        self._lock = threading.Lock()
        self._target = ""
        self._new_context: Callable[[], Context] | None = None
        self._reach = Reach(math.inf, trees=False, temperature=temperature)
        self._costs = RoundCosts()
        self._nbytes = 0

    @property
    @abstractmethod
    def name(self) -> str:
        """See `Draft`."""

    @property
    def nodes(self) -> int | None:
        """See `Draft`."""
        return self._nodes

    @property
    def nbytes(self) -> int:
        """See `Draft`; 0 until it is attached, and on another device than the model's."""
        return self._nbytes

    def attach(self, target: TargetModel) -> None:
        """Load the model if need be, and check that it can guess for `target`.

        Raises DraftError if it cannot be loaded, for another tokenizer, too little memory, or a class that cannot go back
        after guesses.
        """
        with self._lock:
            if self._new_context is not None and self._target == target.name_or_path and not self._is_closed:
                return
            if self._model is None or (self._is_named and self._is_closed):
                self._model = self._load(target)
            if self._model.training:
                raise DraftError(f"the {self.name} is in training mode, where dropout draws random numbers: call its eval()")
            self._require_same_tokens(target)
            predictor = Predictor(self._model, target.config.get_text_config().vocab_size)
            kind = find_context(predictor, self.name)
            self._reach = Reach(_positions(self._model), kind is TreeContext, self._temperature)
            self._nbytes = _nbytes(self._model) if _same_device(self._model.device, target.device) else 0
            self._new_context, self._target = lambda: kind(predictor), target.name_or_path

    def start(self) -> Drafter:
        """See `Draft`. Raises DraftError before `attach`."""
        if self._new_context is None:
            raise DraftError(f"the {self.name} is not attached to a model: pass it as speculate=")
        if self._is_closed:
            raise DraftError(f"the {self.name} was closed, with the model it was loaded for: give this one a draft of its own")
        return ModelDrafter(self._new_context(), self._reach, self._costs)

    @property
    def _is_closed(self) -> bool:
        """Whether the model was closed: one that is loaded by name is closed with the model that it guesses for."""
        return bool(getattr(self._model, "is_closed", False))

    @abstractmethod
    def _load(self, target: TargetModel) -> PreTrainedModel:
        """The model that guesses for `target`."""

    def _require_same_tokens(self, target: TargetModel) -> None:
        """Raise DraftError unless both models have the same tokens, as far as is known."""
        ours, theirs = _vocabulary_of(self._model), _vocabulary_of(target)
        if ours is not None and theirs is not None:
            require_same_tokens(ours, theirs, self.name, target.name_or_path)
            return
        size, other = (config.get_text_config().vocab_size for config in (self._model.config, target.config))
        require_similar_size(size, other, self.name, target.name_or_path)
        logger.info("%s and %s are not known to have the same tokenizer: only the sizes match", self.name, target.name_or_path)


class DraftModel(ModelDraft):
    """A draft that is another model: a folder, a repo id, or a loaded causal language model, of transformers or streamed.

    One that is named is loaded whole into memory when it is first used, with weights in `compression` ("4bit", "8bit") if that
    is given. See `ModelDraft` for the others.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        nodes: int | None = None,
        compression: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        named = isinstance(model, str | Path)
        if not named and not hasattr(model, "generate"):
            kind = type(model).__name__
            raise ConfigurationError(f"DraftModel takes a folder, a repo id or a causal language model, not a {kind}")
        if not named and compression is not None:
            raise ConfigurationError(f"compression={compression!r} is for models that are loaded by name: leave it out")
        _check_compression(compression)
        super().__init__(None if isinstance(model, str | Path) else model, nodes, temperature)
        self.place = model if isinstance(model, str | Path) else model.name_or_path
        self.compression = compression

    @property
    def name(self) -> str:
        """See `Draft`."""
        return f"draft {Path(str(self.place)).name or type(self._model).__name__}"

    def _load(self, target: TargetModel) -> PreTrainedModel:
        """See `ModelDraft`."""
        return target.load_draft(self.place, self.compression)


class SelfDraft(ModelDraft):
    """A draft that is a compressed copy of the model itself, whole in memory: no second model is needed.

    The copy is in shards of its own next to the checkpoint, as `compression` ("4bit", "8bit") makes them; without any they
    are made on first use. See `ModelDraft` for the others.
    """

    def __init__(self, compression: str = "4bit", *, nodes: int | None = None, temperature: float = 1.0) -> None:
        _check_compression(compression)
        super().__init__(None, nodes, temperature)
        self.compression = compression

    @property
    def name(self) -> str:
        """See `Draft`."""
        return f"{self.compression} draft"

    def _load(self, target: TargetModel) -> PreTrainedModel:
        """See `ModelDraft`."""
        return target.load_draft(None, self.compression)

    def _require_same_tokens(self, target: TargetModel) -> None:
        """See `ModelDraft`: they are the target's own."""


def _check_compression(compression: str | None) -> None:
    """Raise ConfigurationError for one that is not known."""
    if compression is not None:
        CompressionConfig(method=compression)


def _vocabulary_of(model: Any) -> Vocabulary | None:
    """Of the model's tokenizer, or of the one next to its files on this machine; None if there is none."""
    try:
        found = getattr(model, "tokenizer", None) or AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (TokenizerNotFoundError, OSError, ValueError, KeyError):
        return None
    return found if isinstance(found, Vocabulary) else None


def _positions(model: PreTrainedModel) -> float:
    """The longest text that the model was made for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) else math.inf


def _nbytes(model: Any) -> int:
    """Memory of the model: what a streamed one claims, with the caches of texts it was asked to reserve, else its weights."""
    plan = getattr(model, "plan", None)
    if not isinstance(plan, Plan):
        return int(model.get_memory_footprint())
    if plan.pass_bytes:
        read = format_bytes(plan.pass_bytes)
        logger.warning("the draft %s reads %s from disk for each guess: load it with more memory", model.name_or_path, read)
    return claimed_bytes(plan)


def claimed_bytes(plan: Plan) -> int:
    """Memory of the device that a streamed draft takes, with the caches of texts that it was asked to reserve."""
    return plan.device_bytes + (0 if plan.budget.reserved_by_default else plan.reserved_bytes)


def _same_device(first: torch.device, second: torch.device) -> bool:
    return (first.type, first.index or 0) == (second.type, second.index or 0)
