"""Small vocabularies with the options of the families, trained on the standard library's documentation, and awkward texts."""

from __future__ import annotations

import base64
import functools
import io
import json
import pydoc_data.topics
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rabbit_engine.tokenization import build_tokenizer
from rabbit_engine.tokenization.ranks import byte_characters

PHRASES = [
    *("第一章", "你好世界", "今天天气很好", "我们去公园散步吧", "人工智能是计算机科学的一个分支"),
    *("机器学习", "深度学习", "大语言模型", "分词器", "编码", "解码"),
]
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
GLM4_SPECIALS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
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
BYTE_PAIRS = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
PLAIN = {**BYTE_PAIRS, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "character_coverage": 0.995}

Made = tuple[Any, Any]


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


def write_files(folder: Path, **files: Any) -> Path:
    """`folder`, with `files`, whose names have `_` for `.`; a dict is written as JSON."""
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def make_pieces(folder: Path, family: str, options: Mapping[str, Any] = {}, **files: Any) -> Made:
    """The tokenizer under test, and sentencepiece with the same file."""
    model = trained(json.dumps(dict(options)))
    made = build_tokenizer(family, write_files(folder, tokenizer_model=model, **files))
    return made, sentencepiece.SentencePieceProcessor(model_proto=model)


def token(content: str, special: bool = True, **properties: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "special": special, **properties}


def apart(text: str, specials: Iterable[str], encode: Callable[[str], list[int]], ids: Mapping[str, int]) -> list[int]:
    """`text` cut at special tokens and encoded part by part, as the slow tokenizers of transformers 4 do."""
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    return [index for part in parts if part for index in ([ids[part]] if part in ids else encode(part))]


@functools.cache
def glm4() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer("chatglm", write_files(Path(folder), tokenizer_model=rank_lines()))


@functools.cache
def qwen() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer("qwen", write_files(Path(folder), qwen_tiktoken=rank_lines()))


@functools.cache
def tiktoken_encoding(digits: str, specials: tuple[str, ...]) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        f"test{digits}",
        pat_str=PATTERN % digits,
        mergeable_ranks=ranks(),
        special_tokens={name: len(ranks()) + index for index, name in enumerate(specials)},
    )
