"""Renders a plan of stages as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rabbit_engine.utils.sizes import format_bytes, format_seconds
from rabbit_engine.utils.spans import format_layers

if TYPE_CHECKING:
    from rabbit_engine.planning.machines import Machine
    from rabbit_engine.planning.stages_plan import Stage, StagesPlan

_MOST_RANGES = 4
"""A machine with more ranges of layers prints their number."""


def rows(plan: StagesPlan) -> list[tuple[str, str]]:
    """The plan as (name, value) rows."""
    used = sum(bool(plan.plans_of(machine.name)) for machine in plan.machines)
    several = plan.texts if plan.texts > 1 else len(plan.stages)
    return [
        ("weights", f"{format_bytes(plan.units.weights_bytes)} over {_counted(used, 'machine')}, {_where(plan)}"),
        *[(machine.name, _machine(plan, machine)) for machine in plan.machines],
        ("a message", f"{format_bytes(plan.units.hidden_bytes)} a token, to a stage and back"),
        ("one text", _texts(plan, 1)),
        *([("several", _texts(plan, several))] if several > 1 else []),
    ]


def reason(plan: StagesPlan) -> str:
    """One line: the devices or machines, and the seconds of a token."""
    return f"{format_bytes(plan.units.weights_bytes)} over {', '.join(plan.max_memory)}, {_where(plan)}: {_texts(plan, 1)}"


def _where(plan: StagesPlan) -> str:
    if not plan.pass_bytes:
        return "all in memory"
    return f"{format_bytes(plan.resident_bytes)} in memory, {format_bytes(plan.pass_bytes)} a token from their disks"


def _machine(plan: StagesPlan, machine: Machine) -> str:
    """What a machine holds and does."""
    stages, plans = plan.stages_of(machine.name), plan.plans_of(machine.name)
    if not plans:
        return f"no layers of {format_bytes(machine.memory_bytes)} memory: a pass is no faster with it"
    ends = ["what stands around the layers"] if machine == plan.driver else []
    resident = sum(one.resident_bytes + one.experts.device_bytes for one in plans)
    streamed = sum(stage.streamed_bytes for stage in stages)
    streamed += round(plan.ends.read_bytes(1)) if ends else 0
    moved = f", {format_bytes(streamed)} streamed" if streamed else ""
    held = f"{format_bytes(resident)} of {format_bytes(machine.memory_bytes)} stay{moved}"
    return f"{' and '.join([*([_layers(stages)] if stages else []), *ends])}: {held}, {_turns(plan, machine)}"


def _layers(stages: Sequence[Stage]) -> str:
    """The layers of stages, or their number if there are many ranges."""
    if len(stages) > _MOST_RANGES:
        count = sum(len(stage.layers) for stage in stages)
        return f"{count} layers in {len(stages)} turns, the first {stages[0].first}"
    return format_layers(layer for stage in stages for layer in stage.layers)


def _turns(plan: StagesPlan, machine: Machine) -> str:
    owners = [*(stage.machine for stage in plan.stages), plan.driver]
    turns = [turn for turn, owner in zip(plan.turns(), owners, strict=True) if owner == machine]
    slowest = max(turns, key=lambda turn: turn.seconds)
    return f"{format_seconds(sum(turn.seconds for turn in turns))} a pass, bound by {_bound(slowest.bound, '')}"


def _bound(kind: str, name: str) -> str:
    if kind == "computing":
        return f"computing{f' of {name}' if name else ''}"
    return f"the {kind} of {name}" if name else f"{'its disk' if kind == 'disk' else 'its link'}"


def _texts(plan: StagesPlan, texts: int) -> str:
    """The seconds of a pass of `texts`, and what bounds it."""
    groups, seconds = plan.groups(texts), plan.seconds(texts)
    turns = plan.turns(-(-texts // groups))
    kind, name = plan.bound(texts)
    bound = _bound(kind, name) if name else {"computing": "computing", "disk": "the disks", "link": "the links"}[kind]
    source = "measured" if all(machine.source == "measured" for machine in plan.machines) else "as given"
    parts = ", ".join(
        f"{format_seconds(sum(found))} {what}"
        for what, found in (
            ("computing", [turn.compute_s for turn in turns]),
            ("waiting for disks", [turn.waiting_s for turn in turns]),
            ("messages", [turn.hop_s for turn in turns]),
        )
        if sum(found)
    )
    if texts == 1:
        return f"about {format_seconds(seconds)} a token, bound by {bound} ({parts}; rates {source})"
    in_groups = f" in {groups} groups" if groups > 1 else ""
    rate = f"{texts / seconds:.3g} tokens a second in all"
    return f"{texts} texts{in_groups}: about {format_seconds(seconds)} a token of each, {rate}, bound by {bound}"


def _counted(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def line(plan: StagesPlan) -> str:
    """The plan as a debugger shows it."""
    held = [(machine.name, plan.stages_of(machine.name)) for machine in plan.machines]
    parts = ", ".join(f"{name} {_layers(stages)}" for name, stages in held if stages)
    return f"<StagesPlan of {len(plan.units.layers)} layers: {parts}; {format_seconds(plan.pass_s)} a token>"
