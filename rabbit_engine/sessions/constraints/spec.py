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

MOST_CHARACTERS = 2**17
"""Of a constraint. The worst schema of this length takes the library seconds, and nothing can interrupt it."""

_ON_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` writes it: each token may cost a pass, and where any whitespace is allowed it need not end."""

Kind = Literal["schema", "regex", "choices", "grammar", "tools"]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: `source` is a JSON schema, a regular expression, a JSON list of texts, a grammar, or
    functions to call as JSON. `constraint_of` and `tool_constraint` make it of what callers write.
    """

    kind: Kind
    source: str

    def program(self, *, drops_space: bool) -> str:
        """The grammar in llguidance's form. `drops_space`: the tokenizer leaves out a space that begins an answer.

        Raises ConstraintError for what cannot be written in it, and MissingExtraError.
        """
        if not drops_space:
            return json.dumps({"grammars": [self._part()]})
        if self.kind == "choices":  # one that begins with a space needs two
            texts = json.loads(self.source)
            texts = [text for text in texts if not text.startswith(" ")] + [f" {text}" for text in texts]
            return json.dumps({"grammars": [{"lark_grammar": _any_of(texts)}]})
        return json.dumps({"grammars": [{"lark_grammar": 'start: " "? @answer'}, {"name": "answer", **self._part()}]})

    def _part(self) -> dict[str, Any]:
        if self.kind == "schema":
            schema = json.loads(self.source)
            return {"json_schema": {"x-guidance": _ON_ONE_LINE, **schema}}
        if self.kind == "choices":
            return {"lark_grammar": _any_of(json.loads(self.source))}
        if self.kind == "tools":
            return {"lark_grammar": lark_of_calls(json.loads(self.source), _ON_ONE_LINE)}
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


def _any_of(texts: Iterable[str]) -> str:
    return "start: " + " | ".join(map(json.dumps, texts))
