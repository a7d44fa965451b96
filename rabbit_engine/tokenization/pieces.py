"""A sentencepiece model as a value, and its exact equivalent in `tokenizers`, if it has one. Independent of families."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rabbit_engine.errors import MissingExtraError, TokenizerNotFoundError, first_line
from rabbit_engine.tokenization.merges import derive_merges, merged
from rabbit_engine.utils.extras import missing_extra

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceModel:
    """`tokenizer.model`: pieces, scores and kinds by id, and the settings of its normaliser."""

    path: Path
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    model_type: int
    byte_fallback: bool
    charsmap: bool
    dummy_prefix: bool
    strips_spaces: bool
    escapes_spaces: bool
    space_is_suffix: bool
    denormalizes: bool
    unknown_surface: str

    def of_kind(self, *kinds: int) -> dict[str, int]:
        """Map the pieces of these kinds to their ids."""
        return {piece: index for index, piece in enumerate(self.pieces) if self.kinds[index] in kinds}

    @property
    def unknown_id(self) -> int:
        """The id of the unknown piece; every sentencepiece model has one."""
        return self.kinds.index(UNKNOWN)


def open_processor(path: Path) -> Any:
    """sentencepiece's own processor. Raises MissingExtraError or TokenizerNotFoundError."""
    try:
        import sentencepiece
    except ImportError as error:
        raise _missing(path, error) from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerNotFoundError(f"{path} is not a sentencepiece model: {first_line(error)}") from error


def read_pieces(path: Path) -> PieceModel:
    """Read the model file at `path`. Raises MissingExtraError or TokenizerNotFoundError."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise _missing(path, error) from error
    serialized = open_processor(path).serialized_model_proto()  # sentencepiece parses it first, with a precise error
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(serialized)  # type: ignore[attr-defined]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return PieceModel(
        path=path,
        pieces=tuple(piece.piece for piece in proto.pieces),
        scores=tuple(piece.score for piece in proto.pieces),
        kinds=tuple(piece.type for piece in proto.pieces),
        model_type=trainer.model_type,
        byte_fallback=trainer.byte_fallback,
        charsmap=bool(normalizer.precompiled_charsmap),
        dummy_prefix=normalizer.add_dummy_prefix,
        strips_spaces=normalizer.remove_extra_whitespaces,
        escapes_spaces=normalizer.escape_whitespaces,
        space_is_suffix=trainer.treat_whitespace_as_suffix,
        denormalizes=bool(proto.denormalizer_spec.precompiled_charsmap),
        unknown_surface=trainer.unk_surface if trainer.HasField("unk_surface") else " \u2047 ",
    )


def _missing(path: Path, error: ImportError) -> MissingExtraError:
    return missing_extra(path.name, "sentencepiece", error)


def obstacle(model: PieceModel) -> str | None:
    """Why `tokenizers` cannot reproduce sentencepiece for this model; None if `convert` may try."""
    whole = model.of_kind(USER_DEFINED)
    reasons = {
        "it is not a BPE model": model.model_type != BPE,
        "its normaliser maps characters": model.charsmap,
        "its spaces are suffixes or not escaped": model.space_is_suffix or not model.escapes_spaces,
        "it maps characters back when it decodes": model.denormalizes,
        "it has unused pieces": UNUSED in model.kinds,
        "a user-defined piece contains a space": any(" " in piece for piece in whole),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def convert(model: PieceModel, named: Mapping[int, str]) -> tuple[Tokenizer | None, str]:
    """`model` as a `tokenizers.Tokenizer`, or None and the reason. No added tokens, no post-processor.

    `named`: ids whose name differs from their piece, or that come after the pieces; never produced from text.
    """
    if reason := obstacle(model):
        return None, reason
    priorities = {piece: model.scores[index] for piece, index in model.of_kind(NORMAL).items()}
    merges = derive_merges(priorities)
    if merges is None:
        return None, "merges of equal score want the same symbols"
    vocabulary = {piece: index for index, piece in enumerate(model.pieces) if index not in named}
    vocabulary |= {name: index for index, name in named.items()}
    renamed = {model.pieces[index]: name for index, name in named.items() if index < len(model.pieces)}
    whole = model.of_kind(USER_DEFINED)
    if lost := _lost_pieces(model, vocabulary, named, {symbol for merge in merges for symbol in (merge.left, merge.right)}):
        return None, lost
    aliases = {piece: name for piece, name in renamed.items() if piece in whole}
    whole_names = {aliases.get(piece, piece) for piece in whole}
    odd = vocabulary.keys() - whole_names - {merge.made for merge in merges} - {piece for piece in priorities if len(piece) == 1}
    splits = _splits(whole_names, odd, priorities, model.byte_fallback)
    if splits is None:
        return None, "a name in its vocabulary cannot be told from text"
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(merge.left, merge.right) for merge in merges],
            unk_token=named.get(model.unknown_id, model.pieces[model.unknown_id]),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(whole),
        )
    )
    tokenizer.normalizer = _normalizer(model, aliases)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = _decoder(model)
    return tokenizer, ""


def _lost_pieces(model: PieceModel, vocabulary: Mapping[str, int], named: Mapping[int, str], symbols: set[str]) -> str | None:
    """Why a symbol that merges need, or a byte, has no id of its own."""
    if lost := next((symbol for symbol in symbols if symbol not in vocabulary), None):
        return f"{lost!r} is part of pieces but not a piece itself"
    if twice := set(named.values()) & set(model.pieces):
        return f"the special token {min(twice)!r} is a piece too"
    if any(index < len(model.pieces) and model.kinds[index] == NORMAL for index in named):
        return "a piece found in text has a second name"
    if model.byte_fallback and len(model.of_kind(BYTE)) != 256:
        return "bytes are missing"
    return None


def _normalizer(model: PieceModel, aliases: Mapping[str, str]) -> Any:
    steps: list[Any] = []
    if model.strips_spaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), " ")]
    if model.dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.strips_spaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    steps += [normalizers.Replace(piece, name) for piece, name in aliases.items()]
    return normalizers.Sequence(steps)


def _decoder(model: PieceModel) -> Any:
    strips = model.dummy_prefix or model.strips_spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strips else []))


def _splits(whole: set[str], odd: set[str], priorities: Mapping[str, float], bytes_known: bool) -> list[Any] | None:
    """Pre-tokenizers that isolate user-defined pieces, so that text equal to a vocabulary entry becomes that entry.

    `odd`: names that text must never become. They are cut after their first symbol, where no merge happens either, and so
    is the rest if it is such a name; None if that is impossible.
    """
    if not whole:
        return []
    inside, remains = re.compile(literals(whole)), {}
    cuts = []
    for name in odd:
        if inside.search(name):
            continue
        first, *others = merged(name, priorities)
        if not others or (not bytes_known and any(symbol not in priorities for symbol in (first, *others))):
            return None
        remains[name] = "".join(others)
        cuts.append(rf"{re.escape(first)}(?={re.escape(remains[name])}\z)")
    cutter = pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(sorted(cuts))})"), "isolated")
    return [pre_tokenizers.Split(Regex(literals(whole)), "isolated"), *[cutter] * _depth(remains)]


def _depth(remains: Mapping[str, str]) -> int:
    """The number of cuts until no name is left."""
    depth, names = 0, set(remains)
    while names:
        depth, names = depth + 1, {remains[name] for name in names if remains[name] in remains}
    return depth


def literals(texts: set[str]) -> str:
    """A regular expression for the longest of `texts`, as a prefix tree: fast even if thousands share a beginning."""
    tree: dict[str, Any] = {}
    for text in texts:
        functools.reduce(lambda node, char: node.setdefault(char, {}), text, tree)[""] = {}
    return _branch(tree)


def _branch(node: dict[str, Any]) -> str:
    arms = [re.escape(char) + _branch(child) for char, child in sorted(node.items()) if char]
    if not arms:
        return ""
    joined = arms[0] if len(arms) == 1 and "" not in node else f"(?:{'|'.join(arms)})"
    return joined + ("?" if "" in node else "")
