"""The private methods that our tokenizers override in transformers' two classes, under public names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizer, TokenizersBackend
from transformers.tokenization_python import Trie


def split_at(words: Iterable[str], text: str) -> list[str]:
    """`text` cut before and after each of `words`, the longest first if several match; the parts joined are `text`."""
    parts: list[str] = Trie(*[list(words)]).split(text)
    return parts


class _Decoding:
    def decoded(self, token_ids: list[int], *, skip_special_tokens: bool, **_: Any) -> str:
        """The text of `token_ids`; further keywords are those of `decode`."""
        raise NotImplementedError

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, *_: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return self.decoded(ids, skip_special_tokens=skip_special_tokens, **kwargs)


class RustTokenizer(_Decoding, TokenizersBackend):
    """A tokenizer over a `tokenizers.Tokenizer`."""

    def prepared(self, text: Any) -> Any:
        """A text, a pair's second text (or None), or lists of them, as they will be tokenised."""
        return text

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus(self.prepared(text), self.prepared(text_pair), *args, **kwargs)


class PythonTokenizer(_Decoding, PreTrainedTokenizer):
    """A tokenizer whose subclass splits text into pieces and maps pieces to ids."""

    def pieces_of(self, text: str) -> list[str]:
        """The pieces of a text without special tokens."""
        raise NotImplementedError

    def id_of(self, piece: str) -> int:
        """The id of a piece or special token."""
        raise NotImplementedError

    def piece_of(self, index: int) -> str:
        """The piece or special token of an id."""
        raise NotImplementedError

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.pieces_of(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.piece_of(index)
