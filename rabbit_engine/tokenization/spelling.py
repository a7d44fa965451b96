"""Decodes ids exactly as sentencepiece and the families' own code do; `tokenizers`' decoders differ in corner cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rabbit_engine.tokenization.pieces import BYTE, CONTROL, SPACE, UNKNOWN, PieceModel

Part = tuple[str, Sequence[int]]  # the text of a special token, or "" and the ids of pieces


@dataclass(frozen=True, slots=True)
class Speller:
    """sentencepiece's `decode` over a model's pieces."""

    model: PieceModel

    def spell(self, tokens: Iterable[int | str]) -> str:
        """Decode ids, and strings as they are, to one text: bytes joined, the leading space dropped if the model does so."""
        text, pending, at_start, dropped = "", bytearray(), True, False
        for token in tokens:
            if isinstance(token, int) and self.model.kinds[token] == BYTE:
                pending.append(int(self.model.pieces[token][3:5], 16))
                continue
            text += _spell_bytes(pending)
            pending.clear()
            at_start = at_start and not dropped and not text
            piece, dropped = self._surface(token, at_start)
            text += piece
        return text + _spell_bytes(pending)

    def _surface(self, token: int | str, at_start: bool) -> tuple[str, bool]:
        """The text of one token, and whether it lost the single space that is dropped at the beginning."""
        if isinstance(token, str):
            return token, False
        kind, piece = self.model.kinds[token], self.model.pieces[token]
        if kind in (CONTROL, UNKNOWN):
            return ("" if kind == CONTROL else self.model.unknown_surface), False
        drops = at_start and (self.model.dummy_prefix or self.model.strips_spaces) and piece.startswith(SPACE)
        return piece[drops:].replace(SPACE, " "), drops and not self.model.strips_spaces


def _spell_bytes(data: bytes | bytearray) -> str:
    """Decode UTF-8; every invalid byte becomes one U+FFFD, as in sentencepiece."""
    text, start = "", 0
    while start < len(data):
        size = next((size for size in (1, 2, 3, 4) if _is_character(data[start : start + size])), 0)
        text += bytes(data[start : start + size]).decode() if size else "\N{REPLACEMENT CHARACTER}"
        start += size or 1
    return text


def _is_character(data: bytes | bytearray) -> bool:
    try:
        return len(bytes(data).decode()) == 1
    except UnicodeDecodeError:
        return False


def spell_plain(speller: Speller, parts: Sequence[Part]) -> str:
    """ChatGLM: special tokens are written as they are, within one text."""
    return speller.spell(token for name, ids in parts for token in ([name] if name else ids))


def spell_spaced(speller: Speller, parts: Sequence[Part], *, first_too: bool) -> str:
    """InternLM and Baichuan: text before a special token gets a leading space unless it follows another special token.

    `first_too`: also if a special token begins the text (InternLM).
    """
    text, run, after_special = "", list[int](), False
    for index, (name, ids) in enumerate(parts):
        if not name:
            run, after_special = list(ids), False
            continue
        text += " " if not after_special and (first_too or index > 0) else ""
        text += speller.spell(run) + name
        run, after_special = [], True
    return text + speller.spell(run)


def tidied(text: str) -> str:
    """Drop the spaces before English punctuation and contractions: transformers 4's clean-up."""
    for ending in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending.strip())
    return text


SPELLINGS: dict[str, Callable[[Speller, Sequence[Part]], str]] = {
    "plain": spell_plain,
    "spaced": lambda speller, parts: tidied(spell_spaced(speller, parts, first_too=True)),
    "spaced inside": lambda speller, parts: spell_spaced(speller, parts, first_too=False),
}
