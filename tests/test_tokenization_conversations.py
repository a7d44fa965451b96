"""Conversations become the prompts that the families' own code wrote, with special tokens in what is said left as text."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from vocabularies import (
    ACTIONS,
    ATOMS,
    GLM4_SPECIALS,
    QWEN_SPECIALS,
    RESERVED,
    UNUSED,
    Made,
    apart,
    glm4,
    qwen,
    rank_lines,
    ranks,
    tiktoken_encoding,
    token,
    write_files,
)

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.tokenization import build_tokenizer


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


def test_the_files_chat_template_wins(tmp_path: Path) -> None:
    config = {"chat_template": "<|im_start|>{{ messages[0].content }}", "padding_side": "left", "model_max_length": 77}
    tokenizer = build_tokenizer("qwen", write_files(tmp_path, qwen_tiktoken=rank_lines(), tokenizer_config_json=config))
    start = len(ranks())
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a<|im_end|>"}])["input_ids"]
    assert ids == [start + 1, *tiktoken_encoding("", QWEN_SPECIALS).encode_ordinary("a<|im_end|>")]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 77)
