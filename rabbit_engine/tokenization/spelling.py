"""Ids back into text as sentencepiece and the families' own code do it; `tokenizers`' decoders differ in corners."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rabbit_engine.tokenization.pieces import BYTE, CONTROL, SPACE, UNKNOWN, PieceModel

Part = tuple[str, Sequence[int]]  # a special token's text, or "" and the ids of pieces


@dataclass(frozen=True, slots=True)
class Speller:
    """sentencepiece's `decode` over a model's pieces."""

    model: PieceModel

    def spell(self, tokens: Iterable[int | str]) -> str:
        """Ids, and strings that stand for themselves, as one text: bytes joined, the leading space dropped as the model says."""
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
        """What it adds to the text, and whether the one space a text's start loses went with it."""
        if isinstance(token, str):
            return token, False
        kind, piece = self.model.kinds[token], self.model.pieces[token]
        if kind in (CONTROL, UNKNOWN):
            return ("" if kind == CONTROL else self.model.unknown_surface), False
        drops = at_start and (self.model.dummy_prefix or self.model.strips_spaces) and piece.startswith(SPACE)
        return piece[drops:].replace(SPACE, " "), drops and not self.model.strips_spaces


def _spell_bytes(data: bytes | bytearray) -> str:
    """UTF-8; every byte that belongs to no character is one U+FFFD, as sentencepiece counts them."""
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
    """ChatGLM: special tokens stand for themselves within one text."""
    return speller.spell(token for name, ids in parts for token in ([name] if name else ids))


def spell_spaced(speller: Speller, parts: Sequence[Part], *, first_too: bool) -> str:
    """InternLM and Baichuan: the text before a special token gets a space in front unless another special token precedes it.

    `first_too`: also where a special token opens the text (InternLM).
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
    """Without the spaces before English punctuation and contractions, which transformers 4 calls a clean-up."""
    for ending in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending.strip())
    return text


SPELLINGS: dict[str, Callable[[Speller, Sequence[Part]], str]] = {
    "plain": spell_plain,
    "spaced": lambda speller, parts: tidied(spell_spaced(speller, parts, first_too=True)),
    "spaced inside": lambda speller, parts: spell_spaced(speller, parts, first_too=False),
}
