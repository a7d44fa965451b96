"""Constraints on random scores: every text that they let through is what they say, whatever the tokenizer."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from vocabularies import corpus, glm4

from rabbit_engine import errors
from rabbit_engine.sessions.constraints import CompiledConstraint, ConstrainedTokens, compile_constraint, constraint_of
from rabbit_engine.sessions.constraints.schemas import read_schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "日本"]}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"}},
            "required": ["city"],
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    LIST,
    {"enum": ["é", 1, None, {"x": [1]}]},
    {"const": {"a": [1, '\n"\\']}},
    {"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2.25}]},
    {"type": "integer", "multipleOf": 7, "minimum": 3, "maximum": 400},
    {"type": "string", "minLength": 3, "maxLength": 9},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "date-time"},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["q"]}], "items": False, "minItems": 2},
    {"type": "object", "additionalProperties": {"enum": [1, 2]}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False, "maxProperties": 2},
    {
        "allOf": [{"properties": {"a": {"enum": [1]}}, "required": ["a"]}, {"properties": {"b": {"enum": [2]}}}],
        "additionalProperties": False,
    },
]
TEXTS: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"regex": "[a-c]{2,4}( [x-z])?"}, lambda text: re.fullmatch("[a-c]{2,4}( [x-z])?", text)),
    ({"regex": r"^\d\d/[^0-9]$"}, lambda text: re.fullmatch("[0-9]{2}/[^0-9]", text, re.DOTALL)),
    ({"choices": ["yes", " no", "Ünïcode 日本", 'a/b\n"c"']}, lambda text: text in ("yes", " no", "Ünïcode 日本", 'a/b\n"c"')),
    (
        {"grammar": 'start: "(" start ")" | "x"'},
        lambda text: re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")"),
    ),
    ({"grammar": 'root ::= "n" [0-9]+ "."'}, lambda text: re.fullmatch("n[0-9]+[.]", text)),
]


def _fast(kind: str) -> Any:
    """A small tokenizer of the kind, with sentencepiece's spaces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    if kind == "byte fallback":
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=1200, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=800, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(corpus()[:600], trainer)
    if kind == "byte fallback":  # the trainer marks the bytes as special, but text is made of them
        state = json.loads(made.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
        made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return glm4() if request.param == "byte level" else _fast(request.param)


def compiled(tokenizer: Any, **given: Any) -> CompiledConstraint:
    """For logits that are wider than the vocabulary."""
    constraint = constraint_of(**given)
    assert constraint is not None
    return compile_constraint(constraint, tokenizer, len(tokenizer) + 60, {tokenizer.eos_token_id})


def drawn(processor: ConstrainedTokens, tokenizer: Any, seed: int, *, most: int = 150) -> str | None:
    """A text of random tokens that the processor allows, behind a prompt of two; None if it does not end in time."""
    generator = torch.Generator().manual_seed(seed)
    ids = [5, 6]
    while len(ids) < most and ids[-1] != tokenizer.eos_token_id:
        if len(ids) > 2 and processor.is_complete(torch.tensor([ids]))[0]:
            break
        scores = processor(torch.tensor([ids]), 2 * torch.randn(1, len(tokenizer) + 60, generator=generator))
        ids.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
    else:
        if len(ids) >= most:
            return None
    return str(tokenizer.decode(ids[2:], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_json_is_valid(tokenizer: Any) -> None:
    can_write_all = tokenizer.decode(tokenizer("本", add_special_tokens=False)["input_ids"]) == "本"
    done = 0
    for schema in SCHEMAS:
        if not can_write_all and "enum" in str(schema):
            continue
        constraint = compiled(tokenizer, schema=schema)
        for text in (drawn(constraint.processor(), tokenizer, seed) for seed in range(4)):
            if text is not None:
                done += 1
                Draft202012Validator(schema).validate(json.loads(text))
    assert done > (42 if can_write_all else 24)


@pytest.mark.parametrize(("given", "holds"), TEXTS, ids=lambda value: str(value)[:24] if isinstance(value, dict) else "")
def test_text_follows(tokenizer: Any, given: dict[str, Any], holds: Callable[[str], object]) -> None:
    if "choices" in given and tokenizer.decode(tokenizer("本", add_special_tokens=False)["input_ids"]) != "本":
        pytest.skip("this vocabulary has no such characters")
    constraint = compiled(tokenizer, **given)
    texts = {drawn(constraint.processor(), tokenizer, seed) for seed in range(12)} - {None}
    assert len(texts) > 1
    assert [text for text in texts if not holds(str(text))] == []


def masks(processor: ConstrainedTokens, ids: list[int], width: int) -> torch.Tensor:
    return torch.isfinite(processor(torch.tensor([ids]), torch.zeros(1, width)))


def test_a_text_may_go_back_and_take_another_way(tokenizer: Any) -> None:
    constraint = compiled(tokenizer, schema=LIST)
    width, one, rows = len(tokenizer) + 60, constraint.processor(), constraint.processor()
    generator = torch.Generator().manual_seed(1)
    ids = [5, 6]
    for step in range(60):
        found = masks(one, ids, width)
        assert torch.equal(found, masks(constraint.processor(), ids[:2], width)) == (len(ids) == 2)
        fresh = constraint.processor()
        expected = [masks(fresh, ids[:length], width) for length in range(2, len(ids) + 1)][-1]
        assert torch.equal(found, expected)
        if step % 7 == 6:  # a guess that cannot be, and the text before it
            wrong = int((~found[0]).nonzero()[0])
            assert masks(one, [*ids, wrong], width).all()
            ids = ids[: 2 + int(torch.randint(0, len(ids) - 2, (1,), generator=generator))]
        else:
            possible = found[0].nonzero()[:, 0]
            ids.append(int(possible[torch.randint(len(possible), (1,), generator=generator)]))
        if ids[-1] == tokenizer.eos_token_id or one.is_complete(torch.tensor([ids]))[0]:
            ids = ids[:2]
    assert rows.is_complete(torch.tensor([[5, 6], [6, 5]])) == [False, False]
    both = rows(torch.tensor([[5, 6], [6, 5]]), torch.zeros(2, width))
    assert torch.equal(torch.isfinite(both), masks(constraint.processor(), [5, 6], width).expand(2, -1))


def test_a_processor_follows_one_call(tokenizer: Any) -> None:
    processor = compiled(tokenizer, choices=["yes"]).processor()
    processor(torch.tensor([[5, 6]]), torch.zeros(1, 1500))
    for other in ([[5, 7, 9]], [[5]], [[5, 6, 7, 8]], [[5, 6], [5, 6]]):
        with pytest.raises(errors.ConfigurationError, match="make one for each"):
            processor(torch.tensor(other), torch.zeros(1, 1500))


def test_only_what_may_end_may_end(tokenizer: Any) -> None:
    processor, end = compiled(tokenizer, regex="a+b?").processor(), tokenizer.eos_token_id
    width, (a,), (b,) = len(tokenizer) + 60, (single(tokenizer, "a"),), (single(tokenizer, "b"),)
    assert not masks(processor, [5, 6], width)[0, end]
    assert masks(processor, [5, 6, a], width)[0, end]
    assert not processor.is_complete(torch.tensor([[5, 6, a]]))[0]
    assert masks(processor, [5, 6, a, b], width)[0].nonzero().flatten().tolist() == [end]
    assert processor.is_complete(torch.tensor([[5, 6, a, b]]))[0]
    ended = torch.full((1, width), 2.0)
    assert processor(torch.tensor([[5, 6, a, b, end]]), ended) is ended
    assert processor.completion(torch.tensor([[5, 6, a, b]]), None).tolist() == [True]


def single(tokenizer: Any, text: str) -> int:
    """The token of one letter, without a space before it."""
    names = tokenizer.get_vocab()
    return int(names[text] if text in names else names[text.encode()])


def test_what_other_processors_forbid_gives_way(tokenizer: Any) -> None:
    constraint, width = compiled(tokenizer, choices=["a"]), len(tokenizer) + 60
    allowed = masks(constraint.processor(), [5, 6], width)
    scores = torch.zeros(1, width).masked_fill(allowed, -torch.inf)
    assert torch.equal(torch.isfinite(constraint.processor()(torch.tensor([[5, 6]]), scores)), allowed)


def test_special_tokens_are_never_text(tokenizer: Any) -> None:
    allowed = masks(compiled(tokenizer, regex="(.|\\n)*").processor(), [5, 6], len(tokenizer) + 60)[0]
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    assert allowed.sum() > 500
    assert not allowed[list(special)].any()
    assert not allowed[len(tokenizer) :].any()


class Pet(BaseModel):
    name: str
    legs: int


def test_schemas_are_read_in_all_their_forms() -> None:
    written = json.dumps(Pet.model_json_schema())
    forms = [Pet, Pet.model_json_schema(), written]
    assert {constraint_of(schema=form) for form in forms} == {constraint_of(schema=written)}
    assert constraint_of(schema=True) == constraint_of(schema={"type": "object"})
    told = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "path"}, "x": {"type": "integer", "format": "int64"}},
    }
    assert constraint_of(schema=told) == constraint_of(
        schema={"type": "object", "properties": {"format": {"type": "string"}, "x": {"type": "integer"}}}
    )
    assert constraint_of() is None


def nested(depth: int, inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": nested(depth - 1, inner)}} if depth else inner


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"schema": {"properties": {"a/b": {"items": {"not": {}}}}}}, "not is not supported", "#/properties/a~1b/items"),
    ({"schema": {"$defs": {"x": {"pattern": "(?=a)"}}, "anyOf": [{"$ref": "#/$defs/x"}]}}, "look-around", "#/$defs/x"),
    ({"schema": {"allOf": [{}, {"type": "strin"}]}}, "Invalid type: strin", "#/allOf/1"),
    ({"schema": {"type": "string", "format": "regex"}}, "Unknown format: regex", "#"),
    ({"schema": {"minimum": 5, "maximum": 3, "type": "integer"}}, "minimum", "#"),
    ({"schema": {"$ref": "#/$defs/gone"}}, "/\\$defs/gone", "#"),
    ({"schema": {"$ref": "https://example.org/x.json"}}, "example.org", "#"),
    ({"schema": {"$ref": "#"}}, "no text", "#"),
    ({"schema": nested(200, {})}, "too complex", "#"),
    ({"schema": "[" * 100_000}, "not JSON", ""),
    ({"schema": {"const": "x" * 140_000}}, "at most", ""),
    ({"schema": "7"}, "not a JSON object", ""),
    ({"schema": {"const": object()}}, "not JSON", ""),
    ({"schema": {"allOf": [{"properties": {f"{n}": {}}} for n in range(3000)]}}, "too complex", "#"),
    ({"regex": "a("}, "unclosed group", ""),
    ({"regex": r"(a)\1"}, "backreferences", ""),
    ({"regex": "(" * 5000 + ")" * 5000}, "too complex", ""),
    ({"regex": "((((((.{1,50}){1,50}){1,50}){1,50}){1,50}){1,50}){1,50}"}, "too complex", ""),
    ({"regex": 5}, "not a text", ""),
    ({"regex": "\ud800"}, "surrogate", ""),
    ({"grammar": "start: missing"}, "missing", ""),
    ({"grammar": 'root ::= "a'}, "end of input", ""),
    ({"grammar": "start: <[99999999]>"}, "99999999", ""),
    ({"grammar": "start: a\na: b\nb: a"}, "no text", ""),
    ({"choices": []}, "at least one", ""),
    ({"choices": "ab"}, "not a list", ""),
    ({"choices": ["a", ""]}, "none of them empty", ""),
    ({"regex": "a", "choices": ["b"]}, "only one", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "reason", "part"), BROKEN, ids=lambda value: str(value)[:30] if isinstance(value, dict) else ""
)
def test_what_cannot_be_served_is_refused_with_the_part(given: dict[str, Any], reason: str, part: str) -> None:
    began = time.monotonic()
    with pytest.raises(errors.ConstraintError, match=reason) as caught:
        compiled(glm4(), **given)
    assert caught.value.part == part
    assert time.monotonic() - began < 5


def test_what_was_compiled_is_kept_for_the_tokenizer(tokenizer: Any) -> None:
    one = compiled(tokenizer, regex="kept")
    assert compiled(tokenizer, regex="kept") is one
    for number in range(70):
        compiled(tokenizer, regex=f"kept{number}")
    assert compiled(tokenizer, regex="kept") is not one
    other = compile_constraint(one.constraint, tokenizer, len(tokenizer), {tokenizer.eos_token_id})
    assert other.processor()(torch.tensor([[5]]), torch.zeros(1, len(tokenizer))).shape == (1, len(tokenizer))


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(errors.MissingExtraError, match=r"constrained decoding needs .*llguidance"):
        compiled(glm4(), regex="never compiled before")


def test_a_tokenizer_that_writes_a_beginning_otherwise_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(
        corpus()[:200], trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    with pytest.raises(errors.ConstraintError, match="at a beginning"):
        compiled(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>"), regex="a")


def test_an_object_that_lists_its_properties_has_no_others_unless_it_says_so() -> None:
    def closed(schema: dict[str, Any]) -> int:
        return json.dumps(read_schema(schema)).count('"additionalProperties": false')

    listed = {"properties": {"a": {"type": "object", "properties": {"b": {}}, "required": ["b"]}}}
    assert closed(listed) == 2
    assert closed({"anyOf": [listed, {"type": "null"}]}) == 2
    assert closed({**listed, "additionalProperties": True}) == 1
    assert closed({**listed, "required": ["z"]}) == 1
    for several in (
        {"allOf": [listed]},
        {**listed, "anyOf": [{"required": ["c"]}]},
        {"$ref": "#/$defs/x", "required": ["c"], "$defs": {"x": listed}},
    ):
        assert closed(several) == 0
    constraint = compiled(glm4(), schema=Pet)
    keys = {tuple(json.loads(text)) for seed in range(9) if (text := drawn(constraint.processor(), glm4(), seed)) is not None}
    assert keys == {("name", "legs")}
