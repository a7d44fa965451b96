"""What a checkpoint's generation_config.json says holds in a session and in `generate`, as in transformers with its tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
import transformers

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.cli import main

PROMPT = "abcabc"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"))


Saying = Callable[..., Path]


@pytest.fixture
def saying(plain: Path, tmp_path: Path) -> Saying:
    """The checkpoint with these fields in its generation_config.json."""

    def make(**fields: Any) -> Path:
        shutil.copytree(plain, tmp_path / "own")
        ids = {"eos_token_id": talking.END, "pad_token_id": talking.PAD, "bos_token_id": talking.BOS}
        (tmp_path / "own" / "generation_config.json").write_text(json.dumps({**ids, **fields}))
        return tmp_path / "own"

    return make


def by_transformers(folder: Path, **keywords: Any) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    torch.manual_seed(3)
    return model.generate(ids, tokenizer=tokenizer, **keywords)[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def answer(plain: Path) -> list[int]:
    return by_transformers(plain, max_new_tokens=8, do_sample=False)


def of_session(folder: Path, **options: Any) -> tuple[list[int], Any]:
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        reply = session.generate(PROMPT, **options)[0]
        return list(reply.tokens), reply


FIELDS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "suppress_tokens": lambda answer: {"suppress_tokens": [answer[2]]},
    "begin_suppress_tokens": lambda answer: {"begin_suppress_tokens": [answer[0]]},
    "bad_words_ids": lambda answer: {"bad_words_ids": [answer[:2]]},
    "sequence_bias": lambda answer: {"sequence_bias": [[[answer[3]], -50.0]]},
    "forced_bos_token_id": lambda answer: {"forced_bos_token_id": answer[4]},
    "forced_eos_token_id": lambda _: {"forced_eos_token_id": talking.END},
    "eos_token_id": lambda answer: {"eos_token_id": [talking.END, answer[3]]},
    "min_new_tokens": lambda answer: {"eos_token_id": answer[1], "min_new_tokens": 5},
    "min_length": lambda answer: {"eos_token_id": answer[1], "min_length": 10},
    "no_repeat_ngram_size": lambda _: {"no_repeat_ngram_size": 1},
    "repetition_penalty": lambda _: {"repetition_penalty": 1.7},
    "exponential_decay_length_penalty": lambda _: {"exponential_decay_length_penalty": [2, 3.0]},
    "guidance_scale": lambda _: {"guidance_scale": 1.5},
    "watermarking_config": lambda _: {"watermarking_config": {"greenlist_ratio": 0.3, "bias": 4.0}},
    "static cache": lambda _: {"cache_implementation": "static"},
    "token_healing": lambda _: {"token_healing": True},
    "prompt_lookup": lambda _: {"prompt_lookup_num_tokens": 3},
    "return_dict": lambda _: {"return_dict_in_generate": True, "output_scores": True},
    "drawing": lambda _: {"do_sample": True, "temperature": 1.3, "top_k": 12, "typical_p": 0.9},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_does_in_a_session_what_it_does_in_transformers(saying: Saying, answer: list[int], field: str) -> None:
    fields = FIELDS[field](answer)
    folder = saying(**fields)
    asked = {"max_new_tokens": 8, "return_dict_in_generate": False, "prompt_lookup_num_tokens": None}
    expected = by_transformers(folder, **asked)
    options = {"seed": 3} if fields.get("do_sample") else {}
    assert of_session(folder, max_new_tokens=8, **options)[0] == expected


@pytest.mark.parametrize("strings", [1, 2, "special"])
def test_stop_strings_end_an_answer_as_in_transformers(saying: Saying, answer: list[int], strings: Any) -> None:
    texts = [chr(31 + token) for token in answer]
    stop = {1: texts[2], 2: ["".join(texts[1:3]), "none"], "special": ["<s>", texts[3]]}[strings]
    folder = saying(stop_strings=stop)
    expected = by_transformers(folder, max_new_tokens=8, do_sample=False)
    found, reply = of_session(folder, max_new_tokens=8)
    assert found == expected != answer
    assert reply.finish_reason == "stop"
    assert of_session(folder, max_new_tokens=len(expected))[1].finish_reason == "stop"
    with AutoModel.from_pretrained(folder, device="cpu") as model:  # no tokenizer= is needed
        ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
        assert model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("fields", [{"stop_strings": "stop"}, {"num_beams": 3, "num_return_sequences": 2}])
def test_rabbit_run_writes_what_transformers_says(saying: Saying, answer: list[int], fields: dict[str, Any], capsys: Any) -> None:
    if "stop_strings" in fields:
        fields = {"stop_strings": chr(31 + answer[2])}
    folder = saying(**fields)
    expected = by_transformers(folder, max_new_tokens=8, do_sample=False)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder), PROMPT, "--no-chat", "--max-new-tokens", "8", "--device", "cpu"])
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out == "".join(chr(31 + token) for token in expected) + "\n"


def test_rabbit_run_writes_one_answer_even_if_several_are_sampled(saying: Saying, rabbit: Any) -> None:
    folder = saying(do_sample=True, num_return_sequences=2)
    done = rabbit("run", folder, PROMPT, "--no-chat", "--max-new-tokens", 8, "--device", "cpu")
    expected = by_transformers(folder, max_new_tokens=8, do_sample=False, num_return_sequences=1)
    assert (done.code, done.out) == (0, "".join(chr(31 + token) for token in expected) + "\n")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"force_words_ids": [[3]]}, "Constrained Beam Search"),
        ({"dola_layers": "low"}, "Dola"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
        ({"repetition_penalty": -1.0}, "-1.0"),
        ({"cache_implementation": "quantized"}, "quant"),
    ],
)
def test_rabbit_run_names_the_file_of_settings_that_generate_rejects(
    saying: Saying, rabbit: Any, fields: dict[str, Any], words: str
) -> None:
    done = rabbit("run", saying(**fields), PROMPT, "--no-chat", "--max-new-tokens", 2, "--device", "cpu")
    said = done.err.splitlines()[-1]
    assert (done.code, done.out) == (2, "")
    assert said.startswith("error: generate rejects the settings of the command and of the checkpoint's generation_config.json")
    assert words in said


def test_max_length_bounds_prompt_and_answer(saying: Saying) -> None:
    folder = saying(max_length=11)
    expected = by_transformers(folder, do_sample=False)
    assert len(expected) == 5
    assert of_session(folder)[0] == expected
    assert len(of_session(folder, max_new_tokens=9)[0]) == 9


def test_a_bias_and_bad_words_of_a_request_go_with_the_checkpoints(saying: Saying, answer: list[int]) -> None:
    folder = saying(sequence_bias=[[[answer[0]], -50.0]], bad_words_ids=[[answer[1]]])
    merged = {"sequence_bias": [[[answer[0]], -50.0], [[answer[2]], -60.0]], "bad_words_ids": [[answer[1]], [answer[3]]]}
    expected = by_transformers(folder, max_new_tokens=8, do_sample=False, **merged)
    found, _ = of_session(folder, max_new_tokens=8, logit_bias={answer[2]: -60}, bad_words=[chr(31 + answer[3])])
    assert found == expected
    assert not set(answer[:4]) & set(found)


def test_ignored_settings_of_the_checkpoint_are_logged(saying: Saying, caplog: Any) -> None:
    folder = saying(num_beams=3, num_return_sequences=2)
    found, _ = of_session(folder, max_new_tokens=8)
    assert found == by_transformers(folder, max_new_tokens=8, num_beams=1, num_return_sequences=1)
    assert "num_beams=3" in caplog.text
    assert "num_return_sequences=2" in caplog.text


@pytest.fixture(scope="module")
def session(plain: Path) -> Iterator[Session]:
    with AutoModel.from_pretrained(plain, device="cpu") as model, Session(model, max_new_tokens=8) as session:
        yield session


def test_stop_tokens_end_an_answer_and_are_not_in_its_text(session: Session, answer: list[int]) -> None:
    reply = session.generate(PROMPT, stop_token_ids=[answer[2]])[0]
    assert list(reply.tokens) == answer[:3]
    assert reply.text == "".join(chr(31 + token) for token in answer[:2])
    assert reply.finish_reason == "stop"
    assert session.generate(PROMPT, stop_token_ids=[answer[2]], include_stop=True)[0].text == reply.text + chr(31 + answer[2])


def test_a_stop_text_stays_in_the_answer_if_requested(session: Session, answer: list[int]) -> None:
    text = "".join(chr(31 + token) for token in answer)
    assert session.generate(PROMPT, stop=text[2:4])[0].text == text[:2]
    assert session.generate(PROMPT, stop=text[2:4], include_stop=True)[0].text == text[:4]


def test_ignore_eos_continues_and_min_new_tokens_wait(session: Session) -> None:
    end = {talking.END: 100.0}
    assert session.generate(PROMPT, logit_bias=end)[0].tokens == (talking.END,)
    assert session.generate(PROMPT, logit_bias=end, ignore_eos=True)[0].tokens == (talking.END,) * 8
    waited = session.generate(PROMPT, logit_bias=end, min_new_tokens=3)[0].tokens
    assert (len(waited), waited[-1]) == (4, talking.END)
    assert session.generate(PROMPT, logit_bias=end, skip_special_tokens=False)[0].text == "</s>"


def test_top_k_of_zero_takes_the_checkpoints_own_away(saying: Saying) -> None:
    folder = saying(do_sample=True, top_k=1, temperature=4.0)
    expected = by_transformers(folder, max_new_tokens=8, top_k=0)
    assert of_session(folder, max_new_tokens=8, seed=3, top_k=0)[0] == expected
    assert of_session(folder, max_new_tokens=8, seed=3)[0] == by_transformers(folder, max_new_tokens=8) != expected


@pytest.mark.parametrize("fields", [{"stop_strings": []}, {"stop_strings": ""}, {"bad_words_ids": []}, {"sequence_bias": {}}])
def test_a_list_that_asks_for_nothing_changes_nothing(saying: Saying, answer: list[int], fields: dict[str, Any]) -> None:
    assert of_session(saying(**fields), max_new_tokens=8)[0] == answer


def test_a_temperature_of_zero_in_the_file_is_greedy(saying: Saying, answer: list[int]) -> None:
    assert of_session(saying(do_sample=True, temperature=0.0), max_new_tokens=8)[0] == answer


@pytest.mark.parametrize("fields", [{"bad_words_ids": [[999]]}, {"repetition_penalty": -1}, {"do_sample": True, "top_k": -1}])
def test_settings_that_generate_rejects_are_a_configuration_error(saying: Saying, fields: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"generate rejects these settings.*generation_config\.json"):
        of_session(saying(**fields), max_new_tokens=8)
