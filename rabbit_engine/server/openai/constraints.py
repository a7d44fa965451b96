"""What an answer must be, in all the fields that clients use to say it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rabbit_engine.errors import ConstraintError, MissingExtraError
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.openai.fields import unsupported
from rabbit_engine.server.openai.tools import forced_name
from rabbit_engine.sessions import Session
from rabbit_engine.sessions.constraints import (
    Constraint,
    constraint_of,
    either_of,
    shows_other_calls,
    tool_constraint,
    tool_form_of,
)


@dataclass(frozen=True, slots=True)
class Forced:
    """The field that constrains an answer, and the session's options for it."""

    field: str
    options: Mapping[str, Any]

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of the constraint name the field."""
        try:
            yield
        except (ConstraintError, MissingExtraError) as error:
            raise RequestError(400, f"{self.field}: {error}", param=self.field) from error


FREE = Forced("", MappingProxyType({}))
"""Any answer."""

DIRECT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("guided_json", "json_schema"), "schema"),
        **dict.fromkeys(("guided_regex", "regex"), "regex"),
        "guided_choice": "choices",
        **dict.fromkeys(("guided_grammar", "grammar", "ebnf"), "grammar"),
    }
)
"""Fields of vLLM, llama.cpp and SGLang, with the session's option that each is."""

_STRUCTURED = {"json": "schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
_READERS: Mapping[str, Callable[[str, Any], Forced | None]]


def forced_form(given: Mapping[str, Any]) -> Forced:
    """The form that the fields of a request force an answer into. Raises RequestError for several, or what is none."""
    found = [Forced(name, {option: given[name]}) for name, option in DIRECT.items() if given.get(name) not in (None, "")]
    if given.get("guided_json_object"):
        found.append(Forced("guided_json_object", {"schema": True}))
    for name, read in _READERS.items():
        if given.get(name) is not None and (one := read(name, given[name])) is not None:
            found.append(one)
    if len(found) > 1:
        told = f"{found[0].field} and {found[1].field}: an answer follows only one of them"
        raise RequestError(400, told, param=found[1].field)
    return found[0] if found else FREE


def format_of(name: str, given: Any) -> Forced | None:
    """The form in `response_format`, or in the same as responses have it, where the schema is not nested."""
    kind = _mapping(name, given).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Forced(name, {"schema": given["schema"] if given.get("schema") is not None else True})
    if kind == "json_schema":
        inner, where = (given, name) if "schema" in given else (given.get("json_schema"), f"{name}.json_schema")
        schema = _mapping(where, inner).get("schema")
        if not isinstance(schema, Mapping):
            raise RequestError(400, f"{where}.schema: expected a JSON schema", param=f"{where}.schema")
        return Forced(name, {"schema": schema})
    told = f"{str(kind)[:60]!r} is not one of text, json_object and json_schema"
    raise RequestError(400, f"{name}.type: {told}", param=f"{name}.type")


def _structured_outputs(name: str, given: Any) -> Forced | None:
    body = {key: value for key, value in _mapping(name, given).items() if value is not None}
    chosen = [key for key in body if key in _STRUCTURED]
    if body.pop("json_object", None):
        chosen.append("json_object")
    if unknown := [key for key in body if key not in _STRUCTURED and body[key] not in (False, "")]:
        raise unsupported(f"{name}.{unknown[0][:60]}", f"possible are json_object, {', '.join(_STRUCTURED)}")
    if len(chosen) > 1:
        raise RequestError(400, f"{name}: {' and '.join(chosen)} are given, but an answer follows only one of them", param=name)
    if not chosen:
        return None
    if chosen[0] == "json_object":
        return Forced(name, {"schema": True})
    return Forced(f"{name}.{chosen[0]}", {_STRUCTURED[chosen[0]]: body[chosen[0]]})


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise RequestError(400, f"{name}: expected an object, not {type(given).__name__}", param=name)
    return given


_READERS = MappingProxyType({"response_format": format_of, "structured_outputs": _structured_outputs})


def forced_call(
    session: Session, choice: Any, tools: Sequence[Mapping[str, Any]], form: Forced, *, parallel: bool = True
) -> Forced:
    """What `tool_choice` and tools add to the form that an answer must have: a call instead, or the choice of one. `tools` are
    those that may be called. Raises RequestError."""
    wanted = forced_name(choice)
    if wanted is None:
        return form if form is FREE or not tools else _call_or_form(session, tools, form, parallel=parallel)
    if form is not FREE:
        raise RequestError(400, f"tool_choice: a call is forced, which cannot follow {form.field} too", param="tool_choice")
    forced = Forced("tool_choice", {})
    with forced.errors():
        several = parallel and wanted == "required"  # a named function is called once
        constraint = tool_constraint(tools, wanted, tool_form_of(session.model.tokenizer), parallel=several)
    return Forced("tool_choice", {"grammar": constraint})


def _call_or_form(session: Session, tools: Sequence[Mapping[str, Any]], form: Forced, *, parallel: bool) -> Forced:
    with form.errors():
        constraint = call_or_form(session, tools, form.options, parallel=parallel)
    return Forced(form.field, {"grammar": constraint})


def call_or_form(session: Session, tools: Sequence[Mapping[str, Any]], form: Mapping[str, Any], *, parallel: bool) -> Constraint:
    """Either calls in the model's own form, or an answer of a form, which is in the session's options. Raises ConstraintError."""
    tokenizer = session.model.tokenizer
    own = constraint_of(**form)
    if own is None or shows_other_calls(tokenizer):
        told = "the chat template writes calls in a form that is not known here, so that an answer of a form calls no tools"
        raise ConstraintError(f'{told}: give tool_choice "none", or no tools')
    return either_of(tool_constraint(tools, "required", tool_form_of(tokenizer), parallel=parallel), own)
