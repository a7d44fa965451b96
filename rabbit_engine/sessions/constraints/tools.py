"""Constraints that force calls of tools, in the form in which the model's chat template writes them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rabbit_engine.errors import ConstraintError, first_line
from rabbit_engine.sessions.constraints.schemas import read_schema
from rabbit_engine.sessions.constraints.spec import Constraint, bounded

logger = logging.getLogger(__name__)

_CALL = re.compile(
    r'(?P<head>\{\s*"name"\s*:\s*)"probe_(?:one|two)"(?P<middle>\s*,\s*"(?:arguments|parameters)"\s*:\s*)'
    r'\{\s*"probe"\s*:\s*"value"\s*\}(?:\s*,\s*"id"\s*:\s*"[^"]*")?(?P<tail>\s*\})'
)
_OPENING = re.compile(r"(?:<tool_call>|<\|python_tag\|>|\[TOOL_CALLS\])\s*(?:\[\s*)?\Z|\[\s*\Z")
_CLOSING = re.compile(r"\s*(?:</tool_call>|\])")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolForm:
    """How a model writes calls: `opening`, the calls with `between` in between, `closing`.

    A call is `head`, the function's name as JSON, `middle`, the arguments as JSON, `tail`. Without `between` there is only one.
    `special` are the names in these texts that are special tokens, with their ids.
    """

    opening: str = "<tool_call>\n"
    head: str = '{"name": '
    middle: str = ', "arguments": '
    tail: str = "}"
    between: str | None = "\n</tool_call>\n<tool_call>\n"
    closing: str = "\n</tool_call>"
    special: tuple[tuple[str, int], ...] = ()


TAGGED = ToolForm()
"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen's and Hermes', and that of most without an own one."""

_USER = {"role": "user", "content": "Call them."}
_PROBES: list[dict[str, Any]] = [
    {"id": "probe0001", "type": "function", "function": {"name": "probe_one", "arguments": {"probe": "value"}}},
    {"id": "probe0002", "type": "function", "function": {"name": "probe_two", "arguments": {"probe": "value"}}},
]


def tool_form_of(tokenizer: Any) -> ToolForm:
    """The form that the chat template gives to calls in a conversation; `TAGGED` if it shows none that is known here."""
    for count in (2, 1):  # some templates allow one call at a time
        text = _rendered(tokenizer, _PROBES[:count])
        calls = list(_CALL.finditer(text))
        if len(calls) == count:
            return _with_special(_form_in(text, calls), tokenizer)
    return _with_special(TAGGED, tokenizer)


def shows_other_calls(tokenizer: Any) -> bool:
    """Whether the chat template gives calls a form that is not known here, so that they can be neither forced nor found."""
    told, called = _rendered(tokenizer, _PROBES[:1], called=False), _rendered(tokenizer, _PROBES[:1])
    name = _PROBES[0]["function"]["name"]
    return called.count(name) > told.count(name) and _CALL.search(called) is None


def _rendered(tokenizer: Any, calls: Sequence[Mapping[str, Any]], *, called: bool = True) -> str:
    """A conversation with these calls, or one that only offers them, through the chat template; empty if that fails."""
    empty = {"type": "object", "properties": {}}
    functions = [{"name": call["function"]["name"], "description": "Probes.", "parameters": empty} for call in calls]
    answer = {"role": "assistant", "content": "", **({"tool_calls": list(calls)} if called else {})}
    try:
        return str(
            tokenizer.apply_chat_template(
                [_USER, answer], tools=[{"type": "function", "function": function} for function in functions], tokenize=False
            )
        )
    except Exception as error:  # noqa: BLE001 - a template is arbitrary code, and many refuse tools
        logger.info("the chat template does not render tools: %s", first_line(error))
        return ""


def _form_in(text: str, calls: Sequence[re.Match[str]]) -> ToolForm:
    first, last = calls[0], calls[-1]
    opening, closing = _OPENING.search(text[: first.start()]), _CLOSING.match(text, last.end())
    between = text[first.end() : last.start()] if last is not first else None
    return ToolForm(
        opening=opening[0] if opening else "",
        head=first["head"],
        middle=first["middle"],
        tail=first["tail"],
        between=between,
        closing=closing[0] if closing else "",
    )


def _with_special(form: ToolForm, tokenizer: Any) -> ToolForm:
    """The form with the special tokens of this tokenizer that it writes."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = {str(token.content): int(number) for number, token in added.items() if token.special}
    written = form.opening + (form.between or "") + form.closing
    return replace(form, special=tuple((name, number) for name, number in sorted(names.items()) if name in written))


def tool_constraint(
    tools: Sequence[Mapping[str, Any]], choice: str = "required", form: ToolForm = TAGGED, *, parallel: bool = True
) -> Constraint:
    """Force an answer to be one or more calls of functions; their arguments follow each function's `parameters`.

    Pass it as `Options(grammar=...)`; the calls are found again by whatever reads the model's own form.

    Args:
        tools: as in OpenAI's API, `{"type": "function", "function": {"name": ..., "parameters": ...}}`, or functions.
        choice: "required" for any of them, or the name of the one to call.
        form: of the model: `tool_form_of(tokenizer)`.
        parallel: several calls are possible, up to eight, if the form has room for them.

    Raises ConstraintError for a choice that is not among the tools, and for parameters that are no schema.
    """
    functions = [_function(tool) for tool in tools]
    chosen = [function for function in functions if choice in ("required", function["name"])]
    if not chosen:
        names = ", ".join(function["name"] for function in functions)
        raise ConstraintError(f"{choice!r} is not among the tools: {names}" if names else "there are no tools to call")
    source = {"form": asdict(form), "functions": chosen, "parallel": parallel and form.between is not None}
    return bounded(Constraint("tools", json.dumps(source)))


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    given = tool.get("function", tool)
    name = given.get("name") if isinstance(given, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ConstraintError(f"a tool has no name: {str(tool)[:80]}")
    none: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"name": name, "parameters": read_schema(given.get("parameters") or none)}
