"""Forced calls are in the form of the chat template, and are found again with arguments that follow their schemas."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from test_constraints import drawn, masks
from vocabularies import glm4

from rabbit_engine import Session, errors
from rabbit_engine.server.calls import FoundCall, split_calls
from rabbit_engine.server.flow import Answer, AnswerFlow, AnswerForm
from rabbit_engine.sessions import Piece
from rabbit_engine.sessions.constraints import (
    TAGGED,
    ToolForm,
    compile_constraint,
    constraint_of,
    either_of,
    shows_other_calls,
    tool_constraint,
    tool_form_of,
)

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
_EACH = "{% for m in messages %}{% if m.tool_calls is defined %}"
_REST = "{% else %}{{ m.content }}{% endif %}{% endfor %}"
_CALL = '{{ "{\\"name\\": \\"" + c.function.name + "\\", \\"KEY\\": " }}{{ c.function.arguments | tojson }}{{ "}" }}'
TAGS = f"{_EACH}{{% for c in m.tool_calls %}}<tool_call> {_CALL.replace('KEY', 'arguments')} </tool_call>{{% endfor %}}{_REST}"
LISTED = (
    f'{_EACH}[TOOL_CALLS] [{{% for c in m.tool_calls %}}{{{{ (c.function | tojson)[:-1] }}}}, "id": "{{{{ c.id }}}}"}}'
    f"{{% if not loop.last %}}, {{% endif %}}{{% endfor %}}]</s>{_REST}"
)
BARE = (
    f'{_EACH}{{% if m.tool_calls | length > 1 %}}{{{{ raise_exception("one at a time") }}}}{{% endif %}}'
    f"{{% set c = m.tool_calls[0] %}}{_CALL.replace('KEY', 'parameters')}<|end|>{_REST}"
)
OTHER = f"{_EACH}{{% for c in m.tool_calls %}}<fn={{{{ c.function.name }}}}>{{% endfor %}}{_REST}"


def with_template(template: str | None, special: tuple[str, ...] = ()) -> Any:
    tokenizer = copy.deepcopy(glm4())
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def calls_of(text: str) -> list[FoundCall]:
    found = split_calls(text, ["get_weather", "now"], ended=True)
    assert all(isinstance(part, FoundCall) for part in found), text
    for call in found:
        Draft202012Validator(WEATHER if call.name == "get_weather" else {"maxProperties": 0}).validate(json.loads(call.arguments))
    return found


@pytest.mark.parametrize(
    ("template", "begins", "several"),
    [
        (TAGS, '<tool_call> {"name": "', True),
        (LISTED, '[TOOL_CALLS] [{"name": "', True),
        (BARE, '{"name": "', False),
        (OTHER, '<tool_call>\n{"name": "', True),
        (None, '<tool_call>\n{"name": "', True),
    ],
    ids=["tags", "list", "bare", "unknown", "none"],
)
def test_calls_are_written_as_the_template_writes_them(template: str | None, begins: str, several: bool) -> None:
    tokenizer = with_template(template)
    form, counts, names = tool_form_of(tokenizer), set[int](), set[str]()
    ends = {tokenizer.eos_token_id}
    for parallel in (True, False):
        constraint = compile_constraint(
            tool_constraint(TOOLS, form=form, parallel=parallel), tokenizer, len(tokenizer) + 60, ends
        )
        for seed in range(8):
            text = drawn(constraint.processor(), tokenizer, seed, most=400)
            if text is not None:
                assert text.startswith(begins)
                found = calls_of(text)
                counts |= {len(found)}
                names |= {call.name for call in found}
                assert parallel or len(found) == 1
    assert names == {"get_weather", "now"}
    assert (max(counts) > 1) is several
    assert max(counts) <= 8


def test_a_marker_that_is_a_special_token_is_that_token() -> None:
    tokenizer = with_template(LISTED, special=("[TOOL_CALLS]",))
    form = tool_form_of(tokenizer)
    marker = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert form.special == (("[TOOL_CALLS]", marker),)
    constraint = compile_constraint(tool_constraint(TOOLS, "now", form), tokenizer, len(tokenizer) + 60, {tokenizer.eos_token_id})
    assert masks(constraint.processor(), [5, 6], len(tokenizer) + 60)[0].nonzero().flatten().tolist() == [marker]
    text = drawn(constraint.processor(), tokenizer, 1, most=400)
    assert text is not None
    assert text.removeprefix("[TOOL_CALLS]").startswith(' [{"name": "now", "arguments": {}}')
    assert {call.name for call in calls_of(text)} == {"now"}
    assert tool_form_of(with_template(None, special=("<tool_call>",))).special[0][0] == "<tool_call>"


def test_what_cannot_be_forced_is_refused() -> None:
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    for tools, choice, reason in (
        (TOOLS, "later", "'later' is not among the tools: get_weather, now"),
        ([], "required", "no tools"),
        ([{"function": {}}], "required", "no name"),
        ([{"name": "f", "parameters": "x"}], "required", "not JSON"),
    ):
        with pytest.raises(errors.ConstraintError, match=reason):
            tool_constraint(tools, choice)
    with pytest.raises(errors.ConstraintError, match=r"parameters of f .*#/properties/a: uniqueItems is not supported") as caught:
        compile_constraint(tool_constraint([TOOLS[1], {"name": "f", "parameters": bad}]), glm4(), 1600, {1503})
    assert caught.value.part == "#/properties/a"


def test_a_model_that_knows_no_tools_calls_one(smollm_model: Any, session: Session) -> None:
    assert tool_form_of(smollm_model.tokenizer) == TAGGED
    forced = tool_constraint(TOOLS, "get_weather", TAGGED, parallel=False)
    reply = session.chat("How warm is it in Rome?", grammar=forced, temperature=0, max_new_tokens=60)
    assert reply.finish_reason == "stop"
    assert [call.name for call in calls_of(reply.text)] == ["get_weather"]


NAMED = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}}, "required": ["name"]}
SIZED = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}


def written(form: ToolForm, name: str, arguments: str) -> str:
    return form.opening + form.head + json.dumps(name) + form.middle + arguments + form.tail + form.closing


def read(text: str, begin: tuple[str, ...], step: int) -> Answer:
    """What an interface reads from an answer in pieces."""
    flow, answer = AnswerFlow(AnswerForm(("get_weather", "now"), calls_begin=begin)), Answer()
    for at in range(0, len(text), step):
        for delta in flow.push(Piece(text[at : at + step])):
            answer.add(delta)
    for delta in flow.end():
        answer.add(delta)
    return answer


@pytest.mark.parametrize("schema", [NAMED, SIZED], ids=["named", "sized"])
@pytest.mark.parametrize(
    ("template", "special"), [(TAGS, ()), (LISTED, ("[TOOL_CALLS]",)), (BARE, ())], ids=["tags", "list", "bare"]
)
def test_an_answer_is_either_calls_or_of_a_schema(template: str, special: tuple[str, ...], schema: dict[str, Any]) -> None:
    tokenizer = with_template(template, special)
    form = constraint_of(schema=schema)
    assert form is not None
    either = either_of(tool_constraint(TOOLS, form=tool_form_of(tokenizer)), form)
    constraint = compile_constraint(either, tokenizer, len(tokenizer) + 60, {tokenizer.eos_token_id})
    for text in (written(tool_form_of(tokenizer), "now", "{}"), json.dumps({"name": "now"} if schema is NAMED else {"size": 1})):
        begin = [tokenizer.convert_tokens_to_ids(name) for name in special if text.startswith(name)]
        rest = text.removeprefix("".join(special))
        ids = [5, 6, *begin, *tokenizer(rest, add_special_tokens=False)["input_ids"]]
        processor = constraint.processor()
        for length in range(2, len(ids)):
            assert masks(processor, ids[:length], len(tokenizer) + 60)[0, ids[length]], text[: length - 2]
    for seed in range(6):
        if (text := drawn(constraint.processor(), tokenizer, seed, most=400)) is None:
            continue
        whole = read(text, either.calls_begin, len(text))
        assert read(text, either.calls_begin, 1).text == whole.text
        for call in whole.calls:
            Draft202012Validator(WEATHER if call.name == "get_weather" else {"maxProperties": 0}).validate(
                json.loads(call.arguments)
            )
        if not whole.calls:
            Draft202012Validator(schema).validate(json.loads(whole.text))


def test_a_schema_is_told_from_calls_as_soon_as_it_can_be() -> None:
    form = constraint_of(schema=SIZED)
    assert form is not None
    flow = AnswerFlow(AnswerForm(("now",), calls_begin=either_of(tool_constraint(TOOLS), form).calls_begin))
    assert flow.push(Piece('{"siz')) != []
    bare = AnswerFlow(AnswerForm(("now",), calls_begin=('{"name": ',)))
    assert (bare.push(Piece('{"')), bare.push(Piece("size")) != []) == ([], True)


def test_a_part_that_cannot_be_served_is_named_in_either() -> None:
    form = constraint_of(schema={"properties": {"a": {"not": {}}}})
    assert form is not None
    with pytest.raises(errors.ConstraintError, match="#/properties/a: not is not supported"):
        compile_constraint(either_of(tool_constraint(TOOLS), form), glm4(), 1600, {1503})


def test_a_template_with_calls_of_another_form_is_noticed() -> None:
    found = {name: shows_other_calls(with_template(text)) for name, text in (("other", OTHER), ("tags", TAGS), ("none", None))}
    assert found == {"other": True, "tags": False, "none": False}
