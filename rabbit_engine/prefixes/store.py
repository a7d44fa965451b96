"""What was computed for the beginnings of texts, kept on disk and in memory, so that it is computed once.

A store knows nothing of models: a block is the tensors, of any names, that belong to a number of tokens of a text.
"""

from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.prefixes.folder import StoredModel, StoreFolder, about_space
from rabbit_engine.prefixes.keys import chain, name_space
from rabbit_engine.prefixes.prefix import Prefix
from rabbit_engine.prefixes.tiers import BlockTiers
from rabbit_engine.storage.cached import cache_folder
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, PAD_PREFIX

VARIABLE = "RABBIT_ENGINE_PREFIXES"
BLOCK_TOKENS = 256
QUEUE_BYTES = 256 * 2**20
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


class PrefixStore:
    """Blocks of `block_tokens` tokens in `folder`, `max_bytes` of them at most, which several processes may share.

    Those used last are also in memory, up to `memory_bytes`; with `folder=None`, only there. Blocks wait for the disk in
    `queue_bytes` of memory. With `repeated_only`, prompts are stored as far as a second one begins alike. Lookups and writes
    never raise for a fault of the disk: a block that cannot be read is a miss, one that cannot be written is not stored, and
    both are logged at `log_level`.
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
        self._about = about_space(model or self.name, identity, store.block_tokens)
        self._seen: set[str] = set()

    def find(self, tokens: Sequence[int]) -> Prefix:
        """The longest beginning of `tokens` in whole blocks that is stored, possibly empty."""
        blocks = self._tiers.find(chain(self.name, tokens, self.block_tokens))
        return Prefix(blocks, self.block_tokens, self._tiers.fetch)

    def blocks_to_store(self, tokens: Sequence[int]) -> int:
        """How many blocks of a prompt to write, from its beginning: with `repeated_only`, those an earlier call had."""
        names = [key.name for key in chain(self.name, tokens, self.block_tokens)]
        if not self._store.repeated_only:
            return len(names)
        known = next((index for index, name in enumerate(names) if name not in self._seen), len(names))
        self._seen.update(names[known:])
        return known

    def write(self, tokens: Sequence[int], index: int, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Store a block in the background: `tensors` are those of `tokens[index * block_tokens : (index + 1) * block_tokens]`.

        They are copied before this returns. True if the block will be stored, or is already, with at least tensors of these
        names; False if the queue is full, the disk refused a block lately, or the block before this one is not stored. Raises
        ValueError if the text has no such block, or for a name or dtype that cannot be stored.
        """
        keys = list(islice(chain(self.name, tokens[: (index + 1) * self.block_tokens], self.block_tokens), index + 1))
        if not 0 <= index < len(keys):
            raise ValueError(f"{len(tokens)} tokens have no whole block {index} of {self.block_tokens}")
        _check_storable(tensors)
        return self._tiers.add(keys, tensors, self._about)


def _check_storable(tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise ValueError("a block needs at least one tensor")
    for name, tensor in tensors.items():
        if not name or name == "__metadata__" or name.startswith(PAD_PREFIX):
            raise ValueError(f"a tensor of a block cannot be named {shown(name)}")
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files cannot hold")
