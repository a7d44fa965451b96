"""Constrained decoding: answers that follow a JSON schema, a regular expression, choices or a grammar."""

from rabbit_engine.sessions.constraints.compiling import CompiledConstraint, compile_constraint
from rabbit_engine.sessions.constraints.processor import ConstrainedTokens
from rabbit_engine.sessions.constraints.spec import Constraint, constraint_of

__all__ = ["CompiledConstraint", "ConstrainedTokens", "Constraint", "compile_constraint", "constraint_of"]
