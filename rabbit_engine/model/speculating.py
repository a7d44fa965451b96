"""`generate` with several tokens a pass: gives transformers' decoding loop the outputs of `decoding.Speculation`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from rabbit_engine.architectures import recorded_speculation
from rabbit_engine.decoding import (
    Draft,
    Findings,
    Lookup,
    ModelTraits,
    MultiTokenHeads,
    Prior,
    Rule,
    Speculation,
    Speculator,
    why_plain,
)
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.demand import most_rows
from rabbit_engine.streaming import fiber_on
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.generation import DecodingLoop

AUTO = "auto"
"""The draft that the checkpoint or the split brings, else lookup in the text itself."""

_MOST_DRAFTS = 8
"""Drafts of a model whose measurements are kept."""

_CHOOSING = threading.RLock()
"""Threads that generate at once with the same draft share its measurements; attaching a draft may load another model."""

Speculate = Draft | str | None


@dataclass(slots=True)
class _Call:
    """A call of `generate` that asks for speculation; `is_seen` once it decodes token by token."""

    model: object
    speculator: Speculator
    is_seen: bool = False

    def is_of(self, model: object) -> bool:
        """Whether that model was called."""
        return self.model is model


_REQUEST: ContextVar[_Call | None] = ContextVar("speculation_request", default=None)
_RUNNING: ContextVar[tuple[object, Speculation] | None] = ContextVar("running_speculation", default=None)


def parse_speculate(value: object) -> Speculate:
    """The checked value of `speculate`. Raises ConfigurationError."""
    if value is None or (isinstance(value, Draft) and not isinstance(value, type)):
        return value
    if isinstance(value, str):
        if value == AUTO:
            return value
        raise ConfigurationError(f'speculate={value!r} is not known: give "auto", Lookup(), or DraftModel(...) with a model')
    kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
    raise ConfigurationError(f'speculate is {kind}: give None, "auto" or a draft, such as Lookup() or DraftModel(...)')


class SpeculatingMixin:
    """What transformers' decoding loop calls: the model. `decode` runs around the loop, a `watched_preparation` in it."""

    _drafts: dict[int, Speculator]
    _auto: Draft | None = None
    _findings: Findings | None = None
    _shows_states = False
    _speculate: Speculate = None
    """The default of `generate`."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The model's own; while it speculates, also for tokens that the last pass verified."""
        speculation = self._running()
        if speculation is None or args:
            return super().__call__(*args, **keywords)  # type: ignore[misc]
        return speculation.call(super().__call__, keywords)  # type: ignore[misc]

    def _running(self) -> Speculation | None:
        running = _RUNNING.get()
        return running[1] if running is not None and running[0] is self else None

    @functools.cached_property
    def _own_heads(self) -> Draft:
        """What `use_mtp=True` guesses with."""
        return MultiTokenHeads()

    def watch_states(self) -> None:
        """From now on, show the running speculation the last states of each pass."""
        if not self._shows_states:
            self._shows_states = True
            self.get_decoder().register_forward_hook(self._show_states)  # type: ignore[attr-defined]

    def _show_states(self, _module: object, _args: object, output: Any) -> None:
        speculation = self._running()
        if speculation is not None:
            speculation.see(output["last_hidden_state"])

    @contextmanager
    def _speculating(self, speculate: Speculate) -> Iterator[None]:
        """A block in which `generate` speculates with the draft. Raises ConfigurationError or DraftError."""
        request = None if speculate is None else _Call(self, self._speculator_of(self._draft_of(speculate)))
        outer = _REQUEST.set(request), _RUNNING.set(None)  # a processor or criterion of another generation may have called
        try:
            yield
        finally:
            _REQUEST.reset(outer[0])
            _RUNNING.reset(outer[1])
        if request is not None and not request.is_seen:
            request.speculator.tell_plain("beams, assisted generation and other decoding methods of transformers")

    def speculate_by_default(self, speculate: Speculate) -> None:
        """Set what `generate` does if it is not told. Raises DraftError for a draft that cannot guess for this model."""
        if speculate is not None:
            self._speculator_of(self._draft_of(speculate))
        self._speculate = speculate

    def _draft_of(self, speculate: Draft | str) -> Draft:
        """The draft meant by a value of `speculate`."""
        if not isinstance(speculate, str):
            return speculate
        if isinstance(self._speculate, Draft):  # "auto" was settled when the model was loaded
            return self._speculate
        with _CHOOSING:
            if self._auto is None:
                self._auto = Lookup()
            return self._auto

    def _speculator_of(self, draft: Draft) -> Speculator:
        """The measurements with this draft. Raises DraftError if it cannot guess for this model."""
        with _CHOOSING:
            if id(draft) not in self._drafts:
                draft.attach(self)  # type: ignore[arg-type] # mypy does not know the transformers class that is mixed in
                while len(self._drafts) >= _MOST_DRAFTS:
                    del self._drafts[next(iter(self._drafts))]
                self._drafts[id(draft)] = self._new_speculator(draft)
            return self._drafts[id(draft)]

    def _new_speculator(self, draft: Draft) -> Speculator:
        runtime = runtime_of(self)
        config = self.config.get_text_config()  # type: ignore[attr-defined]
        return Speculator(
            draft,
            Rule(draft.nodes, Prior.of(runtime.plan), runtime.transfer.speculation),
            ModelTraits(config, runtime.dtype, str(attention_of(self.config))),  # type: ignore[attr-defined]
            runtime.device,
            runtime.trace,
            lambda: most_rows(runtime.partition.probe, runtime.free_bytes()),
            findings_of(self),
        )


def findings_of(model: SpeculatingMixin) -> Findings:
    """What is known of the model's ways to verify guesses: first from the record, later from trials too."""
    if model._findings is None:
        model._findings = Findings.recorded(recorded_speculation(runtime_of(model).architecture.cls, model.config))  # type: ignore[attr-defined]
    return model._findings


def decode(model: Any, loop: DecodingLoop) -> Any:
    """Run the decoding loop of `generate`, speculating if that was asked for and can be."""
    request = _REQUEST.get()
    if request is None or not request.is_of(model):
        return loop.run()
    request.is_seen = True
    encodes = bool(model.config.is_encoder_decoder)
    plainly = why_plain(loop.config, loop.keywords, texts=len(loop.input_ids), encoder_decoder=encodes)
    if reason := findings_of(model).plain or plainly:
        request.speculator.tell_plain(reason)
        return loop.run()
    speculation = Speculation(request.speculator, loop.input_ids.shape[1], loop.most_tokens, fiber_on(runtime_of(model).binding))
    token = _RUNNING.set((model, speculation))
    try:
        return loop.run()
    finally:
        _RUNNING.reset(token)
        speculation.close(model, cache_is_returned=loop.returns_cache)


def watched_preparation(cls: type) -> Callable[..., Any]:
    """The class's `prepare_inputs_for_generation`, which first shows the text so far to the speculation; unused if that answers.

    It has the signature of the original: `generate` reads in it which keywords the class takes.
    """
    original = cls.prepare_inputs_for_generation  # type: ignore[attr-defined]

    @functools.wraps(original)
    def prepare(self: SpeculatingMixin, input_ids: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        speculation = self._running()
        if speculation is not None and speculation.advance(input_ids):
            return {}
        return original(self, input_ids, *args, **keywords)

    return prepare
