"""The tokenizer classes: transformers' own, with the chat templates and decoding of the families."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import AddedToken

from rabbit_engine.errors import CannotSaveError, ConfigurationError
from rabbit_engine.tokenization.families import TokenizerFamily
from rabbit_engine.tokenization.pieces import literals, open_processor
from rabbit_engine.tokenization.spelling import SPELLINGS, Part, Speller
from rabbit_engine.transformers_bridge.tokenization import PythonTokenizer, RustTokenizer, split_at

logger = logging.getLogger(__name__)

_PRIVATE = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # noncharacters: Unicode keeps them for uses like this one


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """What a tokenizer needs besides its vocabulary: `names` of special tokens by id, `markup` of conversations to ids.

    When decoding, those in `apart` are separated by spaces, and those in `silent` are omitted.
    """

    family: TokenizerFamily
    names: Mapping[int, str]
    markup: Mapping[str, int]
    apart: frozenset[str] = frozenset()
    silent: frozenset[str] = frozenset()
    speller: Speller | None = None


class FamilyMixin:
    """A family's conversations and decoding, on top of either tokenizer class of transformers."""

    _manner: Manner

    def _text_ids(self, text: str) -> list[int]:
        """Ids of a text, without looking for special tokens."""
        raise NotImplementedError

    def apply_chat_template(self, conversation: Any, tools: Any = None, *args: Any, tokenize: bool = True, **kwargs: Any) -> Any:
        """transformers' `apply_chat_template`; special tokens in messages stay text if the family's own code treats them so.

        Raises ConfigurationError for `return_assistant_tokens_mask`: it needs offsets, which such ids lack.
        """
        parent: Any = super()
        if not tokenize or self._manner.family.content == "template":
            return parent.apply_chat_template(conversation, tools, *args, tokenize=tokenize, **kwargs)
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ConfigurationError(f"return_assistant_tokens_mask is not supported for {self._manner.family.name}")
        kwargs.pop("sanitize_control_tokens", None)
        asked = {name: kwargs.pop(name) for name in _OUTPUT & kwargs.keys()}
        guard, cut = _free_characters([conversation, tools, kwargs])
        markup = re.compile(literals(set(self._manner.markup)))
        said = [_guarded(item, markup, guard) for item in (_messages(conversation), tools)]
        text = parent.apply_chat_template(*said, *args, tokenize=False, cut=cut, **kwargs)
        texts = [text] if isinstance(text, str) else text
        rows = [self._marked_ids(row, markup, guard, cut) for row in texts]
        return self._packed(rows, batched=not isinstance(text, str), **asked)

    def _marked_ids(self, text: str, markup: re.Pattern[str], guard: str, cut: str) -> list[int]:
        this: Any = self
        found: list[int] = []
        for part in re.split(f"({markup.pattern})|{cut}", text):
            if part in self._manner.markup:
                found.append(self._manner.markup[part])
            elif part and self._manner.family.content == "parsed":
                found += this.encode(part.replace(guard, ""), add_special_tokens=False)
            elif part:
                found += self._text_ids(part.replace(guard, ""))
        return found

    def _packed(
        self,
        rows: list[list[int]],
        *,
        batched: bool,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        this: Any = self
        if truncation and (limit := max_length or this.model_max_length) < int(1e9):
            rows = [row[:limit] if this.truncation_side == "right" else row[-limit:] for row in rows]
        packed = this.pad(
            {"input_ids": rows if batched or return_tensors else rows[0]},
            padding=padding,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return packed if return_dict else packed["input_ids"]

    def decoded(self, token_ids: list[int], *, skip_special_tokens: bool, **kwargs: Any) -> str:
        """Decode like the family's own code; `skip_special_tokens` omits every special token."""
        manner, texts, run = self._manner, list[str](), list[int]()
        for index in token_ids:
            name = manner.names.get(index)
            if name in manner.apart and not skip_special_tokens:
                texts += [text for text in (self._spelled(run), name) if text]
                run = []
            elif not (skip_special_tokens and name):
                run.append(index)
        texts += [self._spelled(run)] if run else []
        return (" " if kwargs.get("spaces_between_special_tokens", True) else "").join(texts)

    def _spelled(self, ids: list[int]) -> str:
        """The text of ids between separated tokens."""
        this: Any = self
        if self._manner.speller is None:
            return str(this.backend_tokenizer.decode(ids, skip_special_tokens=False))
        return SPELLINGS[self._manner.family.spelling](
            self._manner.speller, self._parts(ids, len(self._manner.speller.model.pieces))
        )

    def _parts(self, ids: Iterable[int], count: int) -> list[Part]:
        """Split ids into special tokens and runs of pieces, of which there are `count`; ids that a user added are special too."""
        this: Any = self
        parts: list[Part] = []
        for index in ids:
            name = self._manner.names.get(index)
            if name is None and index < count:
                run = parts.pop()[1] if parts and not parts[-1][0] else []
                parts.append(("", [*run, index]))
                continue
            name = name or this.convert_ids_to_tokens(index) or ""  # an unknown id decodes to nothing
            parts.append(("" if name in self._manner.silent else name, []))
        return parts


_OUTPUT = {"padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}


def _messages(conversation: Any) -> Any:
    return getattr(conversation, "messages", conversation)


def _free_characters(value: Any) -> list[str]:
    """Two characters that occur nowhere in `value`."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    free = [char for char in _PRIVATE if char not in text]
    if len(free) < 2:
        raise ConfigurationError("the conversation uses every noncharacter from U+FDD0 to U+FDEF")
    return free[:2]


def _guarded(value: Any, markup: re.Pattern[str], guard: str) -> Any:
    """`value` with `guard` inside whatever in its strings looks like a special token."""
    if isinstance(value, str):
        return markup.sub(lambda found: found[0][:1] + guard + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _guarded(item, markup, guard) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_guarded(item, markup, guard) for item in value]
    return value


class FastTokenizer(FamilyMixin, RustTokenizer):
    """A `FamilyMixin` over a `tokenizers.Tokenizer`: has offsets, and saves to one file."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save a tokenizer that AutoTokenizer loads and that gives the same ids.

        A chat template that needs this class's `apply_chat_template` is left out: another class would give other ids.
        """
        family, template = self._manner.family, self.chat_template
        if family.content != "template" and template == family.chat_template and template is not None:
            logger.warning("the conversations of %s need build_tokenizer: saved without a chat template", family.name)
            self.chat_template = None
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.chat_template = template

    def prepared(self, text: Any) -> Any:
        """`text` in NFC by Python's tables if `tokenizers`' older ones differ; else unchanged, to keep the offsets."""
        if isinstance(text, (list, tuple)):
            return type(text)(self.prepared(item) for item in text)
        if not (self._manner.family.nfc and isinstance(text, str)) or text.isascii():
            return text
        composed = unicodedata.normalize("NFC", text)
        return text if composed == self.backend_tokenizer.normalizer.normalize_str(text) else composed

    def _text_ids(self, text: str) -> list[int]:
        backend, text = self.backend_tokenizer, self.prepared(text)
        text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        splits = [text] if backend.pre_tokenizer is None else [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for split in splits for token in backend.model.tokenize(split)]


class PieceTokenizer(FamilyMixin, PythonTokenizer):
    """A `FamilyMixin` over sentencepiece, for models that `tokenizers` cannot reproduce: no offsets, and slower."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        manner: Manner,
        parsed: Mapping[str, AddedToken],
        layouts: tuple[Sequence[str], Sequence[str]],
        **kwargs: Any,
    ) -> None:
        self._manner, self.vocab_file, self._layouts, self._parsed = manner, vocab_file, layouts, dict(parsed)
        self._processor = open_processor(Path(vocab_file))
        self._ids = {name: index for index, name in manner.names.items()}
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        """The number of pieces and of the special tokens after them."""
        return max(len(self._processor), 1 + max(self._ids.values(), default=0))

    def get_vocab(self) -> dict[str, int]:
        """Map each piece and special token to its id."""
        pieces = {self._processor.id_to_piece(index): index for index in range(len(self._processor))}
        return {**pieces, **self._ids, **self.added_tokens_encoder}

    def tokenize(self, text: str, *_: Any, **kwargs: Any) -> list[str]:
        """The tokens of `text`, with special tokens if they are parsed."""
        if kwargs.get("split_special_tokens", False):
            return self.pieces_of(text)
        parts = split_at(self._parsed, text)
        for index, part in enumerate(parts):
            if part in self._parsed:
                _settle(parts, index, self._parsed[part])
        tokens = [[part] if part in self._parsed else self.pieces_of(part) for part in parts if part]
        return [token for group in tokens for token in group]

    def pieces_of(self, text: str) -> list[str]:
        """The pieces of a text without special tokens."""
        return list(self._processor.encode(text, out_type=str))

    def _text_ids(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def id_of(self, piece: str) -> int:
        """The id of a piece or special token."""
        return self._ids[piece] if piece in self._ids else int(self._processor.piece_to_id(piece))

    def piece_of(self, index: int) -> str:
        """The piece or special token of an id."""
        return self._manner.names.get(index) or str(self._processor.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens into text."""
        return self.decoded([self.id_of(token) for token in tokens], skip_special_tokens=False)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """Add the special tokens around a text or a pair."""
        texts = {"$A": token_ids_0, "$B": token_ids_1 or []}
        layout = self._layouts[token_ids_1 is not None]
        return [index for name in layout for index in texts.get(name) or ([] if name in texts else [self.id_of(name)])]

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """Raises CannotSaveError: a tokenizer loaded from the saved files would give other ids."""
        raise CannotSaveError(f"this tokenizer cannot be saved: copy its original files from {Path(self.vocab_file).parent}")


def _settle(parts: list[str], index: int, token: AddedToken) -> None:
    """Apply a token's properties to its neighbours; one that must be a single word may become text again."""
    left = parts[index - 1] if index else ""
    right = parts[index + 1] if index + 1 < len(parts) else ""
    if token.rstrip and right:
        parts[index + 1] = right.lstrip()
    if token.lstrip and left:
        parts[index - 1] = left.rstrip()
    if token.single_word and left and left[-1] != " ":
        parts[index - 1], parts[index] = parts[index - 1] + parts[index], ""
    elif token.single_word and right and right[0] != " ":
        parts[index + 1], parts[index] = parts[index] + parts[index + 1], ""
