"""Answers that follow a constraint: from a session, from `generate`, with guesses, and from `LLM`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import talking
import torch
from guessing import Guided
from jsonschema import Draft202012Validator
from vocabularies import glm4

from rabbit_engine import LLM, AutoModel, Lookup, Options, SamplingParams, Session, constrain, errors

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "river": {"enum": ["Seine", "Loire"]},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
    },
    "required": ["city", "river", "age"],
    "additionalProperties": False,
}
VOCABULARY = 1600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny model, which says anything, with the tokens of a byte-level tokenizer and more logits than those."""
    end = glm4().eos_token_id
    folder = talking.save(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY, eos_token_id=end, max_position_embeddings=400)
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        model.tokenizer = glm4()
        yield model


@pytest.fixture(scope="module")
def session(model: Any) -> Iterator[Session]:
    with Session(model) as session:
        yield session


@pytest.fixture(scope="module")
def ids(model: Any) -> torch.Tensor:
    return torch.tensor([model.tokenizer("Where is Paris?", add_special_tokens=False)["input_ids"]])


def test_a_real_model_answers_with_valid_json_at_temperature_1(smollm_model: Any) -> None:
    with Session(smollm_model) as session:
        options = {"schema": CITY, "temperature": 1.0, "top_k": 0, "max_new_tokens": 40}
        replies = session.answers([session.request("A city?", seed=seed, **options) for seed in range(4)])
    for reply in replies:
        assert reply.finish_reason == "stop"
        Draft202012Validator(CITY).validate(json.loads(reply.text))
    assert len({reply.text for reply in replies}) > 2


def test_every_answer_at_temperature_1_is_valid(session: Session) -> None:
    options = {"schema": CITY, "temperature": 1.0, "top_k": 0, "max_new_tokens": 100}
    for reply in session.answers([session.request_text("A city?", seed=seed, **options) for seed in range(16)]):
        assert reply.finish_reason == "stop"
        Draft202012Validator(CITY).validate(json.loads(reply.text))


def test_an_answer_is_that_of_generate_without_a_pass_for_its_end(model: Any, session: Session, ids: torch.Tensor) -> None:
    keywords = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 2}
    whole = model.generate(ids, logits_processor=[constrain(model, schema=CITY)], **keywords)[0, ids.shape[1] :]
    processor = constrain(model, schema=CITY)
    before = model.profile.passes
    found = model.generate(ids, logits_processor=[processor], stopping_criteria=[processor.completion], **keywords)
    assert model.profile.passes - before == len(found[0]) - ids.shape[1]
    reply = session.generate([ids[0].tolist()], schema=CITY, temperature=0, max_new_tokens=100)[0]
    assert list(reply.tokens) == found[0, ids.shape[1] :].tolist() == whole[:-1].tolist()
    assert int(whole[-1]) == model.tokenizer.eos_token_id
    assert reply.finish_reason == "stop"
    Draft202012Validator(CITY).validate(json.loads(reply.text))
    exact = session.generate([ids[0].tolist()], schema=CITY, temperature=0, max_new_tokens=len(reply.tokens))[0]
    assert (exact.text, exact.finish_reason) == (reply.text, "stop")


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_guesses_change_nothing(model: Any, ids: torch.Tensor, drawn: bool) -> None:
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0} if drawn else {"do_sample": False}

    def answer(**speculation: Any) -> tuple[list[int], int]:
        torch.manual_seed(4)
        processor, before = constrain(model, schema=CITY), model.profile.passes
        stops = [processor.completion]
        found = model.generate(
            ids, logits_processor=[processor], stopping_criteria=stops, max_new_tokens=100, pad_token_id=2, **how, **speculation
        )
        return found[0].tolist(), model.profile.passes - before

    expected, plain_passes = answer()
    tree = Guided(expected, branches=2, vocabulary=VOCABULARY)
    found, passes = answer(speculate=tree)
    assert found == expected
    assert passes < plain_passes - 3
    assert sum(len(verdict.path) for verdict in tree.verdicts) > 0
    assert answer(speculate=Lookup())[0] == expected
    with Session(model, speculate=Guided(expected, branches=1, vocabulary=VOCABULARY)) as session:
        seeded = {"temperature": 1.0, "top_k": 0, "seed": 4} if drawn else {"temperature": 0}
        assert (
            list(session.generate([ids[0].tolist()], schema=CITY, max_new_tokens=100, **seeded)[0].tokens)
            == expected[ids.shape[1] :]
        )


def test_beams_and_rows_of_a_batch_each_follow(model: Any) -> None:
    tokenizer = model.tokenizer
    ids = torch.tensor(
        [tokenizer("One city is Paris and")["input_ids"][:4], tokenizer("Two rivers of France are")["input_ids"][:4]]
    )
    keywords = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "pad_token_id": model.tokenizer.eos_token_id,
        "do_sample": False,
    }
    for beams in (1, 3):
        processor = constrain(model, regex="(ab|c){2,4}")
        stops = [processor.completion]
        found = model.generate(ids, logits_processor=[processor], stopping_criteria=stops, num_beams=beams, **keywords)
        for row in found[:, 4:]:
            text = tokenizer.decode(row, skip_special_tokens=True)
            assert text.replace("ab", "x").replace("c", "x") in ("xx", "xxx", "xxxx")


def test_other_options_hold_with_a_constraint(session: Session) -> None:
    def ask(**options: Any) -> Any:
        return session.generate(["Say"], temperature=0, **{"max_new_tokens": 12, **options})[0]

    cut = ask(regex="[ab]{40}")
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 12)
    assert set(cut.text) <= {"a", "b"}
    least = ask(regex="a+", min_new_tokens=3)
    assert set(least.text) == {"a"}
    assert len(least.tokens) > 3
    assert (
        ask(
            choices=["left", "right"],
            logit_bias={session.model.tokenizer("right", add_special_tokens=False)["input_ids"][0]: 100},
        ).text
        == "right"
    )
    assert ask(choices=["one; two"], stop=";").text == "one"
    told = ask(choices=["yes", "no"], logprobs=1)
    assert told.text in ("yes", "no")
    assert all(each.logprob > -60 for each in told.logprobs)
    with pytest.raises(errors.ConfigurationError, match="ignore_eos"):
        ask(choices=["yes"], ignore_eos=True)


def test_a_schema_that_cannot_be_served_is_refused_before_it_is_queued(session: Session) -> None:
    for ask in (session.request, session.request_text):
        with pytest.raises(errors.ConstraintError, match="#/properties/a: not is not supported"):
            ask("Hi", schema={"properties": {"a": {"not": {}}}})
    with pytest.raises(errors.ConstraintError, match="only one"):
        Options(schema=True, regex="a")
    with pytest.raises(errors.ConstraintError, match="nothing to follow"):
        constrain(session.model)


def test_vllms_parameters_mean_the_same(model: Any) -> None:
    with LLM(model) as llm:
        for name in ("structured_outputs", "guided_decoding"):
            for given, valid in (
                ({"choice": ["left", "right"]}, ("left", "right")),
                (SimpleNamespace(json=None, json_object=None, regex="ab", choice=None, grammar=None), ("ab",)),
                ({"json": {"const": 1}}, ("1",)),
                ({"grammar": 'root ::= "x"'}, ("x",)),
            ):
                params = SamplingParams(temperature=0, **{name: given})
                assert llm.generate("Turn", params)[0].outputs[0].text in valid
        assert json.loads(llm.generate("Turn", {"structured_outputs": {"json": '{"const": 2}'}})[0].outputs[0].text) == 2
        for wrong in ({"structural_tag": "x"}, {"regex": "a", "whitespace_pattern": " "}, {"jsn": {}}, "x"):
            with pytest.raises(errors.ConfigurationError):
                llm.generate("Turn", SamplingParams(structured_outputs=wrong))
        assert llm.generate("Turn", Options(regex="ab"))[0].outputs[0].text == "ab"


def test_run_answers_with_what_is_asked_for(rabbit: Any, tmp_path: Path) -> None:
    folder = talking.save(tmp_path / "model")
    run = ("run", folder, "abc", "--device", "cpu", "--max-new-tokens", 12)
    (tmp_path / "schema.json").write_text('{"enum": [1234, 56]}')
    assert rabbit(*run, "--choice", "left", "--choice", "right").out.strip() in ("left", "right")
    assert re.fullmatch("[xyz]{3}", rabbit(*run, "--regex", "[xyz]{3}", "--temperature", 1, "--seed", 2).out.strip())
    for schema in (tmp_path / "schema.json", '{"enum": [1234, 56]}'):
        assert rabbit(*run, "--schema", schema).out.strip() in ("1234", "56")
    for options, reason in (
        (("--schema", tmp_path / "none.json"), "neither a JSON object nor a file"),
        (("--schema", '{"not": {}}'), "not is not supported"),
        (("--regex", "a", "--choice", "b"), "regex and choices are given"),
    ):
        done = rabbit(*run, *options)
        assert done.code != 0
        assert reason in done.err
