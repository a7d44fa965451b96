"""A weight that is not loaded: true shape, dtype and device, no storage; any computation on it raises its name.

Never a meta tensor: on a CPU `torch.nn.functional.linear` accepts a meta weight and returns uninitialised memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch.utils._pytree import tree_leaves

from rabbit_engine.errors import CannotMergeError, CannotPickleError, DamagedShardError, WeightNotLoadedError
from rabbit_engine.storage.directio import damage_as
from rabbit_engine.storage.tensorfiles import TensorEntry, holds

_WHERE = (
    "a streamed weight is loaded only while its module runs; to read the weight itself, open its shard with safetensors. "
    "An adapter that reads the weights it adapts (DoRA, PiSSA, OLoRA, trainable_token_indices, modules_to_save, "
    "layer_replication) needs a max_memory that holds the whole model"
)
_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}  # what nn.Parameter itself calls


class Placeholder(torch.Tensor):
    """Replaces the weight that `entry` describes while it is not loaded."""

    entry: TensorEntry
    advice = (
        "a streamed weight is read again in every pass. "
        "Merge or edit with transformers.AutoModelForCausalLM and save the result; an adapter also runs unmerged"
    )

    @staticmethod
    def __new__(cls, entry: TensorEntry, device: torch.device, *_: object) -> Self:
        """Allocates no storage, by torch's own means, `torch.Tensor._make_wrapper_subclass`."""
        self = torch.Tensor._make_wrapper_subclass(cls, entry.shape, dtype=entry.dtype, device=device)
        self.entry = entry
        return self

    def __init__(self, *_: object) -> None:
        super().__init__()

    @property
    def weight_name(self) -> str:
        """The weight's name in the checkpoint."""
        return self.entry.name

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.weight_name}: {list(self.shape)} {self.dtype} on {self.device}, not loaded)"

    def __reduce_ex__(self, protocol: object) -> Any:
        raise CannotPickleError(f"{self.weight_name} is not loaded and cannot be pickled: copy its shard instead")

    def data_ptr(self) -> int:
        """Raises WeightNotLoadedError."""
        raise WeightNotLoadedError(f"{self.weight_name} is not loaded and has no memory: {_WHERE}")

    def untyped_storage(self) -> Any:
        """Raises WeightNotLoadedError."""
        self.data_ptr()

    def another(self) -> Self:
        """Another placeholder for the same weight."""
        return type(self)(self.entry, self.device)

    @damage_as(DamagedShardError)
    def holds(self, values: torch.Tensor) -> bool:
        """Whether the stored weight has these values. Raises DamagedShardError."""
        return holds(self.entry, values)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raise WeightNotLoadedError, or CannotMergeError for a write, except for what nn.Parameter needs, and for a write of
        the stored values: PEFT saves the base of an adapted head with the adapter."""
        if func in _ALIASES:
            return args[0].another()
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Placeholder) and args[0].holds(args[1]):
            return args[0]
        names = sorted({leaf.weight_name for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Placeholder)})
        operation = func.__name__ if hasattr(func, "__name__") else str(func)
        if func._schema.is_mutable and isinstance(args[0], Placeholder):
            raise CannotMergeError(f"{', '.join(names)} cannot be changed ({operation}): {args[0].advice}")
        raise WeightNotLoadedError(f"{', '.join(names)} used while not loaded ({operation}): {_WHERE}")


class ExpertsPlaceholder(Placeholder):
    """Replaces a stack of experts that are read one by one."""

    advice = (
        "its experts are read one by one. An adapter of the experts' own weights needs all of them in memory: "
        "give max_memory room for the whole model, or use one that adapts other modules"
    )


class Placeholders:
    """One placeholder per stored weight, wherever it is used: a tied weight counts once, and tying it again changes nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[str, torch.Tensor] = {}

    def add(self, weight: Placeholder) -> torch.Tensor:
        """Use the parameter of `weight` as the placeholder of the stored weight with that name."""
        return self._made.setdefault(weight.entry.name, torch.nn.Parameter(weight, requires_grad=False))

    def of(self, entry: TensorEntry, is_parameter: bool, kind: type[Placeholder] = Placeholder) -> torch.Tensor:
        """The placeholder of the weight that `entry` describes."""
        if entry.name not in self._made:
            weight = kind(entry, self._device)
            self._made[entry.name] = torch.nn.Parameter(weight, requires_grad=False) if is_parameter else weight
        return self._made[entry.name]
