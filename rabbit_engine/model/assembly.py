"""Assembles a model without weights and the entries of its files: reads what is resident, and sets the rest streaming."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import initialize
from rabbit_engine.config import CacheDtype, StreamConfig
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.expert_uses import ExpertUses, uses_of
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.partition import Partition, partition_model
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.stages import StagesPlan
from rabbit_engine.planning.tiers import DISK, HOST, ScratchUse, scratch_shares
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import (
    Binding,
    Borrow,
    BoundUnit,
    EmbeddingRows,
    ExpertCache,
    ExpertLayer,
    ExpertSlots,
    ExpertsPlaceholder,
    HostPlace,
    LinearBlocks,
    OpenStage,
    Placeholders,
    Profile,
    RemoteLayers,
    ResidentUnit,
    Ring,
    RoutedExperts,
    RowBlock,
    Scratch,
    TiedRows,
    Trace,
    Transfer,
    Unit,
    UnitWeights,
    claim_ring,
    fill_all,
    guard,
    join_rows,
    make_unit,
    route,
    weight_refs,
)
from rabbit_engine.transformers_bridge.building import mark_loaded
from rabbit_engine.utils.heap import give_large_blocks_back
from rabbit_engine.utils.platform import free_memory_bytes

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Assembly:
    """The running parts of a streamed model."""

    plan: Plan
    partition: Partition
    device: torch.device
    transfer: Transfer
    binding: Binding
    trace: Trace
    ring: Ring
    uses: ExpertUses | None = None
    cache_dtype: CacheDtype | None = None
    stages: Sequence[OpenStage] = ()
    """Those that have layers of the model elsewhere."""
    remote_layers: Sequence[RemoteLayers] = ()
    """What calls them, for each."""
    stages_plan: StagesPlan | None = None

    def free_bytes(self) -> int:
        """Bytes for caches and activations: free memory, minus the part of the ring that was allocated but never written. With
        stages elsewhere, those of the device or the machine that has the least."""
        untouched = {self.device: self.ring.untouched_bytes}
        for device, ring in self._rings():
            untouched[device] = untouched.get(device, 0) + ring.untouched_bytes
        here = [free_memory_bytes(device) - nbytes for device, nbytes in untouched.items()]
        return max(0, min([*here, *(stage.free_bytes() for stage in self.stages_elsewhere)]))

    @property
    def stages_elsewhere(self) -> list[OpenStage]:
        """The stages that are not in this process."""
        return [stage for stage in self.stages if not isinstance(getattr(stage, "assembly", None), Assembly)]

    def _rings(self) -> Iterator[tuple[torch.device, Ring]]:
        """Those of stages in this process."""
        for stage in self.stages:
            assembly = getattr(stage, "assembly", None)
            if isinstance(assembly, Assembly):
                yield assembly.device, assembly.ring

    def profile(self) -> Profile:
        """The counts of the transfer, with those of stages in this process."""
        assemblies = (getattr(stage, "assembly", None) for stage in self.stages)
        beside = [found.profile() for found in assemblies if isinstance(found, Assembly)]
        own = self.transfer.profile()
        return own.joined(beside) if beside else own

    def close(self) -> None:
        """Stop reading, and free the ring with everything in it. Returns at once in a forked child."""
        if self.transfer.forked:
            return
        if self.uses is not None:
            self.uses.save()
        for stage in self.stages:
            stage.close()
        self.transfer.close()
        self.binding.forget()
        weights, placeholders = self.partition.weights, Placeholders(self.device)
        for name, ref in weights.refs.items():
            ref.set(placeholders.of(weights.entries[name], ref.holds_parameter))


def assemble(
    model: PreTrainedModel,
    entries: Mapping[str, TensorEntry],
    ties: Mapping[str, str],
    stream: StreamConfig,
    *,
    decide: Callable[[Partition, StreamConfig], Plan] = plan_for,
    claim: Callable[[torch.device, int, Trace], Ring] = claim_ring,
    part: Callable[[Partition], Partition] = lambda whole: whole,
) -> Assembly:
    """Fill the skeleton `model`: residents on the device, the embedding by row, everything else streamed.

    `decide` makes the plan, `claim` the ring of the device: a simulated device provides its own. `part` takes out what runs
    elsewhere.
    Raises BudgetError, and ConfigurationError for tiers that cannot keep weights yet, before memory is allocated;
    MismatchedWeightsError if the files do not fit the model.
    """
    give_large_blocks_back()
    partition = part(partition_model(model, entries, ties, stream.cut, stream.device.type))
    plan = decide(partition, stream)
    _require_tiers(plan)
    trace = Trace(on=stream.profiling_mode, device=stream.device)
    builder = _Builder(model, partition, plan, stream, trace, claim(stream.device, plan.device_bytes, trace))
    try:
        builder.set_residents()
        _initialize_rest(model, partition, stream.device)
        return builder.set_streaming()
    except BaseException:
        builder.close()
        raise


def _require_tiers(plan: Plan) -> None:
    unknown = [tier.name for tier in plan.tiers[1:] if tier.name not in (HOST, DISK)]
    if unknown:
        raise ConfigurationError(
            f"weights cannot be kept on {', '.join(unknown)} yet: plan for {plan.device}, host memory and the disk"
        )


class _Builder:
    """Assembles one model; `close` undoes what was allocated so far."""

    def __init__(
        self, model: PreTrainedModel, partition: Partition, plan: Plan, stream: StreamConfig, trace: Trace, ring: Ring
    ) -> None:
        self._model, self._partition, self._plan, self._stream, self._trace = model, partition, plan, stream, trace
        self._ring = ring
        decoded = {size.name for size in plan.units if size.decoded}
        self._residents = _one_behind_another(_resident_units(partition, plan), decoded)
        self._decoded = decoded
        self._placeholders = Placeholders(stream.device)
        self._transfer: Transfer | None = None
        self._scratch = _claim_scratch(ring, plan)
        self._uses = {size.name: size.scratch_use for size in plan.units}
        self._decoded_blocks: dict[str, torch.Tensor] = {}
        """The blocks of a cut head that were decoded at load, by their units."""

    def close(self) -> None:
        """Close the transfer, or free the ring if there is none yet."""
        if self._transfer is not None:
            self._transfer.close()
        else:
            self._ring.close()

    def set_residents(self) -> None:
        """Read what stays to the beginning of the ring's memory, and set it wherever it is shared."""
        fill_all(self._ring, [(unit, start) for unit, start in self._residents if unit.name not in self._decoded])
        block_units = {block.unit for block in self._partition.blocks}
        for unit, start in self._residents:
            if unit.name in self._decoded:
                self._decode_resident(unit, start)
            elif unit.name not in block_units:
                memory = self._ring.view(start, unit.nbytes)
                for weight in unit.weights:
                    if not weight.entry.is_encoded:
                        self._set_everywhere(weight.entry.name, weight.view(memory))

    def _decode_resident(self, unit: Unit, start: int) -> None:
        """Read the stored unit into the scratch, and write its decoded weights to their place."""
        scratch = self._plan.scratch_start
        fill_all(self._ring, [(unit, scratch)])
        stored = self._ring.view(scratch, unit.nbytes)
        tensors = unit.decode(stored, self._ring.view(start, unit.decoded_bytes))
        self._ring.finish(self._ring.last_use())  # the next unit is read to the same scratch; any stream may use these
        if any(block.unit == unit.name for block in self._partition.blocks):
            self._decoded_blocks[unit.name] = tensors[0]
            return
        for weight, tensor in zip(unit.weights, tensors, strict=True):
            self._set_everywhere(weight.entry.name, tensor)

    def _set_everywhere(self, entry_name: str, tensor: torch.Tensor) -> None:
        refs_to = self._partition.weights.refs_to(entry_name)
        shared = nn.Parameter(tensor, requires_grad=False) if refs_to[0].holds_parameter else tensor
        mark_loaded(shared)
        for ref in refs_to:
            ref.set(shared)

    def set_streaming(self) -> Assembly:
        """Allocate host memory, start the transfer, and bind every streamed unit to its module."""
        partition, device = self._partition, self._stream.device
        join_rows(self._model)  # before units are bound: inside their forwards
        moving = [partition.units[name] for name in partition.units if name in {*self._plan.streamed, *self._plan.host}]
        transfer = self._transfer = Transfer(
            moving,
            self._ring,
            self._plan.ring_bytes,
            start=self._plan.ring_start,
            host=self._fill_host(),
            rare={size.name for size in partition.sizes if size.rare},
            slots=self._claim_slots(),
            prefetching=self._stream.prefetching,
            rates=(self._plan.speeds.disk, self._plan.speeds.link),
            trace=self._trace,
        )
        layers, show_progress = partition.layout.layers, self._stream.show_layer_progress
        scratches = tuple(self._scratch.values())
        binding = Binding(transfer, device, self._trace, scratches=scratches, layers=layers, show_progress=show_progress)
        self._set_head(binding)
        self._set_embedding()
        for unit in moving:
            self._bind(binding, unit)
        for unit, start in self._residents:
            if unit.is_encoded and unit.name not in self._decoded:
                self._bind(binding, unit, self._ring.view(start, unit.nbytes))
        uses = None
        if transfer.experts is not None:
            self._route_experts(transfer.experts, binding)
            uses = uses_of(partition, transfer.experts)
            uses.start()
        self._set_tied_elsewhere()
        for part in self._model.modules():
            if isinstance(part, PreTrainedModel):
                guard(part, binding.root_pass, device)
        return Assembly(self._plan, partition, device, transfer, binding, self._trace, self._ring, uses, self._stream.cache_dtype)

    def _bind(self, binding: Binding, unit: Unit, memory: torch.Tensor | None = None) -> None:
        """Give the unit's module its weights when it runs: as they arrive, or from `memory` if they stay there."""
        weights, name = self._partition.weights, self._partition.modules.get(unit.name)
        if name is None:
            return
        refs = {weight.entry.name: weights.refs_to(weight.entry.name, name) for weight in unit.weights}
        own = self._weights_of(unit)
        if memory is None:
            bound = BoundUnit(unit, refs, self._placeholders, own)
        else:
            bound = ResidentUnit(unit, refs, self._placeholders, own, memory)
        binding.bind(self._model.get_submodule(name), bound)

    def _weights_of(self, unit: Unit, use: ScratchUse | None = None) -> UnitWeights:
        """The unit's weights, packed or decoded in the scratch for `use`, by default the unit's own."""
        if not unit.is_encoded:
            return UnitWeights(unit)
        packed = self._partition.packed(unit, self._stream.fused_products)
        return UnitWeights(unit, self._scratch[use or self._uses[unit.name]], packed)

    def _set_tied_elsewhere(self) -> None:
        """Set a weight that another module streams in the modules that share it."""
        for name, ref in self._partition.weights.refs.items():
            if ref.holds_parameter and ref.table[ref.attribute].device.type == "meta":
                ref.set(self._placeholders.of(self._partition.weights.entries[name], True))

    def _claim_slots(self) -> ExpertSlots | None:
        """The slots for experts that are read on demand, on the device and in host memory. They come before the ring, which may
        have any size: reads cover whole pages."""
        plan, host = self._plan.experts, None
        if not plan.layers:
            return None
        if plan.host_bytes:
            host = claim_ring(torch.device("cpu"), plan.host_bytes, self._trace)
            self._ring.pin(host.view(0, plan.host_bytes))
        layers = [
            ExpertLayer(layer.name, self._partition.experts[layer.name], layer.routing.used, layer.on_device, layer.in_host)
            for layer in plan.layers
        ]
        count, start = plan.device_bytes // plan.slot_bytes, self._plan.slots_start
        return ExpertSlots(layers=layers, count=count, nbytes=plan.slot_bytes, start=start, host=host)

    def _route_experts(self, cache: ExpertCache, binding: Binding) -> None:
        weights = self._partition.weights
        for layer in self._plan.experts.layers:
            for name in weights.names_in(layer.name):
                ref = weights.refs[name]
                ref.set(self._placeholders.of(weights.entries[name], ref.holds_parameter, ExpertsPlaceholder))
            units = self._partition.experts[layer.name]
            experts = RoutedExperts(layer.name, units, cache, binding, [self._weights_of(unit, "expert") for unit in units])
            route(self._model.get_submodule(layer.name), experts)

    def _fill_host(self) -> dict[str, HostPlace]:
        """Read what stays in host memory, and pin it for the device."""
        units = [self._partition.units[name] for name in self._plan.host]
        if not units:
            return {}
        nbytes = sum(unit.nbytes for unit in units)
        ring = claim_ring(torch.device("cpu"), nbytes, self._trace)
        starts = _one_behind_another(units)
        fill_all(ring, starts)
        self._ring.pin(ring.view(0, nbytes))
        return {unit.name: HostPlace(ring, start, filled=True) for unit, start in starts}

    def _set_head(self, binding: Binding) -> None:
        """Set a cut head: its resident blocks are views, the others are borrowed as they arrive."""
        partition, device = self._partition, self._stream.device
        starts = {unit.name: start for unit, start in self._residents}
        if partition.head is None or partition.head in starts:
            return
        blocks = []
        for block in partition.blocks:
            unit = partition.units[block.unit]
            if unit.name in self._decoded_blocks:
                borrow: Borrow = partial(_provided, self._decoded_blocks[unit.name])
            elif unit.name in starts:
                borrow = partial(_resident, self._weights_of(unit), self._ring.view(starts[unit.name], unit.nbytes))
            else:
                borrow = partial(binding.borrow, unit, self._weights_of(unit))
            blocks.append(RowBlock(block.first, block.stop, borrow))
        entry, embedding = partition.weights.entries[partition.head], partition.embedding
        tied = embedding is not None and partition.weights.entries[embedding].name == entry.name
        weight = (TiedRows if tied else LinearBlocks)(entry, device, blocks)
        partition.weights.refs[partition.head].set(self._placeholders.add(weight))

    def _set_embedding(self) -> None:
        """Set the embedding by row, unless it stays, or shares its memory with a head that does."""
        partition = self._partition
        if partition.embedding is None or partition.layout.embedding not in self._plan.by_row:
            return
        entry, ref = partition.weights.entries[partition.embedding], partition.weights.refs[partition.embedding]
        if isinstance(ref.table[ref.attribute], nn.Parameter) and ref.table[ref.attribute].device.type != "meta":
            return
        ref.set(self._placeholders.add(EmbeddingRows(entry, self._stream.device)))


@contextmanager
def _provided(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield tensor


@contextmanager
def _resident(weights: UnitWeights, memory: torch.Tensor) -> Iterator[torch.Tensor]:
    """The single weight of a unit that stays in `memory`."""
    with weights.using(memory):
        yield weights.views(memory)[0]


def _resident_units(partition: Partition, plan: Plan) -> list[Unit]:
    """The units that stay. A plain head whose blocks all stay is not cut: its module runs as it is."""
    found = [partition.units[name] for name in plan.resident]
    blocks = {block.unit for block in partition.blocks}
    if partition.head is None or not blocks <= set(plan.resident) or partition.weights.entries[partition.head].is_encoded:
        return found
    whole = make_unit(partition.head, [partition.weights.entries[partition.head]])
    return [unit for unit in found if unit.name not in blocks] + [whole]


def _one_behind_another(units: Sequence[Unit], decoded: Collection[str] = ()) -> list[tuple[Unit, int]]:
    """Each unit with its start when they are laid out consecutively, some of them decoded."""
    starts, position = [], 0
    for unit in units:
        starts.append((unit, position))
        position += unit.decoded_bytes if unit.name in decoded else unit.nbytes
    return starts


def _claim_scratch(ring: Ring, plan: Plan) -> dict[str, Scratch]:
    """Scratch by its use: after residents and slots, before the ring."""
    base, found = plan.scratch_start, dict[str, Scratch]()
    for use, nbytes in scratch_shares(plan.units).items():
        found[use] = Scratch(ring.view(base, nbytes), ring)
        base += nbytes
    return found


def _initialize_rest(model: PreTrainedModel, partition: Partition, device: torch.device) -> None:
    """Initialise what no checkpoint holds, like transformers: non-persistent buffers, weights that may be missing."""
    rest = {name for name, _ in model.named_non_persistent_buffers()} | (set(model.state_dict()) - set(partition.weights.entries))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in rest:
            mark_loaded(tensor)
    for ref in weight_refs(model, sorted(rest)).values():
        empty = torch.empty_like(ref.table[ref.attribute], device=device)
        ref.set(nn.Parameter(empty, requires_grad=False) if ref.holds_parameter else empty)
    initialize(model)
