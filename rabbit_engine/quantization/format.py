"""Formats that store a quantised weight as several tensors next to each other, named after the weight's module.

transformers has no operation that undoes them one weight at a time: `checkpoints/packed.py` joins the tensors by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rabbit_engine.storage.tensorfiles import TensorEntry, read_tensor

UNUSED = "unused"
"""The role of tensors that decoding does not need."""


ShapeOf = Callable[[str], tuple[int, ...] | None]
"""The shape of the model's weight that has this name in the checkpoint; None for a part of a stack, and for other names."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The `tensors` that are stored for the weight `name`, by their roles; it is decoded to `dtype`."""

    name: str
    dtype: torch.dtype
    tensors: Mapping[str, TensorEntry]
    shape_of: ShapeOf


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """One format: what each tensor of a module is to its weight, and the entry that they make.

    `roles` maps ends of names, behind the module's, to roles. `make` returns the entry of an encoded or plain weight, or the
    reason why the tensors are not one; it may read small tensors.
    """

    method: str
    roles: Mapping[str, str]
    make: Callable[[StoredWeight], TensorEntry | str]

    def place_of(self, key: str) -> tuple[str, str] | None:
        """The module and the role of the stored tensor `key`; None for a tensor of another kind."""
        dots = [index for index, letter in enumerate(key) if letter == "."]
        return next(((key[:dot], self.roles[key[dot + 1 :]]) for dot in dots if key[dot + 1 :] in self.roles), None)


def read_small(entry: TensorEntry) -> torch.Tensor | None:
    """The tensor; None if its file is not on this machine, as for a plan of a repository that was not downloaded."""
    return read_tensor(entry) if entry.path.is_file() else None
