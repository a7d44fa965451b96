"""Tokenizers from original files give the ids of sentencepiece and tiktoken, which are asked here, on any text.

Released vocabularies are not at hand: small ones with the same options are trained on the standard library's documentation.
"""

from __future__ import annotations

import json
import pickle
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models
from vocabularies import (
    ATOMS,
    GLM4_SPECIALS,
    QWEN_SPECIALS,
    RESERVED,
    Made,
    apart,
    corpus,
    glm4,
    qwen,
    rank_lines,
    ranks,
    tiktoken_encoding,
    token,
    trained,
    write_files,
)

from rabbit_engine.errors import CannotSaveError, ConfigurationError, MissingExtraError, TokenizerNotFoundError
from rabbit_engine.tokenization import build_tokenizer
from rabbit_engine.tokenization.classes import PieceTokenizer
from rabbit_engine.tokenization.merges import derive_merges, merged
from rabbit_engine.tokenization.pieces import convert, literals, read_pieces
from rabbit_engine.tokenization.spelling import Speller

TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(ATOMS), max_size=12).map("".join))
OPTIONS: dict[str, dict[str, Any]] = {
    "dummy prefix": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "user's pieces": {"user_defined_symbols": [*RESERVED, "\n"]},
    "user's pieces, no dummy prefix": {"user_defined_symbols": [*RESERVED, "▁▁", "▁▁▁▁", "the"], "add_dummy_prefix": False},
    "spaces stripped": {"remove_extra_whitespaces": True, "user_defined_symbols": RESERVED},
    "no bytes": {"byte_fallback": False},
    "pieces across words": {"split_by_whitespace": False, "split_by_unicode_script": False, "split_by_number": False},
}
many = settings(max_examples=250, deadline=None)


@many
@given(
    st.dictionaries(st.text("ab_", min_size=2, max_size=5), st.integers(-6, 0), max_size=12),
    st.lists(st.text("ab_", max_size=14)),
)
def test_ranked_merges_do_what_sentencepiece_does_or_there_are_none(priorities: dict[str, int], texts: list[str]) -> None:
    letters = {"<unk>": 0, "a": -90, "b": -91, "_": -92}
    merges = derive_merges({**letters, **priorities})
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score in {**letters, **priorities}.items():
        proto.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else 1)
    proto.trainer_spec.model_type, proto.normalizer_spec.add_dummy_prefix = 2, False
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert all(merged(text, priorities) == processor.encode(text, out_type=str) for text in texts)
    if merges is None:
        assert len(set(priorities.values())) < len(priorities), "distinct scores can always be ranked"
        return
    vocabulary = {piece: index for index, piece in enumerate([*letters, *priorities])}
    model = models.BPE(vocab=vocabulary, merges=[(merge.left, merge.right) for merge in merges])
    assert all([token.value for token in model.tokenize(text)] == processor.encode(text, out_type=str) for text in texts if text)


def test_a_tie_that_only_its_place_decides_is_not_ranked() -> None:
    assert derive_merges({"ab": 0.0, "ba": 0.0}) is None  # "aba" is ab|a, "bab" is ba|b: the left one of either
    assert derive_merges({"ab": 0.0, "bc": 0.0}) is not None
    assert derive_merges({"ab": 0.0, "cd": 0.0, "abc": 1.0}) is None


@given(st.sets(st.text("ab|.*(\n", min_size=1, max_size=4), min_size=1, max_size=8), st.text("ab|.*(\nx", max_size=20))
def test_literals_match_the_longest(texts: set[str], text: str) -> None:
    longest_first = "|".join(re.escape(item) for item in sorted(texts, key=len, reverse=True))
    assert [found[0] for found in re.finditer(literals(texts), text)] == re.findall(longest_first, text)


@pytest.mark.parametrize("name", OPTIONS)
def test_pieces_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(json.dumps(OPTIONS[name])))
    model = read_pieces(path)
    tokenizer, reason = convert(model, {})
    processor, speller = sentencepiece.SentencePieceProcessor(model_file=str(path)), Speller(model)
    assert tokenizer is not None, reason

    @many
    @given(TEXTS)
    def same(text: str) -> None:
        ids = processor.encode(text)
        assert tokenizer.encode(text).ids == ids
        assert speller.spell(ids) == processor.decode(ids)

    @many
    @given(st.lists(st.one_of(st.integers(0, 1499), st.integers(3, 258)), max_size=12))
    def same_text(ids: list[int]) -> None:
        assert speller.spell(ids) == processor.decode(ids)

    same()
    same_text()
    for text in ("\n".join(corpus()[:300]), "a" * 10_000, " " * 3_000, "好" * 3_000, "<reserved_1>" * 500):
        assert tokenizer.encode(text).ids == processor.encode(text)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        pytest.param({"model_type": "unigram"}, {}, id="unigram"),
        pytest.param({"normalization_rule_name": "nmt_nfkc"}, {}, id="characters mapped"),
        pytest.param({"treat_whitespace_as_suffix": True}, {}, id="spaces as suffixes"),
        pytest.param({}, {"eos_token": token("</s>", single_word=True)}, id="a token that is a word"),
    ],
)
def test_a_model_that_tokenizers_cannot_reproduce_uses_sentencepiece(
    options: dict[str, Any], config: dict[str, Any], pieces: Callable[..., Made], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, processor = pieces("internlm", options, tokenizer_config_json=config)
    assert isinstance(tokenizer, PieceTokenizer)
    assert "uses sentencepiece itself" in caplog.text
    for text in [*ATOMS, *corpus()[:100], "ﬁ ① \uff21  b"]:
        if not any(name in text for name in ("<s>", "</s>", "<unk>")):
            assert tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tokenizer("a </s> b")["input_ids"] == [1, *processor.encode("a "), 2, *processor.encode(" b")]
    if config:
        assert tokenizer.encode("a</s>") == [1, *processor.encode("a</s>")]
    assert tokenizer(["a", "b c d"], padding=True, return_tensors="pt")["input_ids"].shape[0] == 2
    assert pickle.loads(pickle.dumps(tokenizer)).encode("a b") == tokenizer.encode("a b")
    with pytest.raises(CannotSaveError, match="original files"):
        tokenizer.save_pretrained("anywhere")


def test_a_special_token_that_is_a_piece_too_keeps_both_ids(pieces: Callable[..., Made]) -> None:
    files = {"config_json": {"_name_or_path": "THUDM/chatglm3-6b"}}
    tokenizer, processor = pieces("chatglm", {"user_defined_symbols": ["sop"]}, **files)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Aesop"}])["input_ids"]
    assert ids == [1501, 1503, 1506, *processor.encode("\n"), *processor.encode("Aesop")]
    assert processor.piece_to_id("sop") in ids
    assert tokenizer.encode("Aesop")[2:] == [
        1503 if piece == "sop" else processor.piece_to_id(piece) for piece in processor.encode("Aesop", out_type=str)
    ]


@many
@given(TEXTS)
def test_glm4_is_tiktoken_after_its_prefix(text: str) -> None:
    tokenizer, encoding = glm4(), tiktoken_encoding("{1,3}", GLM4_SPECIALS)
    start, base = len(ranks()), encoding.encode_ordinary(text)
    assert tokenizer.encode(text) == [start + 2, start + 4, *base]
    assert tokenizer.decode(base) == text


@many
@given(TEXTS)
def test_qwen_is_tiktoken_on_nfc_with_special_tokens(text: str) -> None:
    tokenizer, encoding = qwen(), tiktoken_encoding("", QWEN_SPECIALS)
    base = encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert tokenizer.encode(text) == base
    assert tokenizer.decode(base) == encoding.decode(base) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1500), max_size=10))
def test_bytes_that_are_no_text_decode_as_tiktoken_does(ids: list[int]) -> None:
    assert qwen().decode(ids) == tiktoken_encoding("", QWEN_SPECIALS).decode(ids)


def test_long_texts_are_those_of_tiktoken() -> None:
    for text in ("\n".join(corpus()[:300]), "a" * 10_000, " " * 3_000, "好" * 3_000, "zqxjkv 龘龘\n\n\n\t\t"):
        assert qwen().encode(text) == tiktoken_encoding("", QWEN_SPECIALS).encode_ordinary(text)


def test_glm4_parses_the_special_tokens_its_files_name(tmp_path: Path) -> None:
    start = len(ranks())
    named = {str(start + index): token(name) for index, name in enumerate(GLM4_SPECIALS)}
    config = {"added_tokens_decoder": named, "additional_special_tokens": GLM4_SPECIALS, "eos_token": "<|endoftext|>"}
    tokenizer = build_tokenizer("chatglm", write_files(tmp_path, tokenizer_model=rank_lines(), tokenizer_config_json=config))
    encoding = tiktoken_encoding("{1,3}", GLM4_SPECIALS)
    text = "a\n\n<|user|>\n b [gMASK]<sop><|observation|"
    ids = apart(text, GLM4_SPECIALS, encoding.encode_ordinary, {name: start + i for i, name in enumerate(GLM4_SPECIALS)})
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([start + 2, *encoding.encode_ordinary("a"), start + 7], skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
    ("family", "name"), [("qwen", "qwen.tiktoken"), ("chatglm", "tokenizer.model"), ("baichuan", "tokenizer.model")]
)
def test_a_missing_file_is_named(family: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotFoundError, match=re.escape(name)):
        build_tokenizer(family, tmp_path)


def test_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="baichuan, chatglm, internlm"):
        build_tokenizer("llama", tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"YQ== 0\nYg== 1\n", "256 bytes"), (b"YQ== 0\nYg== 5\n", "rank"), (b"YQ== x\n", "not a tiktoken file")],
)
def test_a_rank_file_with_holes_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotFoundError, match=said):
        build_tokenizer("qwen", write_files(tmp_path, qwen_tiktoken=content))


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerNotFoundError, match="not a sentencepiece model"):
        build_tokenizer("internlm", write_files(tmp_path, tokenizer_model=b"\x0a\x05not a model"))


def test_extra_vocabularies_of_qwen_are_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path, qwen_tiktoken=rank_lines(), tokenizer_config_json={"extra_vocab_file": "more.tiktoken"})
    with pytest.raises(TokenizerNotFoundError, match="extra_vocab_file"):
        build_tokenizer("qwen", files)


@pytest.mark.parametrize("package", ["sentencepiece", "sentencepiece.sentencepiece_model_pb2"])
def test_a_missing_package_says_how_to_install_it(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_files(tmp_path, tokenizer_model=trained("{}"))
    monkeypatch.setitem(sys.modules, package, None)
    if "." in package:
        monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    with pytest.raises(MissingExtraError, match=r"pip install .*sentencepiece"):
        build_tokenizer("baichuan", files)
