"""Renders a plan as text: rows of a table, and one line with the cost of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rabbit_engine.planning.tiers import HOST, SCRATCH, WORK
from rabbit_engine.utils.sizes import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from rabbit_engine.planning.plan import Plan
    from rabbit_engine.planning.tiers import Tier, UnitSize

Rows = list[tuple[str, str]]


def rows(plan: Plan) -> Rows:
    """The plan as (name, value) rows."""
    moves = plan.moved_bytes(plan.tiers[-1]) - plan.experts.most_bytes
    return [
        ("weights", format_bytes(plan.weights_bytes)),
        ("budget", _budget(plan)),
        *([("draft", _draft(plan))] if plan.draft_bytes else []),
        ("resident", f"{_held(plan.kept(plan.device))} on {plan.device}"),
        *_between(plan),
        ("by row", ", ".join(plan.by_row) or "nothing"),
        ("streamed", f"{len(plan.streamed)} units, {format_bytes(moves)} a pass from disk"),
        *([("experts", _experts(plan))] if plan.experts.layers else []),
        *([("over the link", f"{format_bytes(plan.link_bytes)} a pass")] if plan.link_bytes else []),
        *([("encoder", f"{format_bytes(plan.encoder_bytes)} more from disk, once a text")] if plan.encoder_bytes else []),
        *([("for images", f"{format_bytes(plan.rare_bytes)} more from disk")] if plan.rare_bytes else []),
        ("ring", f"{format_bytes(plan.ring_bytes)} on {plan.device}"),
        *[
            (name, f"{format_bytes(plan.tenant_bytes(name))} on {plan.device}")
            for name in (SCRATCH, WORK)
            if plan.tenant_bytes(name)
        ],
        *([("decoded", _decoded(plan))] if plan.decoding.nbytes else []),
        *([("staging", format_bytes(plan.staging_bytes))] if plan.staging_bytes else []),
        *[("note", note) for note in plan.notes],
        *([("a prompt", f"{format_bytes(plan.prompt_bytes)} at most: each expert once")] if plan.experts.layers else []),
        ("a pass", reason(plan)),
    ]


def _decoded(plan: Plan) -> str:
    return f"{format_bytes(plan.decoding.nbytes)} a pass, in {format_seconds(plan.decoding.seconds)}"


def _budget(plan: Plan) -> str:
    nbytes = plan.budget.weights_bytes
    amount = "not bounded" if nbytes is None else format_bytes(nbytes)
    reserved = f", after reserving {format_bytes(plan.reserved_bytes)}" if plan.reserved_bytes else ""
    return f"{amount} on {plan.device} for weights and their buffers{reserved}"


def _draft(plan: Plan) -> str:
    of = "" if plan.budget.device_bytes is None else f" of {format_bytes(plan.budget.device_bytes)}"
    return f"{format_bytes(plan.draft_bytes)}{of} on {plan.device}, in memory before any weight"


def _between(plan: Plan) -> Rows:
    """The units kept in tiers between the device and the disk."""
    kept = [(tier, plan.kept(tier.name)) for tier in plan.tiers[1:-1]]
    return [(_where(tier), _held(units)) for tier, units in kept if units]


def _experts(plan: Plan) -> str:
    """The number of experts, of those used by a token, and of those cached in each tier."""
    experts = plan.experts
    count, used = (sum(getattr(layer.routing, name) for layer in experts.layers) for name in ("count", "used"))
    cached = [sum(counts) for counts in zip(*(layer.cached for layer in experts.layers), strict=True)]
    others = [f", {here} {_where(tier)}" for here, tier in zip(cached[1:], plan.tiers[1:-1], strict=True) if here]
    held = format_bytes(sum(experts.tier_bytes(index) for index in range(len(cached))))
    return (
        f"{used} of {count} a token, each of up to {format_bytes(experts.slot_bytes)}; {cached[0]} cached on the device"
        f"{''.join(others)} ({held} with {experts.passing} in transit)"
    )


def _where(tier: Tier) -> str:
    return "in host memory" if tier.name == HOST else f"on {tier.name}"


def reason(plan: Plan) -> str:
    """One line: the cost of a pass and its reason."""
    slowest = plan.slowest()
    if plan.bound == "decoding":
        return _decoding_reason(plan, slowest)
    if slowest is None:
        return "everything fits: no weight moves after loading, so only computation takes time"
    rate = format_rate(slowest.rate or 0.0, 1)
    no_disk = "" if plan.pass_bytes else ", no disk in the loop"
    certain = "at least" if plan.source == "given" else "about"  # a short sample may err either way
    moved, seconds = _cost(plan, slowest)
    return (
        f"{moved} a pass over {_link(plan, slowest)} at {rate} ({plan.source}){no_disk}: "
        f"{certain} {seconds} a token, the first after {format_seconds(plan.first_token_s)}"
    )


def _decoding_reason(plan: Plan, slowest: Tier | None) -> str:
    decoding = plan.decoding
    moves = "no weight moves after loading"
    if slowest is not None:
        moved, seconds = format_bytes(plan.moved_bytes(slowest)), format_seconds(plan.link_seconds(slowest))
        moves = f"{moved} over {_link(plan, slowest)} would take {seconds}"
    rate = format_rate(decoding.nbytes / decoding.seconds, 1)
    return (
        f"{format_bytes(decoding.nbytes)} a pass decoded at {rate} (measured): about {format_seconds(decoding.seconds)} a token, "
        f"the first after {format_seconds(plan.first_token_s)}; {moves}"
    )


def _cost(plan: Plan, slowest: Tier) -> tuple[str, str]:
    """Bytes and seconds of a pass: from the best case, if experts can be cached, to the worst."""
    moved, seconds = format_bytes(plan.moved_bytes(slowest)), format_seconds(plan.pass_s)
    if plan.least_pass_s >= plan.pass_s:
        return moved, seconds
    least = format_bytes(plan.moved_bytes(slowest, cached=True))
    other = plan.least_bound not in (plan.bound, "compute")
    at_best = f"{format_seconds(plan.least_pass_s)}{f' (bound by the {plan.least_bound})' if other else ''}"
    return f"{least} (as many experts cached as possible) to {moved} (none)", f"{at_best} to {seconds}"


def _link(plan: Plan, slowest: Tier) -> str:
    if slowest == plan.tiers[-1]:
        return "the disk"
    return f"the link to {plan.device}" if slowest.name == HOST else f"the link from {slowest.name}"


def line(plan: Plan) -> str:
    """The plan as a debugger shows it."""
    held, moved = format_bytes(plan.device_bytes), format_bytes(plan.pass_bytes)
    return f"<Plan on {plan.device}: {format_bytes(plan.weights_bytes)} of weights, {held} held, {moved} a pass from disk>"


def _held(units: Sequence[UnitSize]) -> str:
    plural = "" if len(units) == 1 else "s"
    return f"{len(units)} unit{plural}, {format_bytes(sum(unit.nbytes for unit in units))}"
