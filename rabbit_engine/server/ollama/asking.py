"""Turns requests of Ollama's API into requests of the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.fields import tell_once
from rabbit_engine.server.flow import AnswerForm, form_of
from rabbit_engine.server.ollama.schema import OllamaChat, OllamaGenerate
from rabbit_engine.sessions import Request, Session
from rabbit_engine.sessions.template import reads
from rabbit_engine.sessions.thinking import MARKS

Spoken = OllamaChat | OllamaGenerate

_SWITCHES = ("enable_thinking", "thinking")
"""Variables with which chat templates turn reasoning on and off."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request of the session, and how to read the answer. `gives_context` also returns the tokens, to go on from."""

    request: Request
    form: AnswerForm
    gives_context: bool = False


def chat_question(session: Session, name: str, asked: OllamaChat) -> Question | None:
    """A conversation; None if it is empty. Raises what the session raises, and RequestError."""
    if asked.is_empty:
        return None
    if asked.tools and not session.template_reads("tools"):
        tell_once(f"the chat template of {name} does not read tools: the model is not told about them")
    variables = {**thinking_variables(session, name, asked), **({"tools": asked.tools} if asked.tools else {})}
    request = session.request(conversation(asked.messages or []), **variables, **asked.named_options())
    return Question(_roomy(session, request, asked), _form(session, request, asked, asked.tool_names))


def generate_question(session: Session, name: str, asked: OllamaGenerate) -> Question | None:
    """A prompt; None if it is empty. Raises what the session raises, and RequestError."""
    if asked.is_empty:
        return None
    if asked.images and (asked.raw or asked.context):
        raise RequestError(400, "images go through the chat template: send them without raw and context", param="images")
    options, prompt = asked.named_options(), asked.prompt or ""
    plain = asked.raw or (_template(session) is None and not asked.system)
    if plain:
        request = session.request_text(prompt, **options)
    else:
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        message = {"role": "user", "content": prompt, "images": asked.images}
        variables = thinking_variables(session, name, asked)
        request = session.request(conversation([*system, message]), **variables, **options)
    if asked.context:
        request = session.request_text([*asked.context, *request.prompt.ids], **options)
    form = AnswerForm() if plain else _form(session, request, asked)
    return Question(_roomy(session, request, asked), form, gives_context=not asked.raw and not asked.images)


def _form(session: Session, request: Request, asked: Spoken, names: Sequence[str] = ()) -> AnswerForm:
    """How to read the answer; one of a given format has no calls."""
    return form_of(session, request, () if asked.format is not None else names)


def thinking_variables(session: Session, name: str, asked: Spoken) -> dict[str, object]:
    """The variables of the chat template that turn reasoning on or off, or say how much. Raises RequestError if there is no
    such choice. An answer of a given format is preceded by reasoning only if that is wanted."""
    think, thinks = asked.think, has_reasoning(session)
    if asked.format is not None and think is None:
        think = False if thinks else None
    if think is None:
        return {}
    if isinstance(think, str) and session.template_reads("reasoning_effort"):
        return {"reasoning_effort": think}
    switch = next((one for one in _SWITCHES if session.template_reads(one)), None)
    if switch is not None and (thinks or switch == _SWITCHES[0]):
        return {switch: bool(think)}
    if think and not thinks:
        raise RequestError(400, f"{name!r} does not support thinking: its chat template has none", param="think")
    if not think and thinks and asked.format is None:
        raise RequestError(400, f"the chat template of {name!r} cannot turn thinking off", param="think")
    return {}


def has_reasoning(session: Session) -> bool:
    """Whether the chat template knows reasoning."""
    return template_reasons(_template(session) or "")


def template_reasons(template: str) -> bool:
    """Whether a chat template knows reasoning."""
    return any(marks[1] in template for marks in MARKS) or reads(template, "enable_thinking")


def _template(session: Session) -> str | None:
    found = getattr(session.model.tokenizer, "chat_template", None)
    return None if found is None else str(found)


def _roomy(session: Session, request: Request, asked: Spoken) -> Request:
    """The request, with all the room for its answer if it is unlimited."""
    options, most = asked.chosen, session.most_tokens
    if options.num_ctx is not None and options.num_ctx > most:
        tell_once(f"a request asks for num_ctx={options.num_ctx}: a prompt and its answer have room for {most} tokens")
    if not options.is_unlimited:
        return request
    before = 1 if session.model.config.is_encoder_decoder else len(request.prompt.ids)
    return replace(request, prompt=replace(request.prompt, answer_tokens=most - before))


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages in OpenAI's form, with images as parts of the content. Ollama's calls need no ids: they are counted, and an
    answer belongs to the first call of its `tool_name` that has none yet."""
    found: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    for message in messages:
        one = {name: value for name, value in message.items() if value is not None and name != "tool_name"}
        if one.get("thinking"):
            one.setdefault("reasoning_content", one["thinking"])
        if isinstance(images := one.pop("images", None), list):
            one["content"] = _with_images(images, one.get("content"))
        if isinstance(calls := one.get("tool_calls"), list):
            one["tool_calls"] = [_with_id(call, len(found), index) for index, call in enumerate(calls)]
            waiting += [(call["id"], _called(call)) for call in one["tool_calls"] if isinstance(call, dict)]
        if one.get("role") == "tool":
            _add_id(one, message.get("tool_name"), waiting)
        found.append(one)
    return found


def _with_images(images: Sequence[object], content: object) -> object:
    """Images are base64, without the beginning of a data URL."""
    if not images:
        return content
    parts = [{"type": "image_url", "image_url": {"url": _as_url(image)}} for image in images]
    return [*parts, *(content if isinstance(content, list) else [{"type": "text", "text": content}] if content else [])]


def _as_url(image: object) -> object:
    return f"data:;base64,{image}" if isinstance(image, str) and not image.startswith(("data:", "http")) else image


def _with_id(call: object, message: int, index: int) -> object:
    """A call with an id of nine characters, which templates of Mistral's require."""
    return {"type": "function", "id": f"call{message:03}{index:02}", **call} if isinstance(call, Mapping) else call


def _called(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name")) if isinstance(function, Mapping) else ""


def _add_id(message: dict[str, Any], name: object, waiting: list[tuple[str, str]]) -> None:
    if isinstance(name, str) and name:
        message.setdefault("name", name)
    own = message.get("tool_call_id")
    named = [call for call in waiting if own in (None, call[0]) and name in (None, "", call[1])]
    answered = (named or (waiting if own is None else []))[:1]
    for call in answered:
        message.setdefault("tool_call_id", call[0])
        waiting.remove(call)
