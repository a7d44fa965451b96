"""Compiles constraints for tokenizers, and keeps what it compiled."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from rabbit_engine.errors import ConstraintError
from rabbit_engine.sessions.constraints.library import TOO_COMPLEX, open_library, worded
from rabbit_engine.sessions.constraints.processor import ConstrainedTokens
from rabbit_engine.sessions.constraints.schemas import failing_part
from rabbit_engine.sessions.constraints.spec import Constraint
from rabbit_engine.sessions.constraints.tokens import TokenBytes, TokenTable, read_token_bytes

T = TypeVar("T")

_MOST_CONSTRAINTS = 64
_MOST_VOCABULARIES = 4
"""Kept for one tokenizer: it may serve models with other end tokens, or other paddings of the vocabulary."""


@dataclass(frozen=True, slots=True)
class CompiledConstraint:
    """A constraint for one tokenizer."""

    constraint: Constraint
    _matcher: Any

    def processor(self) -> ConstrainedTokens:
        """A logits processor for one call of `generate`."""
        return ConstrainedTokens(self._matcher)


def compile_constraint(constraint: Constraint, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> CompiledConstraint:
    """Compile it, or return what was compiled before, for logits of `vocabulary` tokens, of which `ends` end an answer.

    Raises ConstraintError, which names the part that cannot be served, and MissingExtraError. Thread-safe.
    """
    open_library()
    with _LOCK:
        known = _COMPILERS.setdefault(tokenizer, OrderedDict())
    compiler = _kept(
        known, (_size(tokenizer), vocabulary, frozenset(ends)), _MOST_VOCABULARIES, lambda: _Compiler(tokenizer, vocabulary, ends)
    )
    return compiler.compile(constraint)


def _kept(kept: OrderedDict[Any, T], key: Any, most: int, make: Callable[[], T]) -> T:
    """The value of a key, made if it is not there; the one that was not used for longest makes room."""
    with _LOCK:
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    made = make()  # two threads may make the same
    with _LOCK:
        kept[key] = made
        while len(kept) > most:
            kept.popitem(last=False)
    return made


class _Compiler:
    """Compiles for one vocabulary."""

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        library = open_library()
        known: TokenBytes = read_token_bytes(tokenizer, vocabulary)
        possible = sorted(number for number in ends if number < vocabulary)
        table = library.TokenizerWrapper(TokenTable(tokenizer, known, possible))
        self._drops_space = known.drops_space
        self._tokens = library.LLTokenizer(table, eos_token=possible or None)
        self._limits = library.LLParserLimits(verbose_errors=False, max_grammar_size=50_000, max_items_in_row=10_000)
        self._matcher = library.LLMatcher
        self._compiled = OrderedDict[Constraint, CompiledConstraint]()

    def compile(self, constraint: Constraint) -> CompiledConstraint:
        """See `compile_constraint`."""
        return _kept(self._compiled, constraint, _MOST_CONSTRAINTS, lambda: self._compile(constraint))

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        matcher, reason = self._matched(constraint)
        if not reason:
            return CompiledConstraint(constraint, matcher)
        if constraint.kind == "either":
            for part in json.loads(constraint.source):
                self.compile(Constraint(**part))  # raises for the one that cannot be served
        if constraint.kind == "tools":
            for function in json.loads(constraint.source)["functions"]:
                if why := self._why_not(function["parameters"]):
                    place = self._place(function["parameters"], why)
                    raise ConstraintError(f"the parameters of {function['name']} cannot be served, at {place}: {why}", place)
        if constraint.kind != "schema":
            raise ConstraintError(f"the {constraint.kind} cannot be served: {reason}")
        place = self._place(json.loads(constraint.source), reason)
        raise ConstraintError(f"the schema cannot be served, at {place}: {reason}", place)

    def _place(self, schema: dict[str, Any], reason: str) -> str:
        return "#" if reason == TOO_COMPLEX else failing_part(schema, self._why_not)

    def _why_not(self, schema: dict[str, Any]) -> str:
        return self._matched(Constraint("schema", json.dumps(schema)))[1]

    def _matched(self, constraint: Constraint) -> tuple[Any, str]:
        """A matcher at the beginning of an answer, and why there is none; empty if there is."""
        matcher = self._matcher(self._tokens, constraint.program(drops_space=self._drops_space), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some find out only here that nothing can follow
        return matcher, worded(matcher.get_error()) if matcher.is_error() else ""


def _size(tokenizer: Any) -> int:
    """The number of its tokens, to which callers may add; 0 if it does not tell."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0


_LOCK = threading.Lock()
_COMPILERS: weakref.WeakKeyDictionary[Any, OrderedDict[Any, _Compiler]] = weakref.WeakKeyDictionary()
