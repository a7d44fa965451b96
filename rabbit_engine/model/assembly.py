"""A model without weights and the entries of its files, put together: what is resident is read, the rest is set streaming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import initialize
from rabbit_engine.config import StreamConfig
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.partition import Sketch, draw
from rabbit_engine.planning.plan import Plan
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import (
    Binding,
    EmbeddingRows,
    ExpertCache,
    ExpertLayer,
    ExpertsAway,
    LinearBlocks,
    Ring,
    RoutedExperts,
    RowBlock,
    StandIns,
    Streamer,
    TiedRows,
    Trace,
    Unit,
    claim_ring,
    fill_all,
    guard,
    join_rows,
    make_unit,
    pin,
    route,
    seats_of,
    unpin,
)
from rabbit_engine.utils.heap import give_large_blocks_back
from rabbit_engine.utils.platform import free_memory_bytes

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Assembly:
    """The running parts of a streamed model."""

    plan: Plan
    sketch: Sketch
    device: torch.device
    streamer: Streamer
    binding: Binding
    trace: Trace
    ring: Ring

    def free_bytes(self) -> int:
        """What caches and activations may take now: free memory, less what of the ring was claimed and never written."""
        return max(0, free_memory_bytes(self.device) - self.ring.untouched_bytes)

    def close(self) -> None:
        """End the reading, free the ring and what stays in it. A forked child has nothing to end: it returns at once."""
        if self.streamer.forked:
            return
        self.streamer.close()
        self.binding.forget()
        weights, stand_ins = self.sketch.weights, StandIns(self.device)
        for name, seat in weights.seats.items():
            seat.seat(stand_ins.stand_in(weights.entries[name], seat.holds_parameter))


def assemble(
    model: PreTrainedModel, entries: Mapping[str, TensorEntry], ties: Mapping[str, str], stream: StreamConfig
) -> Assembly:
    """Fill the skeleton `model`: residents on the device, the embedding by row, everything else streamed.

    Raises BudgetError before memory is claimed, MismatchedWeightsError where the files are not this model's.
    """
    give_large_blocks_back()
    sketch = draw(model, entries, ties, stream.cut, stream.device.type)
    plan = plan_for(sketch, stream)
    trace = Trace(on=stream.profiling_mode, device=stream.device)
    builder = _Builder(model, sketch, plan, stream, trace)
    try:
        builder.seat_residents()
        _initialize_rest(model, sketch, stream.device)
        return builder.set_streaming()
    except BaseException:
        builder.close()
        raise


class _Builder:
    """Puts one model together; `close` undoes what was claimed so far."""

    def __init__(self, model: PreTrainedModel, sketch: Sketch, plan: Plan, stream: StreamConfig, trace: Trace) -> None:
        self._model, self._sketch, self._plan, self._stream, self._trace = model, sketch, plan, stream, trace
        self._ring = claim_ring(stream.device, plan.device_bytes, trace)
        self._residents = _one_behind_another(_resident_units(sketch, plan))
        self._stand_ins = StandIns(stream.device)
        self._streamer: Streamer | None = None
        self._host_memory: list[torch.Tensor] = []

    def close(self) -> None:
        """End the streamer, or free the ring alone."""
        if self._streamer is not None:
            self._streamer.close()
        else:
            self._ring.close()
            _unpin_all(self._host_memory)

    def seat_residents(self) -> None:
        """Read what stays to the beginning of the ring's memory, and seat it wherever it is shared."""
        fill_all(self._ring, self._residents)
        block_units = {block.unit for block in self._sketch.blocks}
        for unit, start in self._residents:
            if unit.name not in block_units:
                memory = self._ring.view(start, unit.nbytes)
                for piece in unit.pieces:
                    self._seat_everywhere(piece.entry.name, piece.view(memory))

    def _seat_everywhere(self, entry_name: str, tensor: torch.Tensor) -> None:
        chairs = self._sketch.weights.chairs(entry_name)
        shared = nn.Parameter(tensor, requires_grad=False) if chairs[0].holds_parameter else tensor
        shared._is_hf_initialized = True  # type: ignore[attr-defined]
        for seat in chairs:
            seat.seat(shared)

    def set_streaming(self) -> Assembly:
        """Claim host memory, start the streamer, and bind every streamed unit to its module."""
        sketch, device = self._sketch, self._stream.device
        join_rows(self._model)  # before units are bound: inside of their forwards
        moving = [sketch.units[name] for name in sketch.units if name in {*self._plan.streamed, *self._plan.host}]
        experts = self._claim_experts()
        streamer = Streamer(
            moving,
            self._ring,
            self._plan.ring_bytes,
            base=self._plan.resident_bytes + self._plan.experts.device_bytes,
            host=self._fill_host(),
            rare={size.name for size in sketch.sizes if size.rare},
            experts=experts,
            prefetching=self._stream.prefetching,
            rates=(self._plan.speeds.disk, self._plan.speeds.link),
            at_close=[partial(_unpin_all, self._host_memory), *([experts.free] if experts is not None else [])],
        )
        self._streamer = streamer
        layers, show_progress = sketch.layout.layers, self._stream.show_layer_progress
        binding = Binding(streamer, device, self._trace, layers=layers, show_progress=show_progress)
        self._seat_head(binding)
        self._seat_embedding()
        for unit in moving:
            module = sketch.modules.get(unit.name)
            if module is not None:
                seats = {piece.entry.name: sketch.weights.chairs(piece.entry.name, module) for piece in unit.pieces}
                binding.bind(self._model.get_submodule(module), unit, seats, self._stand_ins)
        if experts is not None:
            self._route_experts(experts, binding)
        self._seat_tied_elsewhere()
        for part in self._model.modules():
            if isinstance(part, PreTrainedModel):
                guard(part, binding, device)
        return Assembly(self._plan, sketch, device, streamer, binding, self._trace, self._ring)

    def _seat_tied_elsewhere(self) -> None:
        """A weight that another module streams, in the modules that share it."""
        for name, seat in self._sketch.weights.seats.items():
            if seat.holds_parameter and seat.table[seat.attribute].device.type == "meta":
                seat.seat(self._stand_ins.stand_in(self._sketch.weights.entries[name], True))

    def _claim_experts(self) -> ExpertCache | None:
        """The slots for experts that are read as they are routed to, and those in host memory. They lie before the ring, which
        may be of any size: reads go to whole pages."""
        plan, host = self._plan.experts, None
        if not plan.layers:
            return None
        if plan.host_bytes:
            host = claim_ring(torch.device("cpu"), plan.host_bytes, self._trace)
            self._pin(host.view(0, plan.host_bytes))
        layers = [
            ExpertLayer(layer.name, self._sketch.experts[layer.name], layer.routing.used, layer.on_device, layer.in_host)
            for layer in plan.layers
        ]
        slots, base = plan.device_bytes // plan.slot_bytes, self._plan.resident_bytes
        return ExpertCache(layers, self._ring, slots, plan.slot_bytes, base=base, host=host, trace=self._trace)

    def _route_experts(self, cache: ExpertCache, binding: Binding) -> None:
        weights = self._sketch.weights
        for layer in self._plan.experts.layers:
            for name in weights.names_in(layer.name):
                seat = weights.seats[name]
                seat.seat(self._stand_ins.stand_in(weights.entries[name], seat.holds_parameter, ExpertsAway))
            experts = RoutedExperts(layer.name, self._sketch.experts[layer.name], cache, binding)
            route(self._model.get_submodule(layer.name), experts)

    def _fill_host(self) -> dict[str, torch.Tensor]:
        """Read what stays in host memory, and pin it where the device copies from pinned memory."""
        units = [self._sketch.units[name] for name in self._plan.host]
        if not units:
            return {}
        nbytes = sum(unit.nbytes for unit in units)
        ring = claim_ring(torch.device("cpu"), nbytes, self._trace)
        fill_all(ring, _one_behind_another(units))
        memory = self._pin(ring.view(0, nbytes))
        return {unit.name: memory[start : start + unit.nbytes] for unit, start in _one_behind_another(units)}

    def _pin(self, memory: torch.Tensor) -> torch.Tensor:
        """Page-lock memory that the device copies from, where that is a thing."""
        if self._stream.device.type == "cuda":
            self._host_memory.append(pin(memory))
        return memory

    def _seat_head(self, binding: Binding) -> None:
        """A head in blocks: those that stay are views, the others are borrowed as they arrive."""
        sketch, device = self._sketch, self._stream.device
        starts = {unit.name: start for unit, start in self._residents}
        if sketch.head is None or sketch.head in starts:
            return
        blocks = []
        for block in sketch.blocks:
            unit = sketch.units[block.unit]
            borrow = _resident(self._ring, unit, starts[unit.name]) if unit.name in starts else partial(binding.borrow, unit)
            blocks.append(RowBlock(block.first, block.stop, borrow))
        entry, embedding = sketch.weights.entries[sketch.head], sketch.embedding
        tied = embedding is not None and sketch.weights.entries[embedding].name == entry.name
        weight = (TiedRows if tied else LinearBlocks)(entry, device, blocks)
        sketch.weights.seats[sketch.head].seat(self._stand_ins.add(weight))

    def _seat_embedding(self) -> None:
        """The embedding by row, unless it stays, or shares its memory with a head that does."""
        sketch = self._sketch
        if sketch.embedding is None or sketch.layout.embedding not in self._plan.by_row:
            return
        entry, seat = sketch.weights.entries[sketch.embedding], sketch.weights.seats[sketch.embedding]
        if isinstance(seat.table[seat.attribute], nn.Parameter) and seat.table[seat.attribute].device.type != "meta":
            return
        seat.seat(self._stand_ins.add(EmbeddingRows(entry, self._stream.device)))


def _unpin_all(memory: list[torch.Tensor]) -> None:
    while memory:
        unpin(memory.pop())


def _resident(ring: Ring, unit: Unit, start: int) -> Callable[[], AbstractContextManager[torch.Tensor]]:
    @contextmanager
    def borrow() -> Iterator[torch.Tensor]:
        yield unit.pieces[0].view(ring.view(start, unit.nbytes))

    return borrow


def _resident_units(sketch: Sketch, plan: Plan) -> list[Unit]:
    """What stays. A head whose every block stays is not cut: its module runs as it is."""
    found = [sketch.units[name] for name in plan.resident]
    blocks = {block.unit for block in sketch.blocks}
    if sketch.head is None or not blocks <= set(plan.resident):
        return found
    whole = make_unit(sketch.head, [sketch.weights.entries[sketch.head]])
    return [unit for unit in found if unit.name not in blocks] + [whole]


def _one_behind_another(units: Sequence[Unit]) -> list[tuple[Unit, int]]:
    """Each unit and where it starts when they lie one behind another."""
    starts, position = [], 0
    for unit in units:
        starts.append((unit, position))
        position += unit.nbytes
    return starts


def _initialize_rest(model: PreTrainedModel, sketch: Sketch, device: torch.device) -> None:
    """What no checkpoint holds, made as transformers makes it: non-persistent buffers, weights that may be missing."""
    rest = {name for name, _ in model.named_non_persistent_buffers()} | (set(model.state_dict()) - set(sketch.weights.entries))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in rest:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for seat in seats_of(model, sorted(rest)).values():
        empty = torch.empty_like(seat.table[seat.attribute], device=device)
        seat.seat(nn.Parameter(empty, requires_grad=False) if seat.holds_parameter else empty)
    initialize(model)
