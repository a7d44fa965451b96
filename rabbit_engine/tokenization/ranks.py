"""A tiktoken file and its exact equivalent in `tokenizers`. Independent of families, and needs no package."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rabbit_engine.errors import TokenizerNotFoundError
from rabbit_engine.tokenization.merges import derive_merges

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def looks_like_ranks(path: Path) -> bool:
    """Whether the file consists of lines of base64 and a number: tiktoken's format, under any name."""
    with path.open("rb") as file:
        fields = file.readline(1024).split()
    return len(fields) == 2 and fields[1].isdigit() and _is_base64(fields[0])


def read_ranks(path: Path) -> dict[bytes, int]:
    """token -> rank, which is its id. Raises TokenizerNotFoundError unless ranks count from 0 and every byte is a token."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise TokenizerNotFoundError(f"{path} is not a tiktoken file: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerNotFoundError(f"{path} does not rank its tokens from 0 on, or lacks one of the 256 bytes")
    return ranks


def _is_base64(field: bytes) -> bool:
    try:
        return bool(base64.b64decode(field, validate=True))
    except (ValueError, binascii.Error):
        return False


def byte_characters() -> list[str]:
    """The character `tokenizers`' ByteLevel uses for each byte: the byte itself if printable, else one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]


def convert_ranks(ranks: Mapping[bytes, int], specials: Iterable[str], *, digits: str, nfc: bool) -> Tokenizer:
    """`ranks` followed by `specials`, as a `tokenizers.Tokenizer` without added tokens or post-processor.

    `digits`: how many digits stay together, as a quantifier. tiktoken encodes a part that is a token as that token, whatever
    its merges would give; `ignore_merges` does the same.
    """
    characters = byte_characters()
    written = {"".join(characters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = derive_merges({token: -float(rank) for token, rank in written.items()})
    assert merges is not None, "ranks are distinct"  # noqa: S101
    vocabulary = written | {name: len(ranks) + index for index, name in enumerate(specials)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(merge.left, merge.right) for merge in merges], ignore_merges=True)
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN.format(digits=digits)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
