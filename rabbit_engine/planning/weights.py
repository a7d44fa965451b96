"""Where the weights of a model without weights are stored: in files, or, for a model without files, where they would be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from rabbit_engine.architectures import Layout
from rabbit_engine.checkpoints import as_computed, encodings_of, require_fit, shape_to_encode
from rabbit_engine.config import CompressionConfig
from rabbit_engine.quantization.stored import unread_entry
from rabbit_engine.storage.directio import aligned_up
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import Unit, WeightRef, make_unit, weight_refs
from rabbit_engine.transformers_bridge.tied_weights import tied_weights, untie


@dataclass(frozen=True, slots=True)
class Weights:
    """Each weight of the model: where it is stored (`entries`, ties resolved), where it belongs, and its module."""

    entries: Mapping[str, TensorEntry]
    refs: Mapping[str, WeightRef]
    owned: Mapping[str, Sequence[str]]

    def stored(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """The entries behind `names`, each once."""
        return {self.entries[name].name: self.entries[name] for name in names}

    def names_in(self, module: str) -> list[str]:
        """The module's own weights."""
        return [name for name in self.entries if name.rpartition(".")[0] == module]

    def unit(self, unit_name: str, names: Iterable[str]) -> Unit:
        """The unit of the weights `names`."""
        return make_unit(unit_name, list(self.stored(names).values()))

    def refs_to(self, entry_name: str, module: str = "") -> list[WeightRef]:
        """All places in `module` that an entry fills: more than one where weights are tied."""
        inside = f"{module}." if module else ""
        return [self.refs[name] for name, entry in self.entries.items() if entry.name == entry_name and name.startswith(inside)]


def locate_weights(
    model: PreTrainedModel, layout: Layout, entries: Mapping[str, TensorEntry], ties: Mapping[str, str]
) -> Weights:
    """Find each weight of `model` among its stored `entries`. Ties of weights that are stored with different values are cut.

    Raises MismatchedWeightsError if the entries do not fit the model.
    """
    require_fit(model, entries, ties)
    state = model.state_dict()
    found = {name: entries[ties.get(name, name)] for name in state if ties.get(name, name) in entries}
    for target, source in tied_weights(model).items():
        if ties.get(target) != source and ties.get(source) != target:
            untie(model, target)  # stored with different values, so not tied, as in transformers
    owned: dict[str, list[str]] = {module: [] for module in layout.shard_names()}
    for name in found:
        owned[layout.shard_of(name)].append(name)
    return Weights(found, weight_refs(model, list(found)), owned)


def unread_entries(
    model: PreTrainedModel, compression: CompressionConfig | None = None
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and ties of a model without files, from its shapes and dtypes; those of a compressed split with `compression`."""
    state = model.state_dict()
    encodings = {} if compression is None else encodings_of(model, lambda name: state[name].dtype, compression)
    ties = {target: source for target, source in tied_weights(model).items() if target not in encodings}
    entries, offset = {}, 0
    for name, tensor in state.items():
        if name not in ties:
            shape = shape_to_encode(model, name) if name in encodings else tuple(tensor.shape)
            entries[name] = unread_entry(name, offset, tensor.dtype, shape, encodings.get(name))
            offset = aligned_up(offset + entries[name].nbytes)
    return entries if compression is None else as_computed(model, entries, compression), ties
