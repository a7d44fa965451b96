"""What a session's model computed for the beginnings of prompts: read from a prefix store, and written to it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from weakref import WeakSet

import torch
import transformers
from transformers import DynamicCache

from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.prefixes import Prefix, PrefixSpace, PrefixStore, StoredText
from rabbit_engine.sessions.forgetful import DeviceOf, choose_ends, groups_of, restorable, restore
from rabbit_engine.transformers_bridge.adapters import has_adapter
from rabbit_engine.transformers_bridge.attention import attention_of
from rabbit_engine.transformers_bridge.block_ends import BlockEnds, layer_of, short_windows, watch_ends
from rabbit_engine.transformers_bridge.caches import (
    adds_in_place,
    put_states,
    remembers_all,
    state_layers,
    states_between,
    windows_of,
)
from rabbit_engine.utils.platform import free_memory_bytes, kernels_of

logger = logging.getLogger(__name__)

_AHEAD, _READ_BYTES = 4, 128 * 2**20
"""How many blocks are read at once while one is copied, and the most memory for all of them if it holds two."""
_LEAST_BLOCKS = 8
"""Blocks that each window must hold: computing prompts in parts costs more than beginnings that are shorter can save."""
_COPIES_BYTES, _COPIES_SHARE = 512 * 2**20, 8
"""The most memory for copies of what layers forget, until they are stored, and which share of the free memory it is at most."""
_WAY_SHARE = 2
"""Which share of the free memory states may take that are read for layers elsewhere."""
_LEAST_READ_AGAIN = 4
"""Blocks of a prompt for which experts are read twice, as what its layers forget is kept in the middle."""
_IN_PARTS = "that takes a ring that holds a layer, so load it with a larger max_seq_len, or with more memory"
_ANY_NUMBER = 1 << 40
_RETRY_S = 0.1
"""How long blocks that the store did not take are left to wait."""

Blocks = Iterator[Mapping[str, Iterable[torch.Tensor]]]
"""Of each block, tensors of [heads, tokens, width] under their names, which a blank separates."""


class KnownPrefixes:
    """The blocks of `model` in `store`. Only those of prompts are written, never of answers: a block has the same bits whenever
    it is computed, if prompts are computed in parts of `block_tokens`, and do not continue answers."""

    def __init__(self, model: SessionModel, space: PrefixSpace) -> None:
        self._model, self._space = model, space
        self._attention = attention_of(model.config)
        self.block_tokens = space.block_tokens
        """The tokens of a block."""
        self._most_blocks = _blocks_in_windows(model, space.block_tokens)
        self._under_way: set[KnownText] = set()
        self._watching: WeakSet[BlockEnds] = WeakSet()

    @property
    def are_used(self) -> bool:
        """Whether the model computes now what it did at first, and keeps it in such a cache: not with an adapter or another
        attention, nor where the generation config wants another cache or none."""
        model = self._model
        return not has_adapter(model) and attention_of(model.config) == self._attention and not _has_other_cache(model)

    def begin(self, ids: Sequence[int], cache: DynamicCache | None = None, begun: int = 0) -> KnownText | None:
        """A text with this prompt, and as much of its beginning in `cache`, which is empty, or in a new one, as is stored or as
        another text under way has; at least one token is left to compute. A cache that has `begun` tokens of it stays as it is.
        None unless they `are_used`."""
        if not self.are_used:
            return None
        cache = DynamicCache(config=self._model.config.get_text_config()) if cache is None else cache
        text, size = self._space.text(ids), self.block_tokens
        found = text.find()
        prefix = self._usable(found, ids, cache)
        if begun:
            return self._under_way_with(ids, text, cache, begun, min(len(prefix), begun // size), len(found))
        other, common = self._most_alike(text, self._most_of(ids))
        stored = len(prefix)
        if other is not None and common >= stored:
            stored = max(stored, min(common, other.stored))
            restored = _fill(cache, other.blocks(common), common * size, size, self._device_of)
        elif _forgets(cache):
            restored = restore(cache, prefix, self._device_of)
        else:
            restored = _fill(cache, _read(prefix), prefix.tokens, size, self._device_of)
        return self._under_way_with(ids, text, cache, restored * size, min(stored, restored), len(found))

    def _usable(self, found: Prefix, ids: Sequence[int], cache: DynamicCache) -> Prefix:
        """What a text can begin with of the blocks that were found."""
        prefix = found.cut(min(len(found), (len(ids) - 1) // self.block_tokens))
        if runtime_of(self._model).in_stages:
            prefix = prefix.cut(min(len(prefix), _most_on_the_way(prefix)))
        return prefix.cut(restorable(cache, prefix)) if _forgets(cache) else prefix

    def _device_of(self, layer: int) -> torch.device:
        return runtime_of(self._model).device_of_layer(layer)

    def _under_way_with(
        self, ids: Sequence[int], text: StoredText, cache: DynamicCache, begun: int, stored: int, found: int
    ) -> KnownText:
        ends = self._watch(cache, text, len(ids), begun, found)
        remembered = text.blocks if ends is None and len(ids) <= self._most_blocks * self.block_tokens else 0
        known = KnownText(text, self.block_tokens, cache, begun, stored, remembered, self._under_way, ends)
        if ends is None:
            self._under_way.add(known)
        return known

    def _watch(self, cache: DynamicCache, text: StoredText, tokens: int, begun: int, found: int) -> BlockEnds | None:
        """Who copies what the layers will forget of a prompt of `tokens`, of which `begun` are in the cache and `found` blocks in
        the store; None if they forget nothing."""
        if not (state_layers(cache) or short_windows(cache, tokens)):
            return None
        runtime, stop, size = runtime_of(self._model), text.blocks_to_store(), self.block_tokens
        reads_again = _reads_again(runtime)
        ends = choose_ends(begun // size, found, stop, few=reads_again)
        if not runtime.computes_parts or (reads_again and (runtime.device.type != "cpu" or stop < _LEAST_READ_AGAIN)):
            ends = []
        watching = BlockEnds(cache, ends, size, tokens, begun, self._copies_are_over)
        self._watching.add(watching)
        watch_ends(cache, watching)
        return watching

    def _copies_are_over(self) -> bool:
        most = min(_COPIES_BYTES, free_memory_bytes(torch.device("cpu")) // _COPIES_SHARE)
        return sum(each.nbytes for each in tuple(self._watching)) > most

    def stored_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens of a prompt `begin` would read from the store; 0 unless they `are_used`."""
        if not self.are_used:
            return 0
        cache = DynamicCache(config=self._model.config.get_text_config())
        return len(self._usable(self._space.text(ids).find(), ids, cache)) * self.block_tokens

    def computing(self, ids: Sequence[int], least: int) -> KnownText | None:
        """The text whose prompt is computed in the next pass and begins with the most blocks of this one: at least `least` that
        are not here yet. None if there is none."""
        coming = [other for other in tuple(self._under_way) if other.is_computing]
        if not coming:
            return None
        text, most = self._space.text(ids), self._most_of(ids)
        common, other = max(((min(most, other.coming_blocks(text)), other) for other in coming), key=itemgetter(0))
        if common < least:
            return None
        here = max(min(most, len(text.find())), self._most_alike(text, most)[1])
        return other if common - here >= least else None

    def _most_of(self, ids: Sequence[int]) -> int:
        return min((len(ids) - 1) // self.block_tokens, self._most_blocks)

    def _most_alike(self, text: StoredText, most: int) -> tuple[KnownText | None, int]:
        """The text that has computed the most blocks with which `text` begins, and how many of the first `most` it has."""
        found = [(min(most, other.common_blocks(text)), other) for other in tuple(self._under_way) if other.is_computed]
        found.sort(key=itemgetter(0), reverse=True)
        alike = ((other, common) for common, other in found if common and other.remembers_all)
        return next(alike, (None, 0))


class KnownText:
    """A text under way: `cache` holds the first `tokens` of its prompt, `stored` blocks are in the store, and `remembered` can be
    read from the cache once the prompt is computed. Others that begin alike may wait for that, and copy it also after the end
    of this one. `ends` copies what its layers forget, at the ends of some blocks."""

    def __init__(
        self,
        text: StoredText,
        block_tokens: int,
        cache: DynamicCache,
        tokens: int,
        stored: int,
        remembered: int,
        under_way: set[KnownText],
        ends: BlockEnds | None = None,
    ) -> None:
        self._text, self._block_tokens, self.stored, self._remembered = text, block_tokens, stored, remembered
        self._ends, self._windows = ends, windows_of(cache)
        self._stop: int | None = None
        self._tried_s = -_RETRY_S
        self._has_begun = self._has_ended = False
        self._under_way, self._awaited_by = under_way, set[object]()
        self.cache: DynamicCache | None = cache
        self.tokens = tokens

    def keep(self) -> None:
        """Store the whole blocks of the prompt that were computed, as many as the store takes now. Call it after each token:
        blocks that the disk had no time for are offered again."""
        self._has_begun = True
        if self._stop is None:
            self._stop = self._text.blocks_to_store() if self._ends is None else self._last_end(self._ends)
        if self.stored >= self._stop or time.monotonic() - self._tried_s < _RETRY_S:
            return
        while self.stored < self._stop:
            block = self._block(self.stored)
            if block is None:  # longer than a window, whose layers have forgotten its beginning
                self._stop = self.stored
                return
            if not self._text.write(self.stored, block):
                break
            if self._ends is not None:
                self._ends.drop(self.stored)
            self.stored += 1
        self._tried_s = time.monotonic()

    def _last_end(self, ends: BlockEnds) -> int:
        """At how many blocks the last of the ends is: no text can begin behind it."""
        if self.cache is not None:
            watch_ends(self.cache, None)
        return max(ends.finished(), default=0)

    @property
    def is_computing(self) -> bool:
        """Whether its prompt is computed in the next pass."""
        return self.cache is not None and not self._has_begun

    @property
    def is_computed(self) -> bool:
        """Whether its prompt is, and its cache still there."""
        return self.cache is not None and self._has_begun

    def common_blocks(self, text: StoredText) -> int:
        """With how many of the same blocks both begin."""
        return self._text.common_blocks(text)

    def coming_blocks(self, text: StoredText) -> int:
        """How many of them others can copy after the pass that computes the prompt."""
        return min(self._remembered, self._text.common_blocks(text))

    @property
    def remembers_all(self) -> bool:
        """Whether others can copy any of its blocks."""
        return self.cache is not None and remembers_all(self.cache, () if self._ends is None else self._ends.layers)

    def blocks(self, count: int) -> Blocks:
        """The first `count` blocks, up to one that it has forgotten."""
        for index in range(count):
            block = self._block(index)
            if block is None:
                return
            yield block

    @property
    def is_awaited(self) -> bool:
        """Whether others wait to copy it."""
        return bool(self._awaited_by)

    def await_by(self, other: object) -> None:
        """Keep the cache for another text, also after the end of this one, until `leave`."""
        self._awaited_by.add(other)

    def leave(self, other: object) -> None:
        """It does not wait any more."""
        self._awaited_by.discard(other)
        if self._has_ended and not self._awaited_by:
            self.drop()

    def end(self) -> None:
        """Its answer has ended: drop the cache, unless others wait to copy it."""
        self._has_ended = True
        if not (self._has_begun and self._awaited_by):
            self.drop()

    def drop(self) -> None:
        """Drop the cache, whoever waits for it."""
        self._awaited_by.clear()
        self._under_way.discard(self)
        self.cache = self._ends = None

    def _block(self, index: int) -> dict[str, list[torch.Tensor]] | None:
        """The states of a block by groups: [heads, tokens, width] of each layer's keys and values, and what is kept at its end;
        None if a layer has forgotten them."""
        cache, ends, first = self.cache, self._ends, index * self._block_tokens
        if cache is None:
            return None
        found = states_between(cache, first, first + self._block_tokens, () if ends is None else ends.layers)
        if found is None:
            return None
        kept = {} if ends is None else ends.of(index)
        return groups_of({name: states[0].detach() for name, states in found.items()} | dict(kept), self._windows)


def known_prefixes(model: SessionModel, store: PrefixStore, *, exact: bool = True) -> KnownPrefixes | None:
    """The prefixes of a session's model; None, with a line in the log, for one whose caches cannot be cut into blocks. Without
    `exact` states may also be those of answers, or of prompts that continue them."""
    runtime = runtime_of(model)
    if reason := _why_none(model, runtime, store.block_tokens):
        logger.log(store.log_level, "prompts are not stored: %s", reason)
        return None
    identity = _identity(model, runtime) | ({} if exact else {"states": "of continued texts"})
    return KnownPrefixes(model, store.space(identity, runtime.checkpoint.request.repo.name))


def _why_none(model: SessionModel, runtime: Runtime, block_tokens: int) -> str:
    if not runtime.partition.computes_parts:
        return f"{type(model).__name__} is not known to continue a cache with several tokens as it computes the whole text"
    if runtime.assembly.cache_dtype is not None:
        return f"cache_dtype={runtime.assembly.cache_dtype!r} keeps other states than were computed"
    has_states = bool(state_layers(DynamicCache(config=model.config.get_text_config())))
    forgets = has_states or _blocks_in_windows(model, block_tokens) < _LEAST_BLOCKS
    if forgets and not runtime.computes_parts:
        return f"layers of {type(model).__name__} forget tokens of a prompt that is not computed in parts: {_IN_PARTS}"
    if forgets and _reads_again(runtime) and runtime.device.type != "cpu":
        return f"layers of {type(model).__name__} forget tokens of a prompt, and experts on demand would be read once more for it"
    return "an adapter wraps the model" if not isinstance(model, runtime.architecture.cls) else ""


def _reads_again(runtime: Runtime) -> bool:
    """Whether each part of a prompt reads experts."""
    return bool(runtime.plan.experts.layers)


def _blocks_in_windows(model: SessionModel, block_tokens: int) -> int:
    """How many blocks all layers of a new cache remember: those that see a window forget what is before it."""
    windows = windows_of(DynamicCache(config=model.config.get_text_config())).values()
    return min(((window - 1) // block_tokens for window in windows if window is not None), default=_ANY_NUMBER)


def _has_other_cache(model: SessionModel) -> bool:
    """Whether the generation config wants none, or one of another kind."""
    config = model.generation_config
    return config.use_cache is False or config.cache_implementation not in (None, "dynamic")


def _most_on_the_way(prefix: Prefix) -> int:
    """How many blocks the host has the memory for until the stages that they are for have them."""
    free = free_memory_bytes(torch.device("cpu")) // _WAY_SHARE
    return free // max(1, prefix.block_bytes(0)) if len(prefix) else 0


def _identity(model: SessionModel, runtime: Runtime) -> dict[str, str]:
    """All that the states of a text depend on: the weights' files, and how the model computes."""
    entries = runtime.partition.weights.entries
    files = {place.path for entry in entries.values() for place in entry.places}
    stated = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    weights = sorted((name, str(entry.dtype), entry.shape, repr(entry.encoding)) for name, entry in entries.items())
    config = copy.copy(model.config)
    config.name_or_path = ""
    kernels = {stage.kernels for stage in runtime.assembly.stages} - {kernels_of(runtime.device)}
    elsewhere = {"stages": ", ".join(sorted(kernels))} if kernels else {}
    return elsewhere | {
        "layout": _layout(model),
        "class": type(model).__name__,
        "files": _digest(stated),
        "weights": _digest(weights),
        "config": _digest(config.to_dict()),
        "dtype": str(runtime.dtype),
        "attention": str(attention_of(model.config)),
        "device": runtime.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _layout(model: SessionModel) -> str:
    forgets = _forgets(DynamicCache(config=model.config.get_text_config()))
    return "tensors of one shape and use together" if forgets else "tensors of one shape together"


def _forgets(cache: DynamicCache) -> bool:
    """Whether layers of a new cache have states, or windows that a text may be longer than."""
    return bool(state_layers(cache)) or any(windows_of(cache).values())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(prefix: Prefix) -> Blocks:
    """The blocks that are stored, read ahead in limited memory."""
    if len(prefix):
        yield from prefix.blocks(ahead=max(1, min(_AHEAD, _READ_BYTES // max(1, prefix.block_bytes(0)) - 1)))


def _fill(cache: DynamicCache, blocks: Blocks, tokens: int, size: int, device_of: DeviceOf) -> int:
    """Put copies of `blocks` of `size` tokens, `tokens` in all, into a new cache, each layer's on its device; how many came. Some
    take them one by one: all may be more than fits in memory."""
    found: dict[str, torch.Tensor] = {}
    count, adds = 0, adds_in_place(cache)
    for block in blocks:
        named = {name: states for names, group in block.items() for name, states in zip(names.split(), group, strict=True)}
        count += 1
        if adds:
            put_states(cache, {name: states[None].to(device_of(layer_of(name))) for name, states in named.items()})
            continue
        for name, states in named.items():
            if name not in found:
                heads, _, width = states.shape
                device = device_of(layer_of(name))
                found[name] = torch.empty(1, heads, tokens, width, dtype=states.dtype, device=device)
            found[name][0, :, (count - 1) * size : count * size] = states
    put_states(cache, {name: states[:, :, : count * size] for name, states in found.items()})
    return count
