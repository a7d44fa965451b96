"""Turns requests of Anthropic's API into requests of the session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rabbit_engine.server.anthropic.blocks import wrong
from rabbit_engine.server.anthropic.conversation import read_conversation
from rabbit_engine.server.anthropic.instructions import place_instructions
from rabbit_engine.server.anthropic.schema import CountRequest, MessagesRequest
from rabbit_engine.server.anthropic.tools import read_tools
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.flow import AnswerForm, form_of
from rabbit_engine.server.openai.constraints import call_or_form
from rabbit_engine.sessions import Request, Session
from rabbit_engine.sessions.constraints import tool_constraint, tool_form_of
from rabbit_engine.sessions.images import ImageProcessor

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which chat templates turn reasoning on and off."""


@dataclass(frozen=True, slots=True)
class MessagePlan:
    """The session's request for an answer, and how to read it. `cut` says that less than the requested tokens fit."""

    request: Request
    form: AnswerForm
    cut: bool


def plan_message(session: Session, asked: MessagesRequest) -> MessagePlan:
    """How to answer. Raises RequestError, and what the session raises."""
    tools, conversation = _tools(asked), _conversation(session, asked)
    options = {**asked.options(), **_constraint(session, asked, tools)}
    prompted = session.request(conversation, **_variables(session, asked, tools, conversation), **options)
    request = session.within_room(prompted, asked.max_tokens)
    names = [tool["function"]["name"] for tool in tools]
    return MessagePlan(
        request, form_of(session, request, names, asked.most_calls), request.prompt.answer_tokens < asked.max_tokens
    )


def count_tokens(session: Session, asked: CountRequest) -> int:
    """The tokens of a prompt. Raises RequestError, and what the session raises."""
    tools, conversation = _tools(asked), _conversation(session, asked)
    return session.count_tokens(conversation, **_variables(session, asked, tools, conversation))


def _conversation(session: Session, asked: CountRequest) -> list[dict[str, Any]]:
    sees = ImageProcessor(session.model).takes_images
    return place_instructions(session, read_conversation(asked.system, asked.messages, with_images=sees))


def _tools(asked: CountRequest) -> list[dict[str, Any]]:
    tools = read_tools(asked.tools or [])
    return [] if asked.tool_choice is not None and asked.tool_choice.type == "none" else tools


def _constraint(session: Session, asked: MessagesRequest, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """The options that force a call, or an answer of a form."""
    choice = asked.tool_choice
    forced = choice is not None and choice.type in ("any", "tool")
    if asked.format is not None:
        if forced:
            raise RequestError(
                400, "output_config.format: an answer cannot have a form and be a call", param="output_config.format"
            )
        schema = {"schema": _schema(asked.format)}
        return {"grammar": call_or_form(session, tools, schema, parallel=asked.most_calls != 1)} if tools else schema
    if choice is None or not forced:
        return {}
    if choice.type == "tool" and choice.name is None:
        raise RequestError(400, "tool_choice.name: which tool to call", param="tool_choice.name")
    form = tool_form_of(session.model.tokenizer)
    name = choice.name if choice.type == "tool" and choice.name else "required"
    return {"grammar": tool_constraint(tools, name, form, parallel=asked.most_calls != 1)}


def _schema(form: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = form.get("schema")
    if form.get("type") != "json_schema" or not isinstance(schema, Mapping):
        told = 'must be {"type": "json_schema", "schema": {...}}'
        raise RequestError(400, f"output_config.format: {told}", param="output_config.format")
    return schema


def _variables(
    session: Session, asked: CountRequest, tools: list[dict[str, Any]], conversation: list[dict[str, Any]]
) -> dict[str, Any]:
    """The chat template's input besides the messages. A wish for thinking or for an effort that it does not read has no
    effect: clients send them to every model."""
    found: dict[str, Any] = {"tools": tools} if tools else {}
    if asked.wants_thinking is not None:
        found |= {name: asked.wants_thinking for name in _SWITCHES if session.template_reads(name)}
    if asked.effort is not None and session.template_reads("reasoning_effort"):
        found["reasoning_effort"] = asked.effort
    return found | _continuing(conversation)


def _continuing(conversation: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation that ends with the assistant's text is answered by going on with it."""
    last = conversation[-1] if conversation else None
    if last is None or last["role"] != "assistant":
        return {}
    if "tool_calls" in last:
        raise wrong("messages", "the last one has a tool_use: send its tool_result")
    if not any(part.get("text") for part in last["content"]):
        conversation.pop()
        return {}
    return {"continue_final_message": True}
