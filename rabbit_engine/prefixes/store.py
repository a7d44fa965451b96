"""What was computed for the beginnings of texts, kept on disk and in memory, so that it is computed once.

A store knows nothing of models: a block is the tensors, of any names, that belong to a number of tokens of a text.
"""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.prefixes.folder import StoredModel, StoreFolder, about_space
from rabbit_engine.prefixes.keys import BlockKey, chain, name_space
from rabbit_engine.prefixes.prefix import Prefix
from rabbit_engine.prefixes.tiers import BlockTiers, Parts
from rabbit_engine.storage.cached import cache_folder
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, PAD_PREFIX

VARIABLE = "RABBIT_ENGINE_PREFIXES"
BLOCK_TOKENS = 256
QUEUE_BYTES = 128 * 2**20
"""Memory that a plan does not count, so it is small: it holds a block of Llama 3.1 405B, 132 MB in 16 bits."""
CLOSE_S = 30.0
DEFAULT_BYTES = 10 * 10**9
_SHORTEST_NAME = 8
"""Characters of a space's name that are enough to name it."""


def default_folder() -> Path | None:
    """`prefixes` in this library's cache folder, or what `RABBIT_ENGINE_PREFIXES` names; None if the caller wants none."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    cache = cache_folder()
    return None if cache is None or named == "" else cache / "prefixes"


def default_bytes(folder: Path) -> int:
    """The size of a store that nobody chose: the smaller of 10 GB and a tenth of what is free on the folder's disk."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        return min(DEFAULT_BYTES, shutil.disk_usage(existing).free // 10)
    except OSError:
        return 0


def open_default(max_bytes: int | None, *, repeated_only: bool) -> PrefixStore | None:
    """The store in the default folder; None with 0 bytes, or if there is no folder.

    With `max_bytes=None`, which nobody chose, it has the default size, and what goes wrong with it is no warning.
    """
    folder = None if max_bytes == 0 else default_folder()
    most = 0 if folder is None else default_bytes(folder) if max_bytes is None else max_bytes
    level = logging.INFO if max_bytes is None else logging.WARNING
    return PrefixStore(folder, most, repeated_only=repeated_only, log_level=level) if most else None


class PrefixStore:
    """Blocks of `block_tokens` tokens in `folder`, `max_bytes` of them at most, which several processes may share.

    Those used last are also in memory, up to `memory_bytes`; with `folder=None`, only there. Blocks wait for the disk in
    `queue_bytes` of memory, or one that is up to four times as large. With `repeated_only`, prompts are stored as far as a
    second one begins alike. Lookups and writes never raise for a fault of the disk: a block that cannot be read is a miss, one
    that cannot be written is not stored, and both are logged at `log_level`.
    """

    def __init__(
        self,
        folder: Path | str | None,
        max_bytes: int,
        memory_bytes: int = 0,
        block_tokens: int = BLOCK_TOKENS,
        queue_bytes: int = QUEUE_BYTES,
        *,
        repeated_only: bool = False,
        log_level: int = logging.WARNING,
    ) -> None:
        """Raises ConfigurationError for a negative number of bytes, or no tokens."""
        least = {"max_bytes": (max_bytes, 0), "memory_bytes": (memory_bytes, 0), "queue_bytes": (queue_bytes, 0)}
        for name, (value, smallest) in {**least, "block_tokens": (block_tokens, 1)}.items():
            if not isinstance(value, int) or value < smallest:
                raise ConfigurationError(f"{name}={value!r} is not an integer from {smallest}")
        self.block_tokens, self.repeated_only, self.log_level = block_tokens, repeated_only, log_level
        self.folder = None if folder is None else Path(folder).expanduser().absolute()
        files = None if self.folder is None else StoreFolder(self.folder, max_bytes)
        if files is not None:
            files.clean()
        self._tiers = BlockTiers(files, memory_bytes, queue_bytes, log_level)
        self._closing = weakref.finalize(self, self._tiers.close, CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def space(self, identity: Mapping[str, str], model: str = "") -> PrefixSpace:
        """The blocks of one model, computed in one way: `identity` has all that their contents depend on.

        `model` is its name for people: in lists, and for `clear`.
        """
        return PrefixSpace(self, self._tiers, identity, model)

    def models(self) -> list[StoredModel]:
        """What is on disk, by space, the last used first."""
        return [] if self._tiers.folder is None else self._tiers.folder.models()

    def clear(self, model: str | None = None) -> list[StoredModel]:
        """Delete all blocks, or a model's, and return what there was on disk. `model` is its name, or the start of a space's.

        Other processes no longer find or write what they have in memory. Raises ConfigurationError for an unknown model,
        PrefixStoreError for files that cannot be deleted.
        """
        stored = self.models()
        if model is None:
            self._tiers.clear()
            return stored
        named = [one for one in stored if one.model == model or (len(model) >= _SHORTEST_NAME and one.space.startswith(model))]
        if not named:
            known = ", ".join(sorted({one.model for one in stored})) or "none"
            raise ConfigurationError(f"{shown(model)} has no stored prefixes; those that have: {known}")
        self._tiers.clear([one.space for one in named])
        return named

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all blocks are written; False if some are not after `timeout_s`."""
        return self._tiers.writer.flush(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Write what waits, for `timeout_s` at most, and end the thread. Afterwards nothing is found or stored."""
        self._tiers.close(timeout_s)
        self._closing.detach()


class PrefixSpace:
    """The blocks of one model in a store. `name` identifies it."""

    def __init__(self, store: PrefixStore, tiers: BlockTiers, identity: Mapping[str, str], model: str) -> None:
        self.name = name_space(identity, store.block_tokens)
        self.block_tokens = store.block_tokens
        self._store, self._tiers = store, tiers  # a space keeps its store open
        self.about = about_space(model or self.name, identity, store.block_tokens)
        """What a store says of the space."""
        self._seen: set[str] = set()

    def text(self, tokens: Sequence[int]) -> StoredText:
        """The blocks of a text."""
        return StoredText(self, self._tiers, list(chain(self.name, tokens, self.block_tokens)))

    def find(self, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of `tokens` in whole blocks that is stored, possibly empty."""
        return self.text(tokens).find()

    def write(self, tokens: Sequence[int], index: int, tensors: Mapping[str, Parts]) -> bool:
        """Store a block of a text: see `StoredText`."""
        return self.text(tokens).write(index, tensors)

    def take_known(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks of a text to write, from its beginning: with `repeated_only`, those an earlier call had."""
        if not self._store.repeated_only:
            return len(keys)
        known = next((index for index, key in enumerate(keys) if key.name not in self._seen), len(keys))
        self._seen.update(key.name for key in keys[known:])
        return known


class StoredText:
    """A text in a space, whose blocks are named once."""

    def __init__(self, space: PrefixSpace, tiers: BlockTiers, keys: Sequence[BlockKey]) -> None:
        self._space, self._tiers, self._keys = space, tiers, keys

    def find(self) -> Prefix:
        """The longest beginning in whole blocks that is stored, possibly empty."""
        return Prefix(self._tiers.find(self._keys), self._space.block_tokens, self._tiers)

    @property
    def blocks(self) -> int:
        """The number of its whole blocks."""
        return len(self._keys)

    def common_blocks(self, other: StoredText) -> int:
        """With how many of the same blocks both texts begin."""
        both = range(min(len(self._keys), len(other._keys)))
        return bisect_left(both, True, key=lambda index: self._keys[index].name != other._keys[index].name)

    def blocks_to_store(self) -> int:
        """How many blocks to write, from the beginning: all, or with `repeated_only` those that an earlier text had. Call it
        once."""
        return self._space.take_known(self._keys)

    def write(self, index: int, tensors: Mapping[str, Parts]) -> bool:
        """Store the block of an index in the background: `tensors` are those of its tokens, several of a shape being one.

        They are copied before this returns. True if the block will be stored, or is already, with at least tensors of these
        names; False if the queue is full, the disk refused a block lately, or the block before this one is not stored. Raises
        ValueError if the text has no such block, or for a name or dtype that cannot be stored.
        """
        if not 0 <= index < len(self._keys):
            raise ValueError(f"{len(self._keys)} blocks of {self._space.block_tokens} tokens have no whole block {index}")
        _check_storable(tensors)
        return self._tiers.add(self._keys[: index + 1], tensors, self._space.about)


def _check_storable(tensors: Mapping[str, Parts]) -> None:
    if not tensors:
        raise ValueError("a block needs at least one tensor")
    for name, tensor in tensors.items():
        if not name or name == "__metadata__" or name.startswith(PAD_PREFIX):
            raise ValueError(f"a tensor of a block cannot be named {shown(name)}")
        if (dtype := tensor.dtype if isinstance(tensor, torch.Tensor) else tensor[0].dtype) not in DTYPE_NAMES:
            raise ValueError(f"{name} is {dtype}, which safetensors files cannot hold")
