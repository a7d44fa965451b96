"""Finds the modules of a model that are streamed, from its module tree."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rabbit_engine.architectures.registry import find_known
from rabbit_engine.errors import UnsupportedArchitectureError
from rabbit_engine.transformers_bridge.multi_token import MultiTokenModel

logger = logging.getLogger(__name__)

RESIDENT = "resident"
"""The shard of the weights outside all streamed modules."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Module names: the layers in order, the embedding and head (None if the model has none), other leaves.

    `towers` are the blocks of other stacks, which run in few passes, before the layers: of an encoder, or for images.
    """

    layers: tuple[str, ...]
    embedding: str | None
    head: str | None
    others: tuple[str, ...]
    towers: tuple[str, ...] = ()

    def shard_names(self) -> tuple[str, ...]:
        """All shards in the order of a pass; `resident` comes last."""
        first = () if self.embedding is None else (self.embedding,)
        last = () if self.head is None else (self.head,)
        return (*first, *self.towers, *self.layers, *self.others, *last, RESIDENT)

    def shard_of(self, weight: str) -> str:
        """The shard of `weight`, a name of the model's state dict."""
        owners = [name for name in self.shard_names() if weight.startswith(f"{name}.")]
        return max(owners, key=len, default=RESIDENT)


def find_layout(model: PreTrainedModel) -> Layout:
    """The layers of a registered class; for any other class, the largest list of blocks next to the embedding.

    Raises UnsupportedArchitectureError for a model without a list of layers.
    """
    embedding, head = _name_of(model, _embedding(model)), _name_of(model, _head(model))
    name, layers = known_list(model) or _search(model, embedding)
    parent = name.rpartition(".")[0]
    siblings = model.get_submodule(parent).named_children() if parent else model.named_children()
    others = [f"{parent}.{child}".lstrip(".") for child, module in siblings if _is_leaf_with_weights(module)]
    return Layout(
        layers=tuple(f"{name}.{index}" for index in range(len(layers))),
        embedding=embedding,
        head=head,
        others=tuple(other for other in others if other not in (embedding, head)),
        towers=_towers(model, name),
    )


def known_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """The list of blocks that the registry names for the model's class, or of multi-token heads; None if it is not known."""
    if isinstance(model, MultiTokenModel):
        return "layers", model.layers
    known = find_known(type(model).__name__)
    found = _list_at(model, known.layers) if known else None
    return (known.layers, found) if known and found is not None else None


def _list_at(model: nn.Module, name: str) -> nn.ModuleList | None:
    found = dict(model.named_modules()).get(name)
    return found if isinstance(found, nn.ModuleList) else None


def _towers(model: PreTrainedModel, layers: str) -> tuple[str, ...]:
    """The blocks of a registered class's towers, or in other classes of all lists of blocks but that of the layers."""
    known = find_known(type(model).__name__)
    names = known.towers if known else [name for name, _ in _lists_of_blocks(model) if name != layers]
    lists = {name: _list_at(model, name) for name in names}
    return tuple(f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks or ())))


def _search(model: PreTrainedModel, embedding: str | None) -> tuple[str, nn.ModuleList]:
    name, layers = largest_list(model, embedding)
    logger.info("%s is not in the registry; found %d layers in its module tree: %s", type(model).__name__, len(layers), name)
    return name, layers


def largest_list(model: nn.Module, embedding: str | None) -> tuple[str, nn.ModuleList]:
    """The largest list of blocks; lists in the embedding's module come first, then lists below it, then any other.

    Raises UnsupportedArchitectureError for a model without one.
    """
    home, blocks = (embedding or "").rpartition(".")[0], _lists_of_blocks(model)
    if not blocks:
        raise UnsupportedArchitectureError(f"{type(model).__name__} has no list of layers to stream")
    siblings = [item for item in blocks if item[0].rpartition(".")[0] == home]
    below = [item for item in blocks if item[0].startswith(f"{home}.")]
    return max(siblings or below or blocks, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _lists_of_blocks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of modules with parts, in the order of the module tree; those inside a block of another list are left out. A
    list of lists is one for each: a list itself never runs."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    lists = [(name, module) for name, module in lists if not any(isinstance(part, nn.ModuleList) for part in module)]
    outer = [(name, module) for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return [(name, module) for name, module in outer if all(any(True for _ in layer.children()) for layer in module)]


def _is_leaf_with_weights(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and any(True for _ in module.parameters(recurse=False))


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _head(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[no-any-return]
    except (NotImplementedError, AttributeError):
        return None


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None) if module is not None else None
