"""What a draft costs a model that is not loaded yet, and the draft that `speculate="auto"` takes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace

from rabbit_engine.decoding import Draft, DraftModel, Lookup, Merged, MultiTokenHeads, SelfDraft
from rabbit_engine.errors import BudgetError, DraftError
from rabbit_engine.model.drafts import DraftLoader, within_rest
from rabbit_engine.planning.drafting import DraftCost, DraftGain, cost_of_heads, cost_of_model, gain_of, lookup_gain
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.planning.plan import Plan

logger = logging.getLogger(__name__)

_COPY = "4bit"
"""The compression of a copy that guesses."""


def forecast_with(draft: Draft, loader: DraftLoader) -> Plan:
    """The plan of the loader's target with a draft, from the headers of both.

    A note says what the draft gains over the plan without it, by assumed guesses.
    Raises DraftError if either does not fit, and what `planning.forecast` raises.
    """
    planned, gain = _plan_and_gain(draft, loader)
    return replace(planned, notes=(*planned.notes, f"with the draft: {gain}"))


def forecast_with_auto(loader: DraftLoader) -> Plan:
    """The plan of the loader's target with `speculate="auto"`; a note says what that may gain."""
    draft = choose_draft(loader)
    if not isinstance(draft, Lookup):
        return forecast_with(draft, loader)
    settings = loader.settings
    planned = forecast(loader.target, settings.source, settings.split, settings.stream)
    return replace(planned, notes=(*planned.notes, f"with lookup: {lookup_gain(planned)}"))


def choose_draft(loader: DraftLoader) -> Draft:
    """The draft of `speculate="auto"`: lookup, and with it what the checkpoint or a split of it brings, if that pays."""
    for own in _own_drafts(loader):
        try:
            _, gain = _plan_and_gain(own, loader)
        except (DraftError, BudgetError) as error:
            logger.info("%s of %s: not used, %s", own.name, loader.target, error)
            continue
        logger.info("%s of %s: %s", own.name, loader.target, gain)
        if gain.plain_s and gain.pays:
            return Merged(Lookup(), own)
    return Lookup()


def _own_drafts(loader: DraftLoader) -> Iterator[Draft]:
    """What there is: a copy that was split, multi-token heads."""
    if loader.has_copy(_COPY):
        yield SelfDraft(_COPY)
    if loader.has_heads():
        yield MultiTokenHeads()


def _plan_and_gain(draft: Draft, loader: DraftLoader) -> tuple[Plan, DraftGain]:
    cost, settings = _cost_of(draft, loader), loader.settings
    stream = replace(settings.stream, draft_bytes=cost.nbytes, draft_is_loaded=False)
    rest = functools.partial(forecast, loader.target, settings.source, settings.split)
    planned = within_rest(draft.name, loader.target, stream, rest)
    return planned, gain_of(rest(replace(settings.stream, speeds=planned.speeds)), planned, cost)


def _cost_of(draft: Draft, loader: DraftLoader) -> DraftCost:
    """What it takes to guess for one pass. Raises DraftError."""
    device = loader.settings.stream.device.type
    if isinstance(draft, Merged):
        return functools.reduce(DraftCost.joined, (_cost_of(each, loader) for each in draft.drafts))
    if isinstance(draft, MultiTokenHeads):
        return cost_of_heads(loader.forecast_heads())
    if isinstance(draft, DraftModel):
        return cost_of_model(loader.forecast(draft.place, draft.compression), device)
    if isinstance(draft, SelfDraft):
        return cost_of_model(loader.forecast(None, draft.compression), device)
    return DraftCost()
