"""Makes the plan of a model whose weights are located. Only this module queries the machine; the decisions are pure."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import BudgetError
from rabbit_engine.planning.budget import FreeMemory, budget_for, misaligned, text_of, texts_in_tiers
from rabbit_engine.planning.decoding import decoding_of
from rabbit_engine.planning.demand import Demand, tier_bytes
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import NO_DECODING, Decoding, Plan
from rabbit_engine.planning.texts import disk_room, note_on_texts
from rabbit_engine.planning.tiers import Budget
from rabbit_engine.quantization.rates import decode_rate
from rabbit_engine.storage.directio import buffered_reasons
from rabbit_engine.streaming.transfer.measure import speeds_for
from rabbit_engine.utils.platform import free_memory_bytes, is_available, pinned_limit_bytes
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import Speeds


def plan_for(partition: Partition, stream: StreamConfig) -> Plan:
    """Decide what is resident, within the budget of `stream`. Raises BudgetError before memory is allocated."""
    entries = list(partition.weights.entries.values())
    free = find_free_memory(stream)
    budget, tokens = budget_for(partition, stream, free), stream.max_seq_len
    on_cpu = stream.device.type == "cpu"
    notes = _read_notes(partition, stream.device)  # first: measuring reads as the files' systems allow
    speeds = stream.speeds or speeds_for(entries, stream.device, budget.weights_bytes if on_cpu else None)
    text = None if tokens is None else text_of(partition.probe, tokens, stream)
    try:
        plan = _place(partition, stream, budget, speeds, notes)
    except BudgetError as error:
        plan, text = _place_in_tiers(partition, stream, free, speeds, notes, error)
    if text is not None and partition.probe.keeps_tokens:
        plan = replace(plan, notes=(*plan.notes, note_on_texts(partition.probe, text, speeds, 0 if on_cpu else free.host_bytes)))
    plan = replace(plan, decoding=_decoding(plan, partition, stream))
    moves = plan.bound != "compute"
    return replace(plan, notes=(*plan.notes, *_whole_experts_notes(partition))) if moves else plan


def _place_in_tiers(
    partition: Partition, stream: StreamConfig, free: FreeMemory, speeds: Speeds, notes: Sequence[str], error: BudgetError
) -> tuple[Plan, Demand]:
    """The first plan that leaves memory for a text of `max_seq_len` tokens in tiers, and that text. Raises the BudgetError of the
    text that takes the least memory, or `error` if none can be in tiers."""
    texts = texts_in_tiers(partition, stream.max_seq_len, stream) if stream.max_seq_len else []
    for text in texts:
        if tier_bytes(partition.probe, text) > _tier_room(stream, free):
            continue
        try:
            return _place(partition, stream, budget_for(partition, stream, free, text), speeds, notes), text
        except BudgetError as smaller:
            error = smaller
    raise error


def _tier_room(stream: StreamConfig, free: FreeMemory) -> int:
    """Bytes that caches may take beside the device."""
    return max(disk_room(), 0 if stream.device.type == "cpu" else free.host_bytes)


def _place(partition: Partition, stream: StreamConfig, budget: Budget, speeds: Speeds, notes: Sequence[str]) -> Plan:
    """Decode all weights at load if they fit decoded and none is multiplied by in its stored form; else decode each time they
    are used."""
    device = str(stream.device)
    if partition.is_encoded and not partition.stays_packed(stream.fused_products):
        with suppress(BudgetError):
            plan = place(partition.decoded_sizes, device, budget, speeds, notes)
            if not (plan.streamed or plan.host or plan.experts.layers):
                return plan
    return place(partition.sizes, device, budget, speeds, notes)


def _decoding(plan: Plan, partition: Partition, stream: StreamConfig) -> Decoding:
    """What a pass decodes, measured; nothing on a device that this machine does not have."""
    if not partition.is_encoded or not is_available(stream.device):
        return NO_DECODING
    return decoding_of(plan, partition, stream.fused_products, partial(decode_rate, device=stream.device))


def find_free_memory(stream: StreamConfig) -> FreeMemory:
    """The free memory. A device with a given budget is not queried: this machine may not have it."""
    return FreeMemory(
        device_bytes=0 if stream.device_budget_bytes is not None else free_memory_bytes(stream.device),
        host_bytes=free_memory_bytes(torch.device("cpu")),
        pinned_bytes=pinned_limit_bytes(),
    )


def _read_notes(partition: Partition, device: torch.device) -> list[str]:
    """Notes for the plan about the files: how they are read, and what must be realigned."""
    paths = {place.path for entry in partition.weights.entries.values() for place in entry.places}
    reasons = buffered_reasons(path for path in paths if path.is_file())
    notes = [f"reads go through the page cache: {reason}" for reason in sorted(reasons)]
    moved = sum(chunk.nbytes for chunk in misaligned(partition)) if device.type == "cpu" else 0
    if moved:
        why = "off a 16-byte boundary in their files, or joined from parts"
        notes.append(f"{format_bytes(moved)} need a second copy when read: {why}")
    return notes


def _whole_experts_notes(partition: Partition) -> list[str]:
    """The classes whose experts are moved whole, all of a layer for every token, and why."""
    return [f"the experts of {name} are moved whole, not one by one: {why}" for name, why in partition.whole_experts.items()]
