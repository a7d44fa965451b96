"""Answers split into reasoning, text and tool calls: the same in any pieces."""

from __future__ import annotations

import json
import random

import pytest

from rabbit_engine.server.calls import FoundCall, split_calls
from rabbit_engine.server.flow import Answer, AnswerFlow, AnswerForm
from rabbit_engine.sessions import Piece, Reply, TokenLogprob

THINK = ("<think>", "</think>")
A, B = '{"name": "a", "arguments": {"x": "}{\\""}}', '{"arguments": {"y": [1, {}]}, "name": "b"}'
TEXTS = [
    "plain text",
    " with space \n",
    "5 < 6 <tool",
    "<",
    "[1, 2]",
    "{" * 500,
    '{"name": "other", "arguments": {}}',
    f"<tool_call>{A}</tool_call>",
    f"Yes.\n<tool_call>\n{A}\n</tool_call>\n<tool_call>\n{B}\n</tool_call>\nDone.",
    f"<tool_call>[{A}, {B}]</tool_call>",
    "<tool_call>no json</tool_call> then",
    f"x<tool_call>no json</tool_call>y<tool_call>{A}</tool_call>",
    '<tool_call>{"name": "a", "arguments": {"x": 1',
    f"[TOOL_CALLS] [{A}, {B}]",
    f"[TOOL_CALLS]{A}",
    '<|python_tag|>{"name": "b", "parameters": {"q": "é"}}; {"name": "a", "parameters": {}}',
    f"  [{A}]",
    f"{A} and then",
]
THOUGHTS = [
    ("<think>\nhm\n\nok\n</think>\n\nHello", False),
    (f"hm</think>\n\nHello <tool_call>{A}</tool_call>", True),
    ("<think>never ends\n", False),
    ("<think></think>\n\nyes", False),
    ("<thi", False),
    ("no <think>thought</think>", False),
    ("\n", True),
]


def in_pieces(text: str, form: AnswerForm, seed: int) -> Answer:
    flow, answer, dice, at = AnswerFlow(form), Answer(), random.Random(seed), 0
    deltas = []
    while at < len(text):
        size = dice.choice((1, 1, 2, 3, 7))
        deltas += flow.push(Piece(text[at : at + size]))
        at += size
    for delta in (*deltas, *flow.end()):
        answer.add(delta)
    return answer


def said(answer: Answer) -> object:
    return answer.reasoning, answer.text, [(call.name, call.arguments) for call in answer.calls]


def reply(text: str) -> Reply:
    return Reply(text, (), "stop", 1)


@pytest.mark.parametrize("text", TEXTS)
def test_calls_are_the_same_in_any_pieces(text: str) -> None:
    form = AnswerForm(("a", "b"))
    whole = said(AnswerFlow.read(form, reply(text)))
    assert all(said(in_pieces(text, form, seed)) == whole for seed in range(25))


@pytest.mark.parametrize(("text", "begun"), THOUGHTS)
def test_reasoning_is_the_same_in_any_pieces(text: str, begun: bool) -> None:
    form = AnswerForm(("a", "b"), thinking=THINK, begun=begun)
    whole = said(AnswerFlow.read(form, reply(text)))
    assert all(said(in_pieces(text, form, seed)) == whole for seed in range(25))


@pytest.mark.parametrize(
    ("text", "reasoning", "rest"),
    [
        ("<think>\nhm\n</think>\n\nHello", "hm", "Hello"),
        ("<think>hm", "hm", ""),
        ("<think></think>yes", "", "yes"),
        ("no <think>thought</think>", "", "no <think>thought</think>"),
    ],
)
def test_reasoning_is_split_off(text: str, reasoning: str, rest: str) -> None:
    answer = AnswerFlow.read(AnswerForm(thinking=THINK), reply(text))
    assert (answer.reasoning, answer.text) == (reasoning, rest)
    assert AnswerFlow.read(AnswerForm(), reply(text)).text == text


@pytest.mark.parametrize(
    ("text", "rest", "names"),
    [
        ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', "", ["a"]),
        ('Yes.<tool_call>{"name": "a"}</tool_call>\n<tool_call>{"name": "b"}</tool_call>', "Yes.", ["a", "b"]),
        ('[TOOL_CALLS] [{"name": "a", "arguments": {}}]', "", ["a"]),
        ('<|python_tag|>{"name": "b", "parameters": {"q": "é"}}', "", ["b"]),
        ('{"name": "a", "arguments": "{\\"x\\": 1}"}', "", ["a"]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
        ("just text", "just text", []),
        ("{" * 5000, "{" * 5000, []),
    ],
)
def test_calls_in_the_commonest_forms(text: str, rest: str, names: list[str]) -> None:
    answer = AnswerFlow.read(AnswerForm(("a", "b")), reply(text))
    assert (answer.text, [call.name for call in answer.calls]) == (rest, names)
    assert all(isinstance(json.loads(call.arguments), dict) for call in answer.calls)


def test_at_most_as_many_calls_as_wanted() -> None:
    text = f"<tool_call>{A}</tool_call><tool_call>{B}</tool_call>"
    assert [call.name for call in AnswerFlow.read(AnswerForm(("a", "b"), most_calls=1), reply(text)).calls] == ["a"]


def test_arguments_come_before_the_call_is_complete() -> None:
    assert split_calls('<tool_call>{"name": "a", "arguments": {"x": "ab', ["a"], ended=False) == [FoundCall("a", '{"x": "ab')]


def test_every_log_probability_is_given_out_once() -> None:
    text = f"Well.<tool_call>{A}</tool_call>"
    flow = AnswerFlow(AnswerForm(("a",)))
    found = []
    for index, letter in enumerate(text):
        found += flow.push(Piece(letter, index, TokenLogprob(index, 0.0, ())))
    found += flow.end()
    tokens = [entry.token for delta in found for entry in getattr(delta, "logprobs", ())]
    assert tokens == list(range(len(text)))
