"""A constraint for a loaded model: with its tokenizer, its vocabulary and its end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rabbit_engine.errors import ConstraintError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.sessions.constraints import CompiledConstraint, ConstrainedTokens, Constraint, compile_constraint
from rabbit_engine.sessions.generation import ends_of
from rabbit_engine.sessions.options import Options
from rabbit_engine.sessions.thinking import Thinking


def constrain(
    model: SessionModel,
    *,
    schema: Any = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | Constraint | None = None,
) -> ConstrainedTokens:
    """A logits processor for one call of `model.generate`, so that each answer follows one of these: see `Options`.

    Pass it as `logits_processor=[processor]`, and `stopping_criteria=[processor.completion]` to end an answer where nothing but
    an end token can follow, without a pass for that token. Raises ConstraintError, and MissingExtraError without the extra
    `structured`.
    """
    compiled = compiled_for(model, Options(schema=schema, regex=regex, choices=choices, grammar=grammar))
    if compiled is None:
        raise ConstraintError("there is nothing to follow: give schema, regex, choices or grammar")
    return compiled.processor()


def compiled_for(model: SessionModel, options: Options, thinking: Thinking | None = None) -> CompiledConstraint | None:
    """The request's constraint for this model, after the reasoning; None without one. Raises ConstraintError and
    MissingExtraError."""
    constraint = options.constraint
    if constraint is None:
        return None
    ends = ends_of(model, replace(options, stop_token_ids=()), 1).tokens  # the request's own may be part of the text
    return compile_constraint(
        replace(constraint, thinking=thinking), model.tokenizer, int(model.config.get_text_config().vocab_size), ends
    )
