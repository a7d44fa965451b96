"""Byte counts and budgets into a `Plan`. Pure: no torch, no I/O; a test needs no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rabbit_engine.errors import BudgetError
from rabbit_engine.units import format_bytes

Role = Literal["layer", "embedding", "head", "resident"]

SLOTS = 2
"""One unit runs while the next is read."""


@dataclass(frozen=True, slots=True)
class UnitSize:
    """What a unit of weights is to the model, and how much it weighs.

    `layer`s are streamed; an `embedding` is read by row; a `head` is resident where there is room; a `resident` must be.
    """

    name: str
    role: Role
    nbytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays on the device, what is streamed through the slots, what is read by row, and what that costs."""

    device: str
    resident: tuple[str, ...]
    streamed: tuple[str, ...]
    by_row: tuple[str, ...]
    resident_bytes: int
    slot_bytes: int
    slots: int
    pass_bytes: int
    weights_bytes: int
    budget_bytes: int | None

    @property
    def device_bytes(self) -> int:
        """The weight memory claimed on the device, once, at load."""
        return self.resident_bytes + self.slots * self.slot_bytes

    def __str__(self) -> str:
        budget = "no budget given" if self.budget_bytes is None else f"budget {format_bytes(self.budget_bytes)}"
        return "\n".join(
            [
                f"weights    {format_bytes(self.weights_bytes)}",
                f"streamed   {len(self.streamed)} units, {format_bytes(self.pass_bytes)} a pass",
                f"resident   {', '.join(self.resident) or 'nothing'}: {format_bytes(self.resident_bytes)}",
                f"by row     {', '.join(self.by_row) or 'nothing'}",
                f"slots      {self.slots} of {format_bytes(self.slot_bytes)}",
                f"on {self.device:<8}{format_bytes(self.device_bytes)} for weights ({budget})",
            ]
        )


def place(units: Sequence[UnitSize], device: str, device_budget_bytes: int | None, host_budget_bytes: int | None) -> Plan:
    """Decide what is resident. `None` for a budget means that it is not bounded.

    Raises BudgetError, with the smallest budget that works, where a budget is too small.
    """
    with_head = _plan(units, ("head",), device, device_budget_bytes)
    plans = [with_head, _plan(units, (), device, device_budget_bytes)]
    fitting = [plan for plan in plans if device_budget_bytes is None or plan.device_bytes <= device_budget_bytes]
    smallest = min(plans, key=lambda plan: plan.device_bytes)
    if not fitting:
        raise BudgetError(
            f"{device} needs {format_bytes(smallest.device_bytes)} for weights ({SLOTS} slots of "
            f"{format_bytes(smallest.slot_bytes)} and {format_bytes(smallest.resident_bytes)} resident), the budget is "
            f"{format_bytes(device_budget_bytes or 0)}: give max_memory={{{_place(device)}: {smallest.device_bytes}}} or more"
        )
    _check_host(fitting[0], device, host_budget_bytes)
    return fitting[0]


def _check_host(plan: Plan, device: str, host_budget_bytes: int | None) -> None:
    staging = 0 if device == "cpu" else plan.slots * plan.slot_bytes
    if host_budget_bytes is not None and staging > host_budget_bytes:
        raise BudgetError(
            f"reading through host memory needs {plan.slots} slots of {format_bytes(plan.slot_bytes)}, the budget for the CPU is "
            f'{format_bytes(host_budget_bytes)}: give max_memory={{"cpu": {staging}}} or more'
        )


def _place(device: str) -> str:
    return '"cpu"' if device == "cpu" else device.partition(":")[2] or "0"


def _plan(units: Sequence[UnitSize], resident_roles: tuple[Role, ...], device: str, budget: int | None) -> Plan:
    stays = [unit for unit in units if unit.role == "resident" or unit.role in resident_roles]
    by_row = [unit for unit in units if unit.role == "embedding"]
    streamed = [unit for unit in units if unit not in stays and unit not in by_row]
    return Plan(
        device=device,
        resident=tuple(unit.name for unit in stays),
        streamed=tuple(unit.name for unit in streamed),
        by_row=tuple(unit.name for unit in by_row),
        resident_bytes=sum(unit.nbytes for unit in stays),
        slot_bytes=max((unit.nbytes for unit in streamed), default=0),
        slots=SLOTS if streamed else 0,
        pass_bytes=sum(unit.nbytes for unit in streamed),
        weights_bytes=sum(unit.nbytes for unit in units),
        budget_bytes=budget,
    )
