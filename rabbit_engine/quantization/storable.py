"""The interface of encodings that this library stores weights in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch

from rabbit_engine.storage.encoding import Encoding
from rabbit_engine.storage.tensorfiles import TensorEntry


class Component(NamedTuple):
    """The dtype and shape of one component of a weight; with `varies`, the last length depends on the weight's values and the
    one given is an estimate."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    varies: bool = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self, entry: TensorEntry) -> bool:
        """Whether a stored tensor can be this component."""
        same = entry.shape[:-1] == self.shape[:-1] and len(entry.shape) == len(self.shape) if self.varies else False
        return entry.dtype == self.dtype and (same or entry.shape == self.shape)


class Storable(Encoding, Protocol):
    """An encoding that shards can hold. `roles` name its components, in the order in which `decode` takes them."""

    form: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]

    def parameters(self) -> Mapping[str, int | str]:
        """What tells it from other encodings of its kind."""

    def components(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Sequence[Component]:
        """The components of a weight of that `dtype` and `shape`, in the order of `roles`.

        Raises ValueError if such a weight cannot be encoded.
        """

    def compress(self, weight: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """The components of `weight`, in the order of `roles`; None if it is better stored as it is.

        Raises ValueError for values that cannot be encoded.
        """
