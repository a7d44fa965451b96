"""Constrained decoding: answers that follow a JSON schema, a regular expression, choices or a grammar."""

from rabbit_engine.sessions.constraints.compiling import CompiledConstraint, compile_constraint
from rabbit_engine.sessions.constraints.processor import ConstrainedTokens
from rabbit_engine.sessions.constraints.spec import Constraint, constraint_of, either_of
from rabbit_engine.sessions.constraints.tools import TAGGED, ToolForm, shows_other_calls, tool_constraint, tool_form_of

__all__ = [
    "TAGGED",
    "CompiledConstraint",
    "ConstrainedTokens",
    "Constraint",
    "ToolForm",
    "compile_constraint",
    "constraint_of",
    "either_of",
    "shows_other_calls",
    "tool_constraint",
    "tool_form_of",
]
