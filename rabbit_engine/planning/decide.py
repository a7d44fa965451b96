"""The plan of a model whose weights are located: its budget, the speeds of the links, and where each unit goes."""

from __future__ import annotations

from dataclasses import replace

from rabbit_engine.config import StreamConfig
from rabbit_engine.planning.budget import budget_for, read_notes, speeds_for, whole_experts_notes
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan


def plan_for(partition: Partition, stream: StreamConfig) -> Plan:
    """Decide what is resident, within the budget of `stream`. Raises BudgetError before memory is claimed."""
    entries = list(partition.weights.entries.values())
    budget = budget_for(partition, stream)
    on_cpu = stream.device.type == "cpu"
    speeds = stream.speeds or speeds_for(entries, stream.device, budget.device_bytes if on_cpu else None)
    plan = place(partition.sizes, str(stream.device), budget, speeds, read_notes(partition, stream.device))
    moves = plan.bound != "compute"
    return replace(plan, notes=(*plan.notes, *whole_experts_notes(partition))) if moves else plan
