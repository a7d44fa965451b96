"""The bytes that each token of a tokenizer writes, as the grammar sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import Tokenizer

from rabbit_engine.errors import ConstraintError
from rabbit_engine.tokenization.pieces import SPACE
from rabbit_engine.tokenization.ranks import byte_characters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_HALF = "\N{REPLACEMENT CHARACTER}"
_CHECKED = 200
"""Tokens of a vocabulary for which what their names say is compared with the decoder."""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What each token adds to a text, by id; b"" for those that write nothing or nothing by themselves.

    `special` tokens are no text: their bytes are their names. `drops_space`: the decoder leaves out a space that begins a text.
    """

    texts: tuple[bytes, ...]
    special: tuple[int, ...]
    drops_space: bool


def read_token_bytes(tokenizer: Any, vocabulary: int) -> TokenBytes:
    """The bytes of the ids below `vocabulary`. Raises ConstraintError for a tokenizer of which they cannot be told."""
    kind = type(tokenizer).__name__
    try:
        names = {number: name for name, number in tokenizer.get_vocab().items() if 0 <= number < vocabulary}
        special = {number for number in tokenizer.all_special_ids if number in names}
    except AttributeError as error:
        raise ConstraintError(f"a {kind} does not list its tokens: its answers cannot be constrained") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    added: Mapping[int, Any] = backend.get_added_tokens_decoder() if isinstance(backend, Tokenizer) else {}
    special |= {number for number, token in added.items() if token.special and number in names}
    read = _reader(tokenizer, backend, names, special)
    texts = {number: name.encode() if number in special else read(number) for number, name in names.items()}
    drops_space = _drops_space(tokenizer, {number: text for number, text in texts.items() if number not in special})
    return TokenBytes(tuple(texts.get(number, b"") for number in range(vocabulary)), tuple(sorted(special)), drops_space)


def _reader(tokenizer: Any, backend: object, names: Mapping[int, str], special: set[int]) -> Callable[[int], bytes]:
    """How to get the bytes of a token: from its name where the decoder agrees, or else from the decoder."""
    if isinstance(backend, Tokenizer) and backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__():
        return partial(_byte_level, names, {character: byte for byte, character in enumerate(byte_characters())})
    decoded = partial(_decoded, tokenizer, _anchor(tokenizer), names)
    step = max(1, len(names) // _CHECKED)
    sample = [number for number in sorted(names)[::step] if number not in special]
    agrees = all(decoded(number) in (b"", _piece(names, number)) for number in sample)
    return partial(_piece, names) if agrees and any(map(decoded, sample)) else decoded


def _byte_level(names: Mapping[int, str], bytes_of: Mapping[str, int], number: int) -> bytes:
    name = names[number]
    return bytes(map(bytes_of.__getitem__, name)) if all(character in bytes_of for character in name) else name.encode()


def _piece(names: Mapping[int, str], number: int) -> bytes:
    """Of sentencepiece: a byte as `<0x0A>`, and a sign for the space."""
    found = _BYTE.fullmatch(names[number])
    return bytes([int(found[1], 16)]) if found else names[number].replace(SPACE, " ").encode()


def _anchor(tokenizer: Any) -> int:
    """A token that writes text, after which others are decoded: at the beginning they may be decoded otherwise."""
    return int(tokenizer("a", add_special_tokens=False)["input_ids"][-1])


def _decoded(tokenizer: Any, anchor: int, names: Mapping[int, str], number: int) -> bytes:
    before, both = _decode(tokenizer, [anchor]), _decode(tokenizer, [anchor, number])
    new = both.removeprefix(before)
    if _HALF in new or not both.startswith(before):  # a byte of a longer character
        return _piece(names, number) if _BYTE.fullmatch(names[number]) else b""
    return new.encode()


def _drops_space(tokenizer: Any, texts: Mapping[int, bytes]) -> bool:
    """Whether a text that begins with a space is decoded without it. Raises ConstraintError if other texts change too."""
    words = [number for number, text in texts.items() if re.fullmatch(rb" ?[A-Za-z]+", text)]
    sample = words[:: max(1, len(words) // _CHECKED)]
    first = {number: _decode(tokenizer, [number]).encode() for number in sample}
    drops = any(first[number] == texts[number].removeprefix(b" ") != texts[number] for number in sample)
    if any(first[number] != texts[number].removeprefix(b" " if drops else b"") for number in sample):
        raise ConstraintError(f"a {type(tokenizer).__name__} writes other text at a beginning: its answers cannot be constrained")
    return drops


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TokenTable:
    """A vocabulary with the attributes that llguidance asks for. `ends` are the ids that end an answer.

    Forced text is written with the tokens that the tokenizer itself would choose, if they are exactly that text.
    """

    def __init__(self, tokenizer: Any, known: TokenBytes, ends: Sequence[int]) -> None:
        nothing = len(known.texts)  # an id past the vocabulary, where nothing ends an answer
        self.eos_token_id = ends[0] if ends else nothing
        self.bos_token_id: int | None = None
        self.tokens: list[bytes] = [*known.texts, *([] if ends else [b"<end>"])]
        self.special_token_ids = [*known.special, *([] if ends else [nothing])]
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend = backend if isinstance(backend, Tokenizer) else None  # others may not serve two threads at once
        self._reserved = {*known.special, *ends}
        plain = ((text, number) for number, text in enumerate(known.texts) if text and number not in self._reserved)
        self._ids = dict(reversed([*plain]))
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Token ids that write this text."""
        if not isinstance(text, str):
            raise TypeError("expected a text")
        for before in ("", "\n"):  # some tokenizers add a space to the beginning
            ids = self._own_ids(before + text)[len(self._own_ids(before)) :]
            if b"".join(map(self._text_of, ids)) == text.encode():
                return ids
        return self._longest_first(text.encode())

    def _own_ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids) if self._backend is not None and text else []

    def _text_of(self, number: int) -> bytes:
        return b"" if number in self._reserved or number >= len(self.tokens) else self.tokens[number]

    def _longest_first(self, text: bytes) -> list[int]:
        found, at = list[int](), 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1)
            size = next((size for size in sizes if text[at : at + size] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[text[at : at + size]])
            at += size
        return found
