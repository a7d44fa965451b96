"""Cuts a model without weights into units: what moves together, what must stay, and what is read by row. Reads nothing.

A large weight of a module whose forward runs alone is a unit, so that the ring holds two of these instead of two layers.
The small weights of a layer stay; a layer without large ones moves whole. A head is cut by rows. Experts are units read on
demand, if their class has transformers' experts interface.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures import Layout, find_layout
from rabbit_engine.config import DEFAULT_CUT, Cut
from rabbit_engine.planning.experts import Routing
from rabbit_engine.planning.known_probes import probe_of
from rabbit_engine.planning.parts import computes_parts
from rabbit_engine.planning.probe import Probe
from rabbit_engine.planning.tiers import Role, Runs, UnitSize
from rabbit_engine.planning.weights import Weights, locate_weights
from rabbit_engine.quantization.bitsandbytes_made import PackedBlocks4bit
from rabbit_engine.quantization.linears import is_linear
from rabbit_engine.storage.tensorfiles import TensorEntry, each_row
from rabbit_engine.streaming import Unit, make_unit, multiplies_packed, row_blocks
from rabbit_engine.transformers_bridge.experts import experts_a_token, has_experts_interface


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first` to `stop` of the head, as the unit `unit`."""

    first: int
    stop: int
    unit: str


@dataclass(frozen=True, slots=True)
class Partition:
    """A model's units in the order of a pass, with their sizes and the modules they belong to.

    `blocks` are the parts of the weight `head` if it is cut; `embedding` is the weight that can be read by row. `experts` are
    the experts, in order, of each module whose experts can be read one by one; `whole_experts` maps the other classes to the
    reason why not. `linears` are the stored weights that only a plain linear layer uses. `computes_parts`: a prompt may be
    computed in parts (see `parts.computes_parts`).
    """

    layout: Layout
    weights: Weights
    probe: Probe
    units: Mapping[str, Unit]
    sizes: tuple[UnitSize, ...]
    modules: Mapping[str, str]
    head: str | None
    blocks: tuple[Block, ...]
    embedding: str | None
    experts: Mapping[str, tuple[Unit, ...]]
    whole_experts: Mapping[str, str]
    linears: frozenset[str]
    computes_parts: bool

    def packed(self, unit: Unit, fused: bool | None) -> frozenset[str]:
        """The weights of the unit that are multiplied by in their stored form; `fused` as in `StreamConfig.fused_products`."""
        owner = unit.name.rpartition("[")[0]
        if owner in self.experts:
            module: Any = self.weights.refs[self.weights.names_in(owner)[0]].module
            used_in_linear = not module.is_transposed
        else:
            used_in_linear = any(unit.name == block.unit for block in self.blocks)
        entries = [weight.entry for weight in unit.weights if used_in_linear or weight.entry.name in self.linears]
        return frozenset(entry.name for entry in entries if multiplies_packed(entry, fused))

    def stays_packed(self, fused: bool | None) -> bool:
        """Whether any weight is multiplied by in its stored form, so that decoding it at load would only cost."""
        experts = (units[0] for units in self.experts.values())
        return any(self.packed(unit, fused) for unit in (*self.units.values(), *experts))

    def only(self, has: Callable[[str], bool]) -> Partition:
        """Without the units of modules that `has` says are elsewhere: their weights are placeholders."""

        def is_here(unit: str) -> bool:
            return has(unit.partition("[")[0].partition(" ")[0])

        return replace(
            self,
            units={name: unit for name, unit in self.units.items() if is_here(name)},
            sizes=tuple(size for size in self.sizes if is_here(size.name)),
            modules={unit: module for unit, module in self.modules.items() if is_here(unit)},
            head=self.head if self.head is not None and has(self.head) else None,
            blocks=tuple(block for block in self.blocks if is_here(block.unit)),
            embedding=self.embedding if self.embedding is not None and has(self.embedding) else None,
            experts={name: units for name, units in self.experts.items() if is_here(name)},
        )

    @property
    def is_encoded(self) -> bool:
        """Whether any weight is stored encoded."""
        return any(entry.is_encoded for entry in self.weights.entries.values())

    @property
    def decoded_sizes(self) -> tuple[UnitSize, ...]:
        """The unit sizes if every unit stays and is decoded at load."""
        return tuple(decoded_size(size, self.units[size.name]) for size in self.sizes)


def partition_model(
    model: PreTrainedModel,
    entries: Mapping[str, TensorEntry],
    ties: Mapping[str, str],
    cut: Cut = DEFAULT_CUT,
    device_type: str = "cpu",
    probe: Probe | None = None,
) -> Partition:
    """Cut `model` (on the meta device) into units of its stored `entries`, to run on a device of that type. `probe` is that of
    another partition of it.

    Raises MismatchedWeightsError if the entries do not fit the model.
    """
    layout = find_layout(model)
    weights = locate_weights(model, layout, entries, ties)
    partitioner = _Partitioner(model, layout, weights, probe or probe_of(model, device_type), cut, torch.device(device_type))
    partitioner.add_blocks()
    partitioner.add_head()
    partitioner.add_others()
    return partitioner.finish()


class _Partitioner:
    """Builds a partition."""

    def __init__(
        self, model: PreTrainedModel, layout: Layout, weights: Weights, probe: Probe, cut: Cut, device: torch.device
    ) -> None:
        self._model, self._layout, self._weights, self._probe, self._cut = model, layout, weights, probe, cut
        self._device = device
        self._run_order = {name: index for index, name in enumerate(probe.alone)}
        self._users = Counter(entry.name for entry in weights.entries.values())
        self._units: dict[str, Unit] = {}
        self._sizes: list[UnitSize] = []
        self._modules: dict[str, str] = {}
        self._blocks: list[Block] = []
        self._experts: dict[str, tuple[Unit, ...]] = {}
        self._whole_experts: dict[str, str] = {}

    def _add(
        self,
        name: str,
        unit: Unit,
        *,
        streamed: bool,
        module: str | None = None,
        encloses: bool = False,
        runs: Runs = "each pass",
    ) -> None:
        role: Role = "streamed" if streamed else "resident"
        self._units[name] = unit
        scratch, work = unit.scratch_bytes, unit.work_bytes(self._device)
        size = UnitSize(name, role, unit.nbytes, unit.read_bytes, encloses, runs, scratch_bytes=scratch, work_bytes=work)
        self._sizes.append(size if streamed or not unit.is_encoded else decoded_size(size, unit))
        if module is not None:
            self._modules[name] = module

    def add_blocks(self) -> None:
        """Add every block of a tower and every layer: its large modules, and the rest."""
        for block in (*self._layout.towers, *self._layout.layers):
            names = self._weights.owned[block]
            if names:
                self._add_block(block, names)

    def _add_block(self, block: str, names: Sequence[str]) -> None:
        owners: dict[str, list[str]] = {}
        for name in names:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        experts = {owner: found for owner, found in owners.items() if self._are_experts(owner, found)}
        dense = [name for name in names if name.rpartition(".")[0] not in experts]
        leaves = self._large_leaves(block, {owner: found for owner, found in owners.items() if owner not in experts})
        inside = {name for found in leaves.values() for name in found}
        rest = self._weights.unit(block, [name for name in dense if name not in inside])
        total = sum(self._weights.entries[name].nbytes for name in dense)
        when = self._runs(block, block)
        if rest.weights:
            stays = bool(leaves) and rest.weight_bytes <= total * self._cut.rest_share
            self._add(block, rest, streamed=not stays, module=block, encloses=bool(leaves), runs=when)
        for leaf, found in leaves.items():
            self._add(leaf, self._weights.unit(leaf, found), streamed=True, module=leaf, runs=self._runs(leaf, block))
        for owner, found in experts.items():
            self._add_experts(owner, found)

    def _runs(self, module: str, block: str) -> Runs:
        """When a block or a module in it runs, as the probe saw: what computes keys and values of an encoder's states runs once
        in a decoder too. A tower that it did not see runs for images."""
        seen = {leaf for leaf in (*self._probe.alone, *self._probe.outside) if f"{leaf}.".startswith(f"{module}.")}
        if seen:
            return "once a text" if seen <= self._probe.prompt_only else "each pass"
        is_encoder = bool(self._probe.failure) and self._model.config.is_encoder_decoder
        return "each pass" if block in self._layout.layers else "once a text" if is_encoder else "for images"

    def _large_leaves(self, layer: str, owners: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """The layer's large modules that run alone and share nothing, in the order they run: module -> its weights."""
        large = [leaf for leaf, found in owners.items() if leaf != layer and self._is_unit(leaf, found)]
        return {leaf: owners[leaf] for leaf in sorted(large, key=self._run_order.__getitem__)}

    def _are_experts(self, owner: str, names: Sequence[str]) -> bool:
        """Whether the weights `names` of module `owner` are stacked experts that can be read one by one."""
        module: Any = self._model.get_submodule(owner)
        has_interface = has_experts_interface(module)
        if not has_interface and "Expert" not in type(module).__name__:
            return False
        problem = (
            self._not_by_expert(owner, module, names) if has_interface else "transformers has no experts interface for this class"
        )
        if problem:
            self._whole_experts[type(module).__name__] = problem
        return problem is None

    def _not_by_expert(self, owner: str, module: Any, names: Sequence[str]) -> str | None:
        """Why the experts of a module with the interface cannot be read one by one, or None."""
        entries = [self._weights.entries[name] for name in names]
        if not self._cut.by_expert:
            return "as asked"
        if owner in self._probe.outside:
            return "its weights are used outside it"
        if any(entry.shape[:1] != (module.num_experts,) or self._users[entry.name] > 1 for entry in entries):
            return "its weights are not stacked experts, or are shared"
        return None

    def _add_experts(self, owner: str, names: Sequence[str]) -> None:
        """Add each expert of a module as a unit, and the module as one unit for when everything stays."""
        module: Any = self._model.get_submodule(owner)
        whole = self._weights.unit(owner, names)
        rows = zip(*(each_row(self._weights.entries[name]) for name in names), strict=True)
        experts = tuple(make_unit(f"{owner}[{index}]", entries) for index, entries in enumerate(rows))
        largest, most_read = max(unit.nbytes for unit in experts), max(unit.read_bytes for unit in experts)
        used = min(self._probe.routed.get(owner) or experts_a_token(module), module.num_experts)
        routing = Routing(module.num_experts, used, largest, most_read)
        self._units[owner], self._experts[owner] = whole, experts
        scratch = max(unit.scratch_bytes for unit in experts)
        work = max(unit.work_bytes(self._device) for unit in (whole, *experts))  # all of them together if they stay
        size = UnitSize(owner, "experts", whole.nbytes, whole.read_bytes, routing=routing, scratch_bytes=scratch, work_bytes=work)
        self._sizes.append(size)

    def _is_unit(self, leaf: str, names: Sequence[str]) -> bool:
        entries = [self._weights.entries[name] for name in names]
        return (
            leaf in self._run_order
            and not self._parent_has_weights(leaf)
            and sum(entry.nbytes for entry in entries) >= self._cut.least_bytes
            and all(self._users[entry.name] == 1 for entry in entries)
        )

    def _parent_has_weights(self, leaf: str) -> bool:
        """Whether the parent module has weights itself: on a GPU such a module (a state space, a linear attention) may pass
        its children's weights to one fused kernel, which a pass on the meta device does not show."""
        above = self._model.get_submodule(leaf.rpartition(".")[0])
        return any(True for _ in above.parameters(recurse=False))

    def add_head(self) -> None:
        """Add the head; a plain matrix is cut by rows into blocks no larger than the largest unit of a layer."""
        head = self._layout.head
        names = self._weights.owned[head] if head else []
        if head is None or not names:
            return
        weight, rest = f"{head}.weight", [name for name in names if name != f"{head}.weight"]
        largest = max((size.nbytes for size in self._sizes if size.role == "streamed"), default=self._cut.most_bytes)
        most = min(self._cut.most_bytes, max(largest, self._cut.least_bytes))
        plain = type(self._model.get_submodule(head)).forward is nn.Linear.forward and weight in names
        can_stream = not self._is_shared(names) or self._is_the_embedding(names)
        blocks = row_blocks(self._weights.entries[weight], most) if plain and can_stream else []
        if len(blocks) < 2:
            self._add(head, self._weights.unit(head, names), streamed=can_stream, module=head)
            return
        for first, stop, entry in blocks:
            name = f"{head}[{first}:{stop}]"
            self._add(name, make_unit(name, [entry]), streamed=True)
            self._blocks.append(Block(first, stop, name))
        if rest:
            self._add(f"{head} (rest)", self._weights.unit(head, rest), streamed=False)

    def _is_shared(self, names: Sequence[str]) -> bool:
        """Whether another module uses one of the weights: it would find it gone, unless it reads rows from disk."""
        return any(self._users[self._weights.entries[name].name] > 1 for name in names)

    def _is_the_embedding(self, names: Sequence[str]) -> bool:
        """Whether one of the weights is that of the embedding that reads rows; a decoder may have another."""
        embedding = self._embedding()
        return embedding is not None and self._weights.entries[embedding].name in self._weights.stored(names)

    def add_others(self) -> None:
        """Add what belongs neither to a layer nor to the head: the embedding by row, everything else resident."""
        head = self._weights.stored(self._weights.owned[self._layout.head]) if self._layout.head else {}
        for module, names in self._weights.owned.items():
            if not names or module in (*self._layout.towers, *self._layout.layers, self._layout.head):
                continue
            own = [name for name in names if self._weights.entries[name].name not in head]
            unit = self._weights.unit(module, own)
            if module == self._layout.embedding and (embedding := self._embedding()) is not None:
                self._units[module] = unit
                by_row = UnitSize(
                    module, "embedding", unit.nbytes, unit.read_bytes, only_by_row=self._weights.entries[embedding].is_encoded
                )
                self._sizes.insert(0, by_row)
            else:
                self._add(module, unit, streamed=False)

    def _embedding(self) -> str | None:
        """The weight of a plain embedding, whose rows can be read separately."""
        module = self._layout.embedding
        if module is None or not isinstance(self._model.get_submodule(module), nn.Embedding):
            return None
        names = self._weights.owned[module]
        return names[0] if len(names) == 1 and self._weights.entries[names[0]].rows_together == 1 else None

    def _linears(self) -> frozenset[str]:
        """The stored weights that only a plain linear layer uses. A tied head is one too: the embedding is read by row."""
        found = (name for name in self._weights.entries if name.rpartition(".")[2] == "weight" and self._is_linear(name))
        return frozenset(self._weights.entries[name].name for name in found)

    def _is_linear(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        if not is_linear(self._model.get_submodule(module)):
            return False
        if module == self._layout.head:  # it may share a parameter with the embedding, which reads its rows from disk
            return True
        entry = self._weights.entries[name]
        alone = module in self._run_order and not self._parent_has_weights(module)
        alone = alone or isinstance(entry.encoding, PackedBlocks4bit)  # nothing else can use a weight that bitsandbytes packed
        return alone and self._users[entry.name] == 1

    def finish(self) -> Partition:
        """The finished partition."""
        head = f"{self._layout.head}.weight" if self._blocks else None
        return Partition(
            self._layout,
            self._weights,
            self._probe,
            self._units,
            tuple(self._sizes),
            self._modules,
            head,
            tuple(self._blocks),
            self._embedding(),
            self._experts,
            self._whole_experts,
            self._linears(),
            computes_parts(self._model),
        )


def decoded_size(size: UnitSize, unit: Unit) -> UnitSize:
    """The size of a unit that stays and is decoded at load: the memory of its decoded weights, and scratch for the stored
    ones."""
    if not unit.is_encoded or size.only_by_row:
        return size
    return replace(size, nbytes=unit.decoded_bytes, scratch_bytes=unit.nbytes, decoded=True)
