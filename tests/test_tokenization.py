"""Tokenizers from original files give the ids of sentencepiece and tiktoken, which are asked here, on any text.

Released vocabularies are not at hand: small ones with the same options are trained on the standard library's documentation.
"""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import pickle
import pydoc_data.topics
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from rabbit_engine.errors import CannotSaveError, ConfigurationError, MissingExtraError, TokenizerNotFoundError
from rabbit_engine.tokenization import build_tokenizer
from rabbit_engine.tokenization.classes import FastTokenizer, PieceTokenizer
from rabbit_engine.tokenization.merges import derive_merges, merged
from rabbit_engine.tokenization.pieces import convert, literals, read_pieces
from rabbit_engine.tokenization.ranks import byte_characters
from rabbit_engine.tokenization.spelling import Speller

PHRASES = [
    *("第一章", "你好世界", "今天天气很好", "我们去公园散步吧", "人工智能是计算机科学的一个分支"),
    *("机器学习", "深度学习", "大语言模型", "分词器", "编码", "解码"),
]
GLM_COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_SPECIALS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES)
RESERVED = [f"<reserved_{index}>" for index in range(120)]
UNUSED = [f"[UNUSED_TOKEN_{index}]" for index in range(138, 147)]
ACTIONS = ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ATOMS = (
    *(
        "a",
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "the",
        "ing",
        "return self",
        "def ",
        "__init__",
        "12345",
        "===",
        "I'LL",
        "'\u017f",
    ),
    *(
        "你好",
        "今天天气",
        "龘",
        "😀",
        "👩\u200d🚀",
        "é",
        "e\u0301",
        "\u0323\u0307",
        "\u0338",
        "\u0362\u08cf",
        "ﬁ",
        "각",
        "\u0627",
        "½",
        "\u3000",
    ),
    *("\u2028", "\xa0", "▁", "▁▁", "\x00", "\ufffd", "\ufdd0", "\ue000", "\U00031350", "<", ">", "]", "|>"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<0xE4>",
        "<reserved_1>",
        "<reserved_10>",
        "<reserved_106>",
        "<reserved_",
        "[UNUSED_TOKEN_146]",
    ),
    *(
        "[gMASK]",
        "sop",
        "Aesop philosophy",
        "<sop>",
        *ROLES,
        "<|im_start|>",
        "<|im_end|>",
        "<|extra_1|>",
        "<|extra_10|>",
        "<|endoftext|>",
    ),
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(ATOMS), max_size=12).map("".join))
BYTE_PAIRS = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
PLAIN = {**BYTE_PAIRS, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 0.995}
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


@functools.cache
def corpus() -> list[str]:
    lines = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines() if line.strip()]
    return lines[:6000] + [first + second for first in PHRASES for second in PHRASES]


@functools.cache
def trained(options: str) -> bytes:
    """A sentencepiece model of 1,500 pieces with these options (JSON)."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=written, vocab_size=1500, minloglevel=2, **{**PLAIN, **json.loads(options)}
    )
    return written.getvalue()


@functools.cache
def ranks() -> dict[bytes, int]:
    """Byte-level BPE by `tokenizers`' trainer, and tokens that no merges reach, as released files have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(corpus(), trainer)
    of = {character: byte for byte, character in enumerate(byte_characters())}
    names = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    tokens = [bytes(of[character] for character in name) for name in names] + [b"zqxjkv", "龘龘".encode(), b"\n\n\n\t\t"]
    return {token: rank for rank, token in enumerate(tokens)}


def rank_lines() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks().items())


Made = tuple[Any, Any]
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """`folder(name=content, ...)`: files whose names have `_` for `.`; a dict is written as JSON."""

    def write(**files: Any) -> Path:
        for name, content in files.items():
            path = tmp_path / ".".join(name.rsplit("_", 1))
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return tmp_path

    return write


@pytest.fixture
def pieces(folder: Folder) -> Callable[..., Made]:
    """`pieces(family, options, **files)`: the tokenizer under test, and sentencepiece with the same file."""

    def make(family: str, options: Mapping[str, Any] = {}, **files: Any) -> Made:
        model = trained(json.dumps(dict(options)))
        made = build_tokenizer(family, folder(tokenizer_model=model, **files))
        return made, sentencepiece.SentencePieceProcessor(model_proto=model)

    return make


def token(content: str, special: bool = True, **properties: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "special": special, **properties}


def apart(text: str, specials: Iterable[str], encode: Callable[[str], list[int]], ids: Mapping[str, int]) -> list[int]:
    """`text` cut at special tokens and encoded part by part, as the slow tokenizers of transformers 4 do."""
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    return [index for part in parts if part for index in ([ids[part]] if part in ids else encode(part))]


# --- merges -----------------------------------------------------------------------------------------------------------


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


# --- sentencepiece ----------------------------------------------------------------------------------------------------


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


# --- tiktoken ---------------------------------------------------------------------------------------------------------


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


@given(st.lists(st.integers(0, 1500), max_size=10))
def test_bytes_that_are_no_text_decode_as_tiktoken_does(ids: list[int]) -> None:
    assert qwen().decode(ids) == tiktoken_encoding("", QWEN_SPECIALS).decode(ids)


def test_long_texts_are_those_of_tiktoken() -> None:
    for text in ("\n".join(corpus()[:300]), "a" * 10_000, " " * 3_000, "好" * 3_000, "zqxjkv 龘龘\n\n\n\t\t"):
        assert qwen().encode(text) == tiktoken_encoding("", QWEN_SPECIALS).encode_ordinary(text)


def test_glm4_parses_the_special_tokens_its_files_name(folder: Folder) -> None:
    start = len(ranks())
    named = {str(start + index): token(name) for index, name in enumerate(GLM4_SPECIALS)}
    config = {"added_tokens_decoder": named, "additional_special_tokens": GLM4_SPECIALS, "eos_token": "<|endoftext|>"}
    tokenizer = build_tokenizer("chatglm", folder(tokenizer_model=rank_lines(), tokenizer_config_json=config))
    encoding = tiktoken_encoding("{1,3}", GLM4_SPECIALS)
    text = "a\n\n<|user|>\n b [gMASK]<sop><|observation|"
    ids = apart(text, GLM4_SPECIALS, encoding.encode_ordinary, {name: start + i for i, name in enumerate(GLM4_SPECIALS)})
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([start + 2, *encoding.encode_ordinary("a"), start + 7], skip_special_tokens=True) == "a"


QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
_made: dict[str, Any] = {}


@pytest.fixture(scope="module", autouse=True)
def rank_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    for family, name in (("chatglm", "tokenizer.model"), ("qwen", "qwen.tiktoken")):
        path = tmp_path_factory.mktemp(family)
        (path / name).write_bytes(rank_lines())
        _made[family] = build_tokenizer(family, path)


def glm4() -> Any:
    return _made["chatglm"]


def qwen() -> Any:
    return _made["qwen"]


@functools.cache
def tiktoken_encoding(digits: str, specials: tuple[str, ...]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        f"test{digits}",
        pat_str=PATTERN % digits,
        mergeable_ranks=ranks(),
        special_tokens={name: len(ranks()) + index for index, name in enumerate(specials)},
    )


# --- the families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [2, 3])
def test_chatglm_puts_its_prefix_before_text_in_which_nothing_is_special(generation: int, pieces: Callable[..., Made]) -> None:
    tokenizer, processor = pieces("chatglm", config_json={"_name_or_path": f"THUDM/chatglm{generation}-6b"})
    assert isinstance(tokenizer, FastTokenizer)
    for text in ATOMS:
        assert tokenizer.encode(text) == [1501, 1503, *processor.encode(text)]
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert tokenizer.encode("a", "b") == [1501, 1503, *processor.encode("a"), *processor.encode("b"), 2]
    names = GLM_COMMANDS + (ROLES if generation == 3 else ())
    assert tokenizer.convert_tokens_to_ids(list(names)) == list(range(1500, 1500 + len(names)))
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (1500 + len(names), 2, 0)
    assert tokenizer.decode(tokenizer.encode(" a b")) == (" a b" if generation == 2 else "[gMASK]sop  a b")
    assert tokenizer.decode(tokenizer.encode(" a b"), skip_special_tokens=True) == " a b"
    padded = tokenizer(["a", "a b c d e f"], padding=True)
    assert (padded["attention_mask"][0][0], padded["input_ids"][0][0], padded["input_ids"][0][-1]) == (
        0,
        0,
        processor.encode("a")[-1],
    )


def test_chatglm3_parses_role_tokens_where_its_files_add_them(pieces: Callable[..., Made]) -> None:
    added = {str(1505 + index): token(name, special=False) for index, name in enumerate(ROLES)}
    tokenizer, processor = pieces("chatglm", tokenizer_config_json={"added_tokens_decoder": added})
    assert tokenizer.encode("a<|user|>b </s>")[2:] == [*processor.encode("a"), 1506, *processor.encode("b </s>")]
    assert tokenizer.decode([*processor.encode("a"), 1506, *processor.encode("b")]) == "a <|user|> b"


@pytest.mark.parametrize("kind", ["user_defined_symbols", "control_symbols"])
def test_internlm2_knows_a_token_by_its_name_and_by_its_piece(kind: str, pieces: Callable[..., Made]) -> None:
    ids = dict(zip(ACTIONS, range(3 + len(UNUSED) - 6, 3 + len(UNUSED)), strict=True))
    added = {index: token(name) for name, index in {**ids, "<unk>": 0, "<s>": 1, "</s>": 2}.items()}
    tokenizer, processor = pieces("internlm2", {kind: UNUSED}, tokenizer_config_json={"added_tokens_decoder": added})
    assert isinstance(tokenizer, FastTokenizer)
    names = {**ids, "<s>": 1, "</s>": 2, "<unk>": 0}
    for text in (*ATOMS, "".join(ATOMS), "<|im_start|>user\n你好 [UNUSED_TOKEN_146]<|im_end|>\n", "[UNUSED_TOKEN_14<|im_end|>5]"):
        assert tokenizer.encode(text) == [1, *apart(text, names, processor.encode, names)]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == ids["<|im_end|>"] == processor.piece_to_id("[UNUSED_TOKEN_145]")
    assert tokenizer.decode([ids["<|im_end|>"], 2, *processor.encode("it 's")]) == "<|im_end|>  </s>it's"  # as recorded below
    assert tokenizer.decode([*processor.encode("a"), ids["<|im_end|>"]], skip_special_tokens=True) == "a"


def test_internlm_and_baichuan_encode_each_side_of_a_special_token_apart(pieces: Callable[..., Made]) -> None:
    names = {"<s>": 1, "</s>": 2, "<unk>": 0}
    for family, bos in (("internlm", [1]), ("baichuan", [])):
        config = {"add_bos_token": bool(bos)}
        tokenizer, processor = pieces(
            family, {"user_defined_symbols": [*RESERVED, "<eoh>", "<eoa>"]}, tokenizer_config_json=config
        )
        for text in (*ATOMS, "".join(ATOMS), "<|User|>:hi<eoh>\n<|Bot|>:yes<eoa>\n", "<eoh>", "<eoh></s><eoh>x"):
            assert tokenizer.encode(text) == [*bos, *apart(text, names, processor.encode, names)]
        assert tokenizer.encode("a", "b") == [*bos, *processor.encode("a"), *processor.encode("b")]
        assert tokenizer.decode(processor.encode(" 你好<eoh> a")) == " 你好<eoh> a"


def test_ids_decode_as_the_families_own_code_decoded_them(pieces: Callable[..., Made]) -> None:
    """Recorded from the original classes under transformers 4.38.2 on 2026-11-21."""
    internlm, processor = pieces("internlm")
    a, dot = processor.encode("a"), processor.encode("x .")
    assert internlm.decode([1, *a, 2]) == " <s> a</s>"
    assert internlm.decode([1, *dot]) == " <s>x."
    baichuan, _ = pieces("baichuan", {"user_defined_symbols": RESERVED})
    assert baichuan.decode([1, *baichuan.encode("a", add_special_tokens=False), 2, 2]) == "<s> a</s></s>"


def test_offsets_cover_the_text(pieces: Callable[..., Made]) -> None:
    tokenizer, _ = pieces("baichuan", {"user_defined_symbols": RESERVED}, tokenizer_config_json={"add_bos_token": False})
    text = "Hello 你好<reserved_106> x"
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text)))


@pytest.mark.parametrize("family", ["chatglm", "qwen", "internlm", "internlm2", "baichuan"])
def test_saved_it_gives_the_same_ids_without_us(family: str, pieces: Callable[..., Made], tmp_path: Path) -> None:
    generation = {"user_token_id": 105, "assistant_token_id": 106}
    roles = {"generation_config_json": generation, "tokenizer_config_json": {"add_bos_token": False}}
    tokenizer = qwen() if family == "qwen" else pieces(family, {"user_defined_symbols": [*RESERVED, "<eoh>"]}, **roles)[0]
    texts = [text for text in ATOMS if "\u08cf" not in text]  # younger than the tables of `tokenizers`' NFC
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for other in (again, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert all(other.encode(text) == tokenizer.encode(text) for text in (*texts, "".join(texts)))
    assert (again.eos_token_id, again.padding_side) == (tokenizer.eos_token_id, tokenizer.padding_side)
    assert again.chat_template == (tokenizer.chat_template if family.startswith("internlm") else None)
    assert tokenizer.chat_template is not None


# --- conversations ----------------------------------------------------------------------------------------------------


def said(seed: int, system: bool) -> list[dict[str, str]]:
    """A conversation of awkward texts."""
    pick = random.Random(seed)
    roles = [*(["system"] if system else []), *["user", "assistant"] * pick.randint(0, 2), "user"]
    return [{"role": role, "content": "".join(pick.choice(ATOMS) for _ in range(pick.randint(1, 6)))} for role in roles]


def test_chatglm2_asks_in_rounds(pieces: Callable[..., Made]) -> None:
    tokenizer, processor = pieces("chatglm")
    for seed in range(20):
        messages = said(seed, system=False)
        turns = [message["content"] for message in messages]
        prompt = "".join(
            f"[Round {i + 1}]\n\n问\uff1a{q}\n\n答\uff1a{a}\n\n"
            for i, (q, a) in enumerate(zip(turns[:-1:2], turns[1::2], strict=True))
        )
        prompt += f"[Round {len(turns) // 2 + 1}]\n\n问\uff1a{turns[-1]}\n\n答\uff1a"
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == [
            1501,
            1503,
            *processor.encode(prompt),
        ]
    with pytest.raises(Exception, match="not system"):
        tokenizer.apply_chat_template(said(1, system=True))


def test_role_tokens_in_what_is_said_to_chatglm3_and_glm4_stay_text(pieces: Callable[..., Made]) -> None:
    chatglm3, processor = pieces("chatglm", config_json={"_name_or_path": "THUDM/chatglm3-6b"})
    encoding, start = tiktoken_encoding("{1,3}", GLM4_SPECIALS), len(ranks())
    for seed in range(20):
        messages = said(seed, system=seed % 2 == 0)
        for tokenizer, encode, front, roles in (
            (chatglm3, processor.encode, [1501, 1503], 1505),
            (glm4(), encoding.encode_ordinary, [start + 2, start + 4], start + 6),
        ):
            ids = list(front)
            for message in messages:
                role = roles + ["system", "user", "assistant"].index(message["role"])
                ids += [role, *encode("\n"), *encode(message["content"])]
            assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == [*ids, roles + 2]


def test_chatglm3_and_glm4_tell_their_tools(pieces: Callable[..., Made]) -> None:
    chatglm3, processor = pieces("chatglm", config_json={"_name_or_path": "THUDM/chatglm3-6b"})
    tool = {"name": "weather", "note": "天气"}
    messages = [
        {"role": "system", "content": "Use tools.", "tools": [tool]},
        {"role": "assistant", "metadata": "weather", "content": "x"},
    ]
    text = "Use tools.\n" + json.dumps([tool], indent=4, ensure_ascii=False)
    expected = [
        1501,
        1503,
        1505,
        *processor.encode("\n"),
        *processor.encode(text),
        1507,
        *processor.encode("weather\n"),
        *processor.encode("x"),
    ]
    assert chatglm3.apply_chat_template(messages)["input_ids"] == expected
    told = glm4().apply_chat_template(messages[:1], tokenize=False)
    assert f"## weather\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}\n在调用上述函数时" in told


def test_qwen_uses_chatml_and_special_tokens_in_messages_stay_text() -> None:
    encoding, start = tiktoken_encoding("", QWEN_SPECIALS), len(ranks())
    for seed in range(20):
        messages = said(seed, system=seed % 2 == 0)
        first = [] if messages[0]["role"] == "system" else [{"role": "system", "content": "You are a helpful assistant."}]
        parts = [
            [start + 1, *encoding.encode_ordinary(f"{message['role']}\n"), *plain(encoding, message["content"]), start + 2]
            for message in [*first, *messages]
        ]
        line = encoding.encode_ordinary("\n")
        ids = [index for place, part in enumerate(parts) for index in [*(line if place else []), *part]]
        ids += [*line, start + 1, *encoding.encode_ordinary("assistant\n")]
        assert qwen().apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids


def plain(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return encoding.encode_ordinary(unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("first", [102, 106])
def test_baichuan_marks_turns_with_the_ids_its_files_name(first: int, pieces: Callable[..., Made]) -> None:
    user, assistant = 3 + first, 4 + first
    files = {
        "generation_config_json": {"user_token_id": user, "assistant_token_id": assistant},
        "tokenizer_config_json": {"add_bos_token": False},
    }
    tokenizer, processor = pieces("baichuan", {"user_defined_symbols": RESERVED}, **files)
    names = {"<s>": 1, "</s>": 2, "<unk>": 0}
    for seed in range(20):
        messages, ids = said(seed, system=seed % 2 == 0), []
        for message in messages:
            role = {"system": [], "user": [user], "assistant": [assistant]}[message["role"]]
            ids += [*role, *apart(message["content"], names, processor.encode, names)]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == [*ids, assistant]
    beginning = pieces("baichuan", {"user_defined_symbols": RESERVED}, **{**files, "tokenizer_config_json": {}})[0]
    assert beginning.encode("a") == [1, *processor.encode("a")]
    assert beginning.chat_template is None  # one BOS a message, which no template writes


def test_internlm_and_internlm2_write_one_prompt(pieces: Callable[..., Made]) -> None:
    internlm, _ = pieces("internlm", {"user_defined_symbols": ["<eoh>", "<eoa>"]})
    messages = [{"role": role, "content": role[:1]} for role in ("user", "assistant", "user")]
    prompt = "<|User|>:u<eoh>\n<|Bot|>:a<eoa>\n<|User|>:u<eoh>\n<|Bot|>:"
    assert internlm.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == internlm.encode(prompt)
    ids = dict(zip(ACTIONS, range(3, 9), strict=True))
    config = {"added_tokens_decoder": {index: token(name) for name, index in ids.items()}}
    internlm2, _ = pieces("internlm2", {"user_defined_symbols": UNUSED[-6:]}, tokenizer_config_json=config)
    prompt = (
        "".join(f"<|im_start|>{role}\n{role[:1]}<|im_end|>\n" for role in ("user", "assistant", "user"))
        + "<|im_start|>assistant\n"
    )
    assert internlm2.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == internlm2.encode(prompt)


def test_conversations_are_padded_and_truncated_as_requested() -> None:
    chats = [said(1, system=False), said(2, system=True)]
    rows = qwen().apply_chat_template(chats)["input_ids"]
    tensors = qwen().apply_chat_template(chats, padding=True, return_tensors="pt")
    assert tensors["input_ids"].shape == tensors["attention_mask"].shape == (2, max(map(len, rows)))
    assert qwen().apply_chat_template(chats[0], return_dict=False) == rows[0]
    assert qwen().apply_chat_template(chats[0], truncation=True, max_length=5)["input_ids"] == rows[0][:5]
    with pytest.raises(ConfigurationError, match="return_assistant_tokens_mask"):
        qwen().apply_chat_template(chats[0], return_assistant_tokens_mask=True)


def test_the_files_chat_template_wins(folder: Folder) -> None:
    config = {"chat_template": "<|im_start|>{{ messages[0].content }}", "padding_side": "left", "model_max_length": 77}
    tokenizer = build_tokenizer("qwen", folder(qwen_tiktoken=rank_lines(), tokenizer_config_json=config))
    start = len(ranks())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a<|im_end|>"}])["input_ids"]
    assert ids == [start + 1, *tiktoken_encoding("", QWEN_SPECIALS).encode_ordinary("a<|im_end|>")]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)


# --- what cannot be ---------------------------------------------------------------------------------------------------


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
def test_a_rank_file_with_holes_is_refused(content: bytes, said: str, folder: Folder) -> None:
    with pytest.raises(TokenizerNotFoundError, match=said):
        build_tokenizer("qwen", folder(qwen_tiktoken=content))


def test_a_file_that_is_not_a_model_is_refused(folder: Folder) -> None:
    with pytest.raises(TokenizerNotFoundError, match="not a sentencepiece model"):
        build_tokenizer("internlm", folder(tokenizer_model=b"\x0a\x05not a model"))


def test_extra_vocabularies_of_qwen_are_refused(folder: Folder) -> None:
    files = folder(qwen_tiktoken=rank_lines(), tokenizer_config_json={"extra_vocab_file": "more.tiktoken"})
    with pytest.raises(TokenizerNotFoundError, match="extra_vocab_file"):
        build_tokenizer("qwen", files)


@pytest.mark.parametrize("package", ["sentencepiece", "sentencepiece.sentencepiece_model_pb2"])
def test_a_missing_package_says_how_to_install_it(package: str, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    files = folder(tokenizer_model=trained("{}"))
    monkeypatch.setitem(sys.modules, package, None)
    if "." in package:
        monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    with pytest.raises(MissingExtraError, match=r"pip install .*sentencepiece"):
        build_tokenizer("baichuan", files)
