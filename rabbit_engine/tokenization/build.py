"""Builds a tokenizer from a family's name and a folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from rabbit_engine.errors import ConfigurationError, TokenizerNotFoundError
from rabbit_engine.tokenization.classes import FastTokenizer, Manner, PieceTokenizer
from rabbit_engine.tokenization.families import BAICHUAN, CHATGLM2, CHATGLM3, GLM4, INTERNLM, INTERNLM2, QWEN, TokenizerFamily
from rabbit_engine.tokenization.pieces import USER_DEFINED, PieceModel, convert, open_processor, read_pieces
from rabbit_engine.tokenization.ranks import convert_ranks, looks_like_ranks, read_ranks
from rabbit_engine.tokenization.settings import Settings, read_attributes, read_settings
from rabbit_engine.tokenization.spelling import Speller

logger = logging.getLogger(__name__)

_PROBES = (
    "",
    " ",
    "  a  b ",
    "\n\n\tdef f(x):\n    return x + 1\n",
    "Hello, world! It's 2024; 3.14159.",
    "你好世界。人工智能 ▁▁",
    "café cafe\u0301 \u202e한국어 ไทย",
    "😀👩\u200d🚀 \U0001f9ff \ue000 \x00 \ufffd",
    "<s></s><unk><0x0A>",
    "aaaaaaaaaaaa          ",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Specials:
    """The special tokens of one folder. `parsed`: those found in text; `named`: ids whose meaning differs from their piece."""

    attributes: Mapping[str, AddedToken]
    additional: tuple[AddedToken, ...]
    parsed: Mapping[str, AddedToken]
    named: Mapping[int, str]
    ids: Mapping[str, int]

    @property
    def hidden(self) -> set[str]:
        """Attributes that are not recognised in text: then `tokenizers` must not look for special tokens there."""
        return {token.content for token in self.attributes.values()} - self.parsed.keys()


def build_tokenizer(family: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a family without a class in transformers, built from its original files in `folder`; runs no code there.

    `family`: "chatglm" (ChatGLM2, ChatGLM3, GLM-4), "qwen", "internlm", "internlm2" or "baichuan". Ids equal those of the
    family's own tokenizer. If `tokenizers` cannot reproduce them, sentencepiece itself is used and the reason is logged.

    Raises TokenizerNotFoundError, MissingExtraError, or ConfigurationError for another family.
    """
    folder = Path(folder)
    if family not in _BUILDERS:
        raise ConfigurationError(f"family={family!r} has no tokenizer: known families are {', '.join(sorted(_BUILDERS))}")
    return _BUILDERS[family](read_settings(folder))


def _build_chatglm(settings: Settings) -> PreTrainedTokenizerBase:
    path = _find(settings.folder, GLM4.file)
    if looks_like_ranks(path):
        return _build_from_ranks(GLM4, settings)
    return _build_from_pieces(_chatglm_generation(settings), settings)


def _chatglm_generation(settings: Settings) -> TokenizerFamily:
    """ChatGLM2 or ChatGLM3, which share model files: told apart by the code next to them, or by names in the configs."""
    code = settings.folder / "tokenization_chatglm.py"
    said = code.read_text("utf-8", errors="replace") if code.is_file() else ""
    told = f"{said} {settings.chat_template} {settings.tokenizer} {settings.model.get('_name_or_path', '')}".lower()
    return CHATGLM3 if "<|observation|>" in told or "<|user|>" in told or "chatglm3" in told else CHATGLM2


def _build_qwen(settings: Settings) -> PreTrainedTokenizerBase:
    if settings.tokenizer.get("extra_vocab_file"):
        raise TokenizerNotFoundError("tokenizer_config.json names an extra_vocab_file: such vocabularies are not supported")
    raw = settings.generation.get("chat_format") == "raw"
    return _build_from_ranks(replace(QWEN, chat_template=None) if raw else QWEN, settings)


def _build_baichuan(settings: Settings) -> PreTrainedTokenizerBase:
    """Baichuan with its two conversation tokens, which generation_config.json gives as ids; 195 and 196 in every released model.

    No chat template if BOS is added: the family's own code then puts one before every message.
    """
    model = read_pieces(_find(settings.folder, BAICHUAN.file))
    user, assistant = (settings.generation.get(f"{role}_token_id", index) for role, index in (("user", 195), ("assistant", 196)))
    names = [model.pieces[index] if index < len(model.pieces) else "" for index in (user, assistant)]
    told = "user_token_id" in settings.generation or all(name.startswith("<reserved_") for name in names)
    if settings.tokenizer.get("add_bos_token", True) or not told or not all(names) or BAICHUAN.chat_template is None:
        return _build_from_pieces(replace(BAICHUAN, chat_template=None), settings, model)
    template = BAICHUAN.chat_template.replace("USER", names[0]).replace("ASSISTANT", names[1])
    return _build_from_pieces(
        replace(BAICHUAN, chat_template=template), settings, model, dict(zip(names, (user, assistant), strict=True))
    )


def _build_from_ranks(family: TokenizerFamily, settings: Settings) -> PreTrainedTokenizerBase:
    ranks = read_ranks(_find(settings.folder, family.file))
    specials = _read_specials(family, settings, {}, len(ranks))
    tokenizer = convert_ranks(ranks, family.commands, digits=family.digits, nfc=family.nfc)
    names = {index: name for name, index in specials.ids.items()}
    if any(names[index] != tokenizer.id_to_token(index) for index in names):
        raise TokenizerNotFoundError(f"{settings.folder} names special tokens, or ids of them, that {family.name} does not have")
    return _fast(tokenizer, _manner(family, specials, len(ranks)), specials, settings)


def _build_from_pieces(
    family: TokenizerFamily, settings: Settings, model: PieceModel | None = None, roles: Mapping[str, int] | None = None
) -> PreTrainedTokenizerBase:
    model = model or read_pieces(_find(settings.folder, family.file))
    specials = _read_specials(family, settings, {piece: index for index, piece in enumerate(model.pieces)}, len(model.pieces))
    manner = replace(_manner(family, specials, len(model.pieces)), markup=roles or specials.ids, speller=Speller(model))
    odd = next((name for name, token in specials.parsed.items() if token.lstrip or token.rstrip or token.single_word), None)
    tokenizer, reason = (None, f"{odd!r} depends on its neighbours") if odd else convert(model, specials.named)
    if tokenizer is not None and not _agrees(tokenizer, model):
        tokenizer, reason = None, "the two disagree on a test text"
    if tokenizer is not None:
        return _fast(tokenizer, manner, specials, settings)
    logger.warning("the tokenizer in %s uses sentencepiece itself, without offsets: %s", settings.folder, reason)
    return PieceTokenizer(
        vocab_file=str(model.path),
        manner=manner,
        parsed=specials.parsed,
        layouts=_layouts(family, settings, specials),
        **_keywords(family, settings, specials),
    )


def _agrees(tokenizer: Tokenizer, model: PieceModel) -> bool:
    """Whether sentencepiece itself gives the same ids for some awkward texts."""
    processor, whole = open_processor(model.path), list(model.of_kind(USER_DEFINED))[:2]
    texts = [*_PROBES, " ".join(whole), "".join(whole) + "x"]
    return all(processor.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids for text in texts)


def _read_specials(family: TokenizerFamily, settings: Settings, pieces: Mapping[str, int], count: int) -> _Specials:
    """Special tokens for `pieces` by name, of which there are `count` (or ranks). One without an id gets the next one."""
    said = {} if family.parses == "none" else settings.tokenizer
    attributes = read_attributes(said, family.attributes)
    added = settings.added
    parsed = {token.content: token for token in (*settings.additional, *added.values())}
    parsed |= _parsed_attributes(family, settings, attributes, parsed)
    ids = {name: count + index for index, name in enumerate(family.commands)}
    ids |= {token.content: index for index, token in added.items()}
    wanted = (*attributes.values(), *settings.additional)
    for token in wanted:
        if token.content not in ids:
            ids[token.content] = pieces.get(token.content, max([count - 1, *ids.values()]) + 1)
    if family.parses == "all":
        parsed |= {name: AddedToken(name, special=True, normalized=family.nfc) for name in family.commands}
    named = {index: name for name, index in ids.items() if pieces.get(name) != index}
    return _Specials(attributes=attributes, additional=settings.additional, parsed=parsed, named=named, ids=ids)


def _parsed_attributes(
    family: TokenizerFamily, settings: Settings, attributes: Mapping[str, AddedToken], parsed: Mapping[str, AddedToken]
) -> dict[str, AddedToken]:
    kept = {"named": attributes.keys(), "configured": settings.tokenizer.keys()}.get(family.parses, ())
    found = [token for name, token in attributes.items() if name in kept and token.content not in parsed]
    return {token.content: token for token in reversed(found)}  # of two with the same text, the first counts


def _manner(family: TokenizerFamily, specials: _Specials, count: int) -> Manner:
    """Decode like transformers 4: added tokens and those after the vocabulary stand apart unless they are attributes.

    `count`: the number of pieces or ranks.
    """
    special = {token.content for token in specials.additional}
    special |= set() if family.parses == "none" else {token.content for token in specials.attributes.values()}
    late = {token.content for token in specials.additional if specials.ids[token.content] >= count + len(family.commands)}
    silent = specials.hidden | (set(family.commands) if family.silent_commands else set())
    return Manner(
        family=family,
        names={index: name for name, index in specials.ids.items()},
        markup=specials.ids,
        apart=frozenset() if family.parses == "all" else frozenset((specials.parsed.keys() - special) | late),
        silent=frozenset(silent - specials.parsed.keys()),
    )


def _layouts(family: TokenizerFamily, settings: Settings, specials: _Specials) -> tuple[list[str], list[str]]:
    """The special tokens around a single text, "$A", and around a pair, "$A" and "$B"."""
    marks = {name: token.content for name, token in specials.attributes.items()}
    bos = [marks["bos_token"]] if family.adds_bos and settings.tokenizer.get("add_bos_token", True) else []
    eos = [marks["eos_token"]] if family.adds_bos and settings.tokenizer.get("add_eos_token", False) else []
    if family.front:
        return [*family.front, "$A"], [*family.front, "$A", "$B", marks["eos_token"]]
    single = [*bos, "$A", *eos]
    return single, [*single, *bos, "$B", *eos] if family.name == "Baichuan" else [*bos, "$A", "$B", *eos]


def _fast(tokenizer: Tokenizer, manner: Manner, specials: _Specials, settings: Settings) -> PreTrainedTokenizerBase:
    for token in specials.parsed.values():
        kept = AddedToken(token.content, special=token.special and not specials.hidden, normalized=token.normalized)
        (tokenizer.add_special_tokens if kept.special else tokenizer.add_tokens)([kept])
    layouts = _layouts(manner.family, settings, specials)
    around = {name for layout in layouts for name in layout if not name.startswith("$")}
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{name}:0" for name in layouts[0]],
            pair=[f"{name}:{int(name == '$B')}" for name in layouts[1]],
            special_tokens=[(name, specials.ids[name]) for name in sorted(around)],
        )
    make: Any = FastTokenizer
    made = make(tokenizer_object=tokenizer, **_keywords(manner.family, settings, specials))
    made._manner = manner
    return made  # type: ignore[no-any-return]


def _keywords(family: TokenizerFamily, settings: Settings, specials: _Specials) -> dict[str, Any]:
    known = {token.content for token in specials.attributes.values()}
    extra = [*family.commands] if family.parses in ("none", "configured") and specials.hidden else []
    extra += [token.content for token in specials.additional]
    return {
        "padding_side": family.padding_side,
        "chat_template": settings.chat_template or family.chat_template,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": bool(specials.hidden),
        "extra_special_tokens": [name for name in dict.fromkeys(extra) if name not in known],
        **settings.keywords,
        **{name: token.content for name, token in specials.attributes.items()},
    }


def _find(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise TokenizerNotFoundError(f"{folder} has no {name}, which its tokenizer needs")
    return path


_BUILDERS: dict[str, Callable[[Settings], PreTrainedTokenizerBase]] = {
    "chatglm": _build_chatglm,
    "qwen": _build_qwen,
    "internlm": lambda settings: _build_from_pieces(INTERNLM, settings),
    "internlm2": lambda settings: _build_from_pieces(INTERNLM2, settings),
    "baichuan": _build_baichuan,
}
