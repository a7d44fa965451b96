"""What was computed of a prefix, kept in memory for the texts that continue it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import DynamicCache

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.tiered_caches import in_shared_blocks, make_shared_cache
from rabbit_engine.planning.demand import Demand, cache_bytes
from rabbit_engine.sessions.answer import Ends
from rabbit_engine.sessions.beginnings import Beginning
from rabbit_engine.sessions.futures import Promise, computing_job
from rabbit_engine.sessions.generation import Generation
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.prompts import Prompt
from rabbit_engine.transformers_bridge.adapters import has_adapter
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.caches import ability_of, copy_to_continue, tokens_in
from rabbit_engine.transformers_bridge.forwards import cache_keyword
from rabbit_engine.transformers_bridge.generation import takes_cache_objects

if TYPE_CHECKING:
    from rabbit_engine.sessions.engine import Engine
    from rabbit_engine.sessions.known_prefixes import KnownPrefixes


class HeldPrefix:
    """The cache of the tokens `ids`. Each text that continues them begins with a `copy`, which shares what never changes."""

    def __init__(self, model: SessionModel, ids: Sequence[int], demand: Demand) -> None:
        self._model, self.demand = model, demand
        self.ids = list(ids)
        self._attention = attention_of(model.config)
        self._cache: DynamicCache | None = make_shared_cache(runtime_of(model), demand)
        self.nbytes = 0
        """Bytes in memory, once it is computed."""
        self.is_closed = False

    def compute(self, prefixes: KnownPrefixes | None) -> None:
        """Compute the tokens, in one pass. Raises ConfigurationError for a model that keeps what it computed elsewhere."""
        found = _PrefixPass(self._model, self, prefixes)
        found.run()
        cache = found.cache
        if ability_of(cache) == "none" or tokens_in(cache) != len(self.ids):
            raise ConfigurationError(_cannot(self._model, "keeps states of a text that a copy of its cache does not have"))
        self._cache = cache
        self.nbytes = cache_bytes(runtime_of(self._model).partition.probe, replace(self.demand, answer=0))

    @property
    def empty_cache(self) -> DynamicCache:
        """The cache, before the tokens are computed."""
        assert self._cache is not None  # noqa: S101 - it is not closed
        return self._cache

    def copy(self, expected_tokens: int) -> DynamicCache:
        """A cache of the same tokens, for a text of `expected_tokens` with them. Raises ConfigurationError."""
        cache = self._cache
        if cache is None or self.is_closed:
            raise ConfigurationError("the fork is closed: make another with session.fork")
        self.require_same_model()
        return copy_to_continue(cache, expected_tokens)

    def require_same_model(self) -> None:
        """Raise ConfigurationError if the model computes otherwise than when it computed the prefix."""
        if has_adapter(self._model) or attention_of(self._model.config) != self._attention:
            raise ConfigurationError(
                "the model has changed since the fork was made (an adapter, or another attention): make another with session.fork"
            )

    def close(self) -> None:
        """Free the memory, but for what texts under way share. Idempotent."""
        self.is_closed, self._cache, self.nbytes = True, None, 0


class _PrefixPass(Generation):
    """A pass over a prefix: what it predicts is not used."""

    def __init__(self, model: SessionModel, held: HeldPrefix, prefixes: KnownPrefixes | None) -> None:
        options, ends = Options(max_new_tokens=1, temperature=0), Ends(1, set(), ())
        beginning = None if prefixes is None else Beginning(prefixes, held.ids)
        super().__init__(model, Prompt(held.ids, 1), options, ends, lambda *_: True, demand=held.demand, beginning=beginning)
        self._speculate = {"speculate": None}
        self.cache = held.empty_cache

    def make_cache(self) -> DynamicCache:
        """The cache that is kept."""
        return self.cache


def hold_prefix(
    model: SessionModel,
    engine: Engine,
    prefixes: KnownPrefixes | None,
    demand_of: Callable[[Prompt], Demand],
    ids: Sequence[int],
) -> HeldPrefix:
    """Compute a prefix and keep it. Raises ConfigurationError, PromptTooLongError, QueueFullError."""
    if reason := _why_not(model):
        raise ConfigurationError(_cannot(model, reason))
    engine.require_other_thread()
    runtime = runtime_of(model)
    held = HeldPrefix(model, ids, in_shared_blocks(runtime, demand_of(Prompt(list(ids), 1))))

    def compute() -> HeldPrefix:
        held.compute(prefixes)
        engine.hold(held)
        return held

    future: Future[HeldPrefix] = Promise(engine)
    engine.submit([computing_job(compute, held.demand, future, exact=True)])
    return future.result()


def _why_not(model: SessionModel) -> str:
    config, own = model.config, model.generation_config
    if config.is_encoder_decoder:
        return "reads a prompt with an encoder, which does not continue it"
    if has_adapter(model):
        return "has an adapter, which may change what is computed later: merge it into the weights, or remove it"
    if cache_keyword(model.forward) is None or not takes_cache_objects(model):
        return "makes its own cache"
    if own.use_cache is False or own.cache_implementation not in (None, "dynamic", "hybrid"):
        setting = "use_cache=False" if own.use_cache is False else f"cache_implementation={own.cache_implementation!r}"
        return f"has {setting} in its generation config: unset it"
    return ""


def _cannot(model: SessionModel, reason: str) -> str:
    return f"{type(model).__name__} {reason}: call session.generate or session.chat with whole prompts, or give a prefix_store"
