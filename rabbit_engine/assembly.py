"""A model without weights and the entries of its shards, put together: what is resident is read, the rest is set streaming."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import Layout, find_layout
from rabbit_engine.config import StreamConfig
from rabbit_engine.errors import DamagedShardError, MismatchedWeightsError
from rabbit_engine.planner import Plan, UnitSize, place
from rabbit_engine.splitplan import missing_weights
from rabbit_engine.streaming import (
    Binding,
    EmbeddingRows,
    Seat,
    Streamer,
    Unit,
    claim_slots,
    guard,
    make_unit,
    placeholder_for,
    seats_of,
)
from rabbit_engine.tensorfiles import TensorEntry, read_tensor
from rabbit_engine.utils.platform import free_memory_bytes

_SHARE_OF_FREE = 0.9
"""Of the memory that is free now, what weights may take where no budget is given; the rest is for activations and cache."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Each weight of the model: where it is stored (`entries`, ties resolved), where it sits, and whose it is."""

    entries: Mapping[str, TensorEntry]
    seats: Mapping[str, Seat]
    owned: Mapping[str, Sequence[str]]

    def unit(self, module: str) -> Unit:
        """The weights of a module, as they are read."""
        return make_unit(module, list(self.stored(self.owned[module]).values()))

    def stored(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """The entries behind `names`, each once."""
        return {self.entries[name].name: self.entries[name] for name in names}

    def chairs(self, names: Iterable[str]) -> dict[str, list[Seat]]:
        """The seats among `names` that each entry fills: more than one where weights are tied."""
        found: dict[str, list[Seat]] = {}
        for name in names:
            found.setdefault(self.entries[name].name, []).append(self.seats[name])
        return found


@dataclass(slots=True)
class Assembly:
    """The running parts of a streamed model."""

    plan: Plan
    device: torch.device
    streamer: Streamer
    binding: Binding
    residents: Mapping[str, tuple[TensorEntry, Sequence[Seat]]]

    def close(self) -> None:
        """End the thread, free slots and residents."""
        self.streamer.close()
        self.binding.forget()
        for entry, seats in self.residents.values():
            for seat in seats:
                seat.seat(placeholder_for(entry, self.device, seat.holds_parameter))


def assemble(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], ties: Mapping[str, str], stream: StreamConfig
) -> Assembly:
    """Fill the skeleton `model`: residents on the device, the embedding by row, layers streamed.

    Raises BudgetError before memory is claimed, MismatchedWeightsError where the shards are not this model's.
    """
    layout = find_layout(model)
    weights = _locate(model, layout, entries, ties)
    plan = place(_sizes(model, layout, weights), str(stream.device), _device_budget(stream), stream.host_budget_bytes)
    streamed = {name for module in plan.streamed for name in weights.owned[module]}
    by_row = _rows(layout, weights, plan)
    residents = _read_residents(weights, set(weights.entries) - streamed - by_row, stream.device)
    _initialize_rest(model, weights, stream.device)
    for name in by_row:
        weights.seats[name].seat(nn.Parameter(EmbeddingRows(weights.entries[name], stream.device), requires_grad=False))
    streamer, binding = _stream(model, weights, plan, stream)
    return Assembly(plan, stream.device, streamer, binding, residents)


def _locate(model: PreTrainedModel, layout: Layout, entries: Mapping[str, TensorEntry], ties: Mapping[str, str]) -> Weights:
    state = model.state_dict()
    _check_fit(model, state, entries, ties)
    found = {name: entries[ties.get(name, name)] for name in state if ties.get(name, name) in entries}
    for target, source in list(model.all_tied_weights_keys.items()):
        if ties.get(target) != source and ties.get(source) != target:
            model.all_tied_weights_keys.pop(target)  # stored with different values: not tied, as in transformers
    owned: dict[str, list[str]] = {module: [] for module in layout.shard_names()}
    for name in found:
        owned[layout.shard_of(name)].append(name)
    return Weights(found, seats_of(model, list(found)), owned)


def _check_fit(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    entries: Mapping[str, TensorEntry],
    ties: Mapping[str, str],
) -> None:
    wrong = [name for name in entries if name not in state or tuple(state[name].shape) != entries[name].shape]
    wrong += missing_weights(state, entries, ties, model._keys_to_ignore_on_load_missing or ())
    if wrong:
        folder = next((entry.path.parent for entry in entries.values()), "the split")
        raise MismatchedWeightsError(
            f"{folder} does not fit {type(model).__name__} ({wrong[0]} and {len(wrong) - 1} more): "
            "it was split for another config or by another transformers; delete it and split again"
        )


def _sizes(model: PreTrainedModel, layout: Layout, weights: Weights) -> list[UnitSize]:
    """Every stored weight once: an embedding that is tied to the head weighs nothing of its own."""
    sizes = [UnitSize(name, "layer", weights.unit(name).nbytes) for name in layout.layers if weights.owned[name]]
    head = weights.stored(weights.owned[layout.head]) if layout.head else {}
    if layout.head and head:
        sizes.append(UnitSize(layout.head, "head", weights.unit(layout.head).nbytes))
    streamable = {*layout.layers, layout.head}
    for module, names in weights.owned.items():
        if names and module not in streamable:
            own = sum(entry.nbytes for key, entry in weights.stored(names).items() if key not in head)
            by_row = module == layout.embedding and isinstance(model.get_submodule(module), nn.Embedding) and len(names) == 1
            sizes.append(UnitSize(module, "embedding" if by_row else "resident", own))
    return sizes


def _device_budget(stream: StreamConfig) -> int:
    if stream.device_budget_bytes is not None:
        return stream.device_budget_bytes
    return int(free_memory_bytes(stream.device) * _SHARE_OF_FREE)


def _rows(layout: Layout, weights: Weights, plan: Plan) -> set[str]:
    """The embedding's weight, unless it is tied to a head that is resident anyway."""
    if layout.embedding not in plan.by_row:
        return set()
    head = weights.owned[layout.head] if layout.head in plan.resident else ()
    resident = weights.stored(head)
    return {name for name in weights.owned[layout.embedding] if weights.entries[name].name not in resident}


def _read_residents(weights: Weights, names: set[str], device: torch.device) -> dict[str, tuple[TensorEntry, Sequence[Seat]]]:
    """Read what stays, each stored weight once, and seat it wherever it is shared."""
    ordered = [name for name in weights.entries if name in names]
    chairs, stored = weights.chairs(ordered), weights.stored(ordered)
    for key, entry in stored.items():
        tensor = read_tensor(entry, DamagedShardError).to(device)
        shared = nn.Parameter(tensor, requires_grad=False) if chairs[key][0].holds_parameter else tensor
        shared._is_hf_initialized = True  # type: ignore[attr-defined]
        for seat in chairs[key]:
            seat.seat(shared)
    return {key: (entry, chairs[key]) for key, entry in stored.items()}


def _initialize_rest(model: PreTrainedModel, weights: Weights, device: torch.device) -> None:
    """What no checkpoint holds, made as transformers makes it: non-persistent buffers, weights that may be missing."""
    rest = {name for name, _ in model.named_non_persistent_buffers()} | (set(model.state_dict()) - set(weights.entries))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in rest:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for seat in seats_of(model, sorted(rest)).values():
        empty = torch.empty_like(seat.table[seat.attribute], device=device)
        seat.seat(nn.Parameter(empty, requires_grad=False) if seat.holds_parameter else empty)
    model.initialize_weights()


def _stream(model: PreTrainedModel, weights: Weights, plan: Plan, stream: StreamConfig) -> tuple[Streamer, Binding]:
    units = {module: weights.unit(module) for module in plan.streamed}
    slots = claim_slots(stream.device, plan.slots, plan.slot_bytes)
    streamer = Streamer(list(units.values()), slots, plan.slots, prefetching=stream.prefetching)
    try:
        binding = Binding(streamer, stream.device, show_progress=stream.show_layer_progress)
        for module, unit in units.items():
            binding.bind(model.get_submodule(module), unit, weights.chairs(weights.owned[module]))
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                guard(part, binding, stream.device)
    except BaseException:
        streamer.close()
        raise
    return streamer, binding
