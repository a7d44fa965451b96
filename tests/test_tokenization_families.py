"""Tokenizers of each family encode, decode and save as the family's own code did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vocabularies import ACTIONS, ATOMS, RESERVED, ROLES, UNUSED, Made, apart, qwen, token

from rabbit_engine.tokenization.classes import FastTokenizer

GLM_COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


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
