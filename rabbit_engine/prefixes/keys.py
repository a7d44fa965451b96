"""Names of blocks: each is a hash of the block's tokens and of its parent's name, the first one's parent being its space.

So a name stands for all tokens from the beginning of a text. The files hold the tokens themselves, which are compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

FORMAT = "rabbit_engine prefix block 1"
"""Changes with the layout of the files: blocks of another one are of another space."""

_NAME = r"[0-9a-f]{40}"
_FILE = re.compile(rf"(\d+)-({_NAME})-({_NAME})\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class BlockKey:
    """One block of a text: its `tokens` (int64, little-endian), its place in the chain, the names of itself and its parent, and
    the file of the parent, which is empty for the first block."""

    space: str
    index: int
    parent: str
    name: str
    tokens: bytes
    before: str = ""

    @property
    def file(self) -> str:
        """The file's name. It has the parent's name, so that a listing of the folder shows the chains."""
        return f"{self.index}-{self.name}-{self.parent}.safetensors"

    @property
    def words(self) -> str:
        """The tokens as text."""
        return " ".join(map(str, np.frombuffer(self.tokens, "<i8").tolist()))


def name_space(identity: Mapping[str, str], block_tokens: int) -> str:
    """The name of the space of blocks with this identity."""
    text = json.dumps([FORMAT, block_tokens, dict(identity)], sort_keys=True)
    return _hash(text.encode())


def chain(space: str, tokens: Sequence[int], block_tokens: int) -> Iterator[BlockKey]:
    """The keys of the whole blocks of a text, from its beginning."""
    raw, size = np.asarray(tokens, "<i8").tobytes(), 8 * block_tokens
    parent, before = space, ""
    for index in range(len(raw) // size):
        own = raw[index * size : (index + 1) * size]
        name = _hash(parent.encode() + own)
        key = BlockKey(space, index, parent, name, own, before)
        yield key
        parent, before = name, key.file


def is_space(name: str) -> bool:
    """Whether a folder of this name can be a space."""
    return re.fullmatch(_NAME, name) is not None


def read_file_name(name: str) -> tuple[int, str, str] | None:
    """`(index, name, parent)` of a block's file; None for another file."""
    found = _FILE.fullmatch(name)
    return None if found is None else (int(found[1]), found[2], found[3])


def _hash(raw: bytes) -> str:
    """A cryptographic hash: nobody can write two texts of the same name."""
    return blake2b(raw, digest_size=20).hexdigest()
