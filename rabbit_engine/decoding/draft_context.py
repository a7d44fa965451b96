"""A draft model's states of one text: what it has read, and the guesses behind it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from rabbit_engine.decoding.verification import additive, mask_kinds
from rabbit_engine.errors import DraftError, first_line
from rabbit_engine.transformers_bridge.caches import (
    States,
    ability_of,
    copy_states,
    crop,
    keep,
    record_past,
    restore_states,
    windows_of,
)
from rabbit_engine.transformers_bridge.tiered_layers import recorded_keys

_RAISED = (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError)
"""What a class may raise for a mask or a cache that it does not know."""


class Predictor:
    """A causal language model that predicts the tokens below `vocabulary`, one text at a time."""

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        self.config = model.config
        self.dtype = model.dtype
        self._model = model
        self._vocabulary = vocabulary
        self._tokens: int = model.config.get_text_config().vocab_size
        takes = inspect.signature(model.forward).parameters
        self._keeps_last = "logits_to_keep" in takes
        self._cache_name = "cache" if "cache" in takes else "past_key_values"

    def __call__(self, cache: Cache, tokens: Sequence[int], *, last: bool, **keywords: Any) -> torch.Tensor:
        """The logits [tokens, vocabulary] after each of `tokens`, which follow those in `cache`; of the `last` alone [1, ...]."""
        if last and self._keeps_last:
            keywords["logits_to_keep"] = 1
        ids = torch.tensor([tokens], device=self._model.device).clamp_(max=self._tokens - 1)
        moved = {name: self._on_device(value) for name, value in keywords.items()} | {self._cache_name: cache}
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=True, **moved).logits[0]
        return (logits[-1:] if last else logits)[:, : self._vocabulary]

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._on_device(each) for name, each in value.items()}
        return value.to(self._model.device) if isinstance(value, torch.Tensor) else value


class Context(ABC):
    """One text's states. Guesses are numbered in the order in which they are made, from 0 again after each `settle`."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._cache = DynamicCache(config=predictor.config)
        self._guesses = 0
        self.past = 0
        """Tokens of the text that were read."""

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read what follows in the text; returns the logits [1, vocabulary] after it."""
        logits = self._predictor(self._cache, tokens, last=True)
        self.past += len(tokens)
        self._have_read()
        return logits

    def guess(self, tokens: Sequence[int], lines: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits [tokens, vocabulary] after guesses, each of which follows the earlier guesses of its line."""
        logits = self._after(tokens, lines)
        self._guesses += len(tokens)
        return logits

    def why_not(self) -> str:
        """Why the cache does not allow it, after a reading; empty if it does."""
        return "its cache cannot drop guesses" if ability_of(self._cache) == "none" else ""

    def settle(self, line: Sequence[int]) -> None:
        """The guesses of `line` are now text, as far as the cache can keep them, which `past` says; forget the others."""
        if self._guesses:
            self.past += self._keep(line)
            self._guesses = 0

    @abstractmethod
    def _after(self, tokens: Sequence[int], lines: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `guess`."""

    @abstractmethod
    def _keep(self, line: Sequence[int]) -> int:
        """Settle the cache; the number of tokens that it kept."""

    @abstractmethod
    def _have_read(self) -> None:
        """The cache holds the text so far, and need not go back before it."""


class TreeContext(Context):
    """Any tree of guesses: a mask [1, 1, guesses, keys] says which each of them sees."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor)
        record_past(self._cache)
        self._kinds_of_layers = getattr(predictor.config.get_text_config(), "layer_types", None)
        self._depths: list[int] = []

    def why_not(self) -> str:
        """See `Context`."""
        if ability_of(self._cache) != "select":
            return "its cache cannot keep chosen guesses"
        return "its attention is chunked" if "chunked_attention" in (self._kinds_of_layers or ()) else ""

    def _after(self, tokens: Sequence[int], lines: Sequence[Sequence[int]]) -> torch.Tensor:
        if not self._guesses:
            self._depths = []
        self._depths += map(len, lines)
        depths = torch.tensor([self._depths[-len(lines) :]])
        return self._predictor(
            self._cache, tokens, last=False, attention_mask=self._masks(lines), position_ids=self.past + depths
        )

    def _masks(self, lines: Sequence[Sequence[int]]) -> torch.Tensor | dict[str, torch.Tensor]:
        kinds = mask_kinds(windows_of(self._cache), self._kinds_of_layers)
        masks = {kind: additive(self._visible(lines, window), self._predictor.dtype) for kind, window in kinds.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _visible(self, lines: Sequence[Sequence[int]], window: int | None) -> torch.Tensor:
        """Which keys the newest guesses see: bool [guesses, keys]."""
        kept = self.past if window is None else min(self.past, window - 1)
        seen = torch.zeros(len(lines), kept + len(self._depths), dtype=torch.bool)
        seen[:, :kept] = True
        for row, line in enumerate(lines):
            seen[row, [kept + number for number in (*line, self._guesses + row)]] = True
        if window is not None:
            positions = torch.cat([torch.arange(-kept, 0), torch.tensor(self._depths)])
            seen &= positions[-len(lines) :, None] - positions[None] < window
            seen = seen[:, -recorded_keys(window, len(lines)) :]
        return seen

    def _keep(self, line: Sequence[int]) -> int:
        keep(self._cache, self.past, line)
        return len(line)

    def _have_read(self) -> None:
        crop(self._cache, 0)


class ChainContext(Context):
    """One guess after another, in a cache that goes back to a copy of its states: the text is then read again from there."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor)
        self._before: States | None = None

    def _after(self, tokens: Sequence[int], lines: Sequence[Sequence[int]]) -> torch.Tensor:
        del lines  # each guess follows the last
        if not self._guesses:
            self._before = copy_states(self._cache)
        return self._predictor(self._cache, tokens, last=False)

    def _keep(self, line: Sequence[int]) -> int:
        del line  # its tokens are read again
        if self._before is not None:
            restore_states(self._cache, self._before)
        self._before = None
        return 0

    def _have_read(self) -> None:
        """Nothing was recorded."""


def find_context(predictor: Predictor, name: str) -> Callable[[Predictor], Context]:
    """The context for the model's class, by trying: one for trees, else for chains. Raises DraftError if neither works."""
    reasons = {kind: _why_not(kind, predictor) for kind in (TreeContext, ChainContext)}
    for kind, reason in reasons.items():
        if not reason:
            return kind
    raise DraftError(
        f"{name} cannot guess: after guesses that the text did not take it predicts other tokens than before them "
        f"({reasons[ChainContext]}); take a model with attention in all layers"
    )


def _why_not(kind: type[Context], predictor: Predictor) -> str:
    """Why a context predicts something else after guesses than a new one for the same text; empty if it does not."""
    try:
        return _compare(kind(predictor), kind(predictor))
    except _RAISED as error:
        return first_line(error)


def _compare(used: Context, new: Context) -> str:
    """See `_why_not`. The text takes the guess 4, but not the others."""
    used.read([1, 2])
    if reason := used.why_not():
        return reason
    if isinstance(used, TreeContext):
        used.guess([3, 4], [[], []])
        used.guess([5], [[1]])
        used.settle([1])
    else:
        used.guess([4], [[]])
        used.guess([3], [[0]])
        used.settle([0])
    text = [1, 2, 4, 6]
    found, expected = used.read(text[used.past :]).float(), new.read(text).float()
    difference = (found - expected).square().mean().sqrt() / expected.std()
    return "" if difference < _MOST_DIFFERENCE else f"its logits differ by {difference:.1f} standard deviations"


_MOST_DIFFERENCE = 0.25
"""The root mean square between logits computed with other numbers of rows, in standard deviations: in bfloat16 up to 0.07."""
