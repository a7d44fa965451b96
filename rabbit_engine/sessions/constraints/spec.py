"""What an answer must be: a value that says it for no tokenizer in particular."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rabbit_engine.errors import ConstraintError, first_line
from rabbit_engine.sessions.constraints.calls import lark_of_calls
from rabbit_engine.sessions.constraints.library import open_library
from rabbit_engine.sessions.constraints.schemas import read_schema
from rabbit_engine.sessions.thinking import Thinking

MOST_CHARACTERS = 2**17
"""Of a constraint. The worst schema of this length takes the library seconds, and nothing can interrupt it."""

_ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it: each token may cost a pass, and where any whitespace is allowed it need not end."""

Kind = Literal["schema", "regex", "choices", "grammar", "tools", "either"]

_THOUGHT = "THOUGHT: /(?s:.*)CLOSE/ & ~/(?s:.*)CLOSE(?s:.+)/"
"""Any text up to the first closing mark."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: `source` is a JSON schema, a regular expression, a JSON list of texts, a grammar, functions to
    call as JSON, or calls and another constraint as JSON. `constraint_of`, `tool_constraint` and `either_of` make it of what
    callers write. With `thinking` the answer may begin with reasoning, and what follows it is constrained.
    """

    kind: Kind
    source: str
    thinking: Thinking | None = None

    def program(self, *, drops_space: bool) -> str:
        """The grammar in llguidance's form. `drops_space`: the tokenizer leaves out a space that begins an answer.

        Raises ConstraintError for what cannot be written in it, and MissingExtraError.
        """
        if self.thinking is None and not drops_space and self.kind != "either":
            return json.dumps({"grammars": [self._part()]})
        if drops_space and self.kind == "choices" and self.thinking is None:  # one that begins with a space needs two
            texts = json.loads(self.source)
            texts = [text for text in texts if not text.startswith(" ")] + [f" {text}" for text in texts]
            return json.dumps({"grammars": [{"lark_grammar": _any_of(texts)}]})
        rules, others = self._rules("answer")
        space = '" "? ' if drops_space else ""
        lark = "\n".join(
            [f"start: {space}answer", *rules] if self.thinking is None else [*_thought(self.thinking, space), *rules]
        )
        return json.dumps({"grammars": [{"lark_grammar": lark}, *others]})

    @property
    def calls_begin(self) -> tuple[str, ...]:
        """How each call in an answer begins that is either calls or of a form, with and without names of special tokens, which
        texts may leave out; empty for other constraints."""
        if self.kind != "either":
            return ()
        form = json.loads(json.loads(self.source)[0]["source"])["form"]
        begin = form["opening"] + form["head"] if form["opening"] else '{"name": '
        plain = begin
        for name, _ in form["special"]:
            plain = plain.replace(name, "")
        return begin.lstrip(), plain.lstrip()

    def _rules(self, root: str) -> tuple[list[str], list[dict[str, Any]]]:
        """The rule `root` with those that it needs, and grammars beside them. Rules of one grammar may begin alike."""
        match self.kind:
            case "schema":
                return [f"{root}: %json {json.dumps(self._part()['json_schema'])}"], []
            case "tools":
                return lark_of_calls(json.loads(self.source), _ON_ONE_LINE, root), []
            case "either":
                calls, form = (Constraint(**part) for part in json.loads(self.source))
                (calling, _), (forming, others) = calls._rules("calls"), form._rules("form")
                return [f"{root}: calls | form", *calling, *forming], others
            case _:
                return [f"{root}: @{root}_apart"], [{"name": f"{root}_apart", **self._part()}]

    def _part(self) -> dict[str, Any]:
        if self.kind == "schema":
            schema = json.loads(self.source)
            return {"json_schema": {"x-guidance": _ON_ONE_LINE, **schema}}
        if self.kind == "choices":
            return {"lark_grammar": _any_of(json.loads(self.source))}
        if self.kind == "tools":
            return {"lark_grammar": "\n".join(lark_of_calls(json.loads(self.source), _ON_ONE_LINE))}
        return {"lark_grammar": self._lark()}

    def _lark(self) -> str:
        library = open_library()
        try:
            if self.kind == "regex":
                return f"start: /{library.regex_to_lark(self.source, 'd')}/"
            return str(library.grammar_from("gbnf", self.source)) if "::=" in self.source else self.source
        except ValueError as error:
            raise ConstraintError(f"the {self.kind} cannot be read: {first_line(error)}") from error


def constraint_of(
    *, schema: object = None, regex: object = None, choices: object = None, grammar: object = None
) -> Constraint | None:
    """The constraint that was given; None if none was. Raises ConstraintError for several, or what is none of its kind."""
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConstraintError(f"{' and '.join(names)} are given, but an answer follows only one of them")
    if not names:
        return None
    if isinstance(grammar, Constraint):
        return grammar
    return bounded(_READERS[names[0]](given[names[0]]))


def either_of(calls: Constraint, form: Constraint) -> Constraint:
    """Either calls, of `tool_constraint`, or an answer of a form."""
    return bounded(Constraint("either", json.dumps([{"kind": each.kind, "source": each.source} for each in (calls, form)])))


def bounded(constraint: Constraint) -> Constraint:
    """The constraint. Raises ConstraintError if it is too long."""
    length = len(constraint.source)
    if length > MOST_CHARACTERS:
        raise ConstraintError(f"{constraint.kind} has {length} characters, and at most {MOST_CHARACTERS} are accepted")
    return constraint


def _read_choices(given: Any) -> Constraint:
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ConstraintError(f"choices={given!r} is not a list of texts")
    texts = list(given)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ConstraintError("choices must be a list of at least one text, and none of them empty")
    return Constraint("choices", json.dumps(list(dict.fromkeys(texts))))


def _read_text(kind: Literal["regex", "grammar"], given: object) -> Constraint:
    if not isinstance(given, str) or not given.strip():
        raise ConstraintError(f"{kind}={given!r} is not a text with a {kind} in it")
    if not given.isascii() and re.search("[\ud800-\udfff]", given):
        raise ConstraintError(f"the {kind} contains half a character, a lone surrogate")
    return Constraint(kind, given)


_READERS: Mapping[str, Any] = {
    "schema": lambda given: Constraint("schema", json.dumps(read_schema(given))),
    "regex": lambda given: _read_text("regex", given),
    "choices": _read_choices,
    "grammar": lambda given: _read_text("grammar", given),
}


def _thought(thinking: Thinking, space: str) -> list[str]:
    """The rules of an answer with reasoning before it, which may be none unless it is begun already."""
    begun = r"THOUGHT /\n{0,2}/ answer"
    whole = f"start: {space}{begun}" if thinking.begun else f"start: {space}{json.dumps(thinking.begin)} {begun} | {space}answer"
    return [whole, _THOUGHT.replace("CLOSE", re.escape(thinking.close).replace("/", r"\/"))]


def _any_of(texts: Iterable[str]) -> str:
    return "start: " + " | ".join(map(json.dumps, texts))
