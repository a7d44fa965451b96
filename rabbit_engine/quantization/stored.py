"""How this library stores weights encoded: forms of encodings by name, what each consists of, and how it is made.

In a shard, the components of a weight are tensors named `<weight>.<role>`, and the file's metadata describes the weight.
To add a form: a class with the interface of `Storable`, in a file of its own, and a row in `_FORMS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rabbit_engine.quantization.bitsandbytes_made import MadeBlocks4bit, MadeInt8Rows, PackedBlocks4bit
from rabbit_engine.quantization.eight_bit import EightBitRows
from rabbit_engine.quantization.four_bit import FourBitGroups
from rabbit_engine.quantization.lossless import Lossless
from rabbit_engine.quantization.storable import Component, Storable
from rabbit_engine.storage.directio import aligned_up
from rabbit_engine.storage.jsonvalues import Fields, counts, shown
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, TORCH_DTYPES, TensorEntry, encoded

_NOWHERE = Path("/")

_FORMS: Mapping[str, Callable[[Fields], Storable]] = {
    EightBitRows.form: lambda _: EightBitRows(),
    FourBitGroups.form: FourBitGroups.of,
    MadeBlocks4bit.form: MadeBlocks4bit.of,
    PackedBlocks4bit.form: PackedBlocks4bit.of,
    MadeInt8Rows.form: lambda _: MadeInt8Rows(),
    Lossless.form: lambda _: Lossless(),
}
"""form -> the encoding with the parameters that a shard's metadata holds; it raises ValueError for unknown ones."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A weight in memory in the form in which it is stored; `dtype` and `shape` are those of the decoded weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: Storable
    components: tuple[torch.Tensor, ...]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors to store for the weight `name`."""
        roles = self.encoding.roles
        return {component_name(name, role): tensor for role, tensor in zip(roles, self.components, strict=True)}

    def description(self) -> dict[str, Any]:
        """What `restored` needs besides the tensors, as JSON."""
        return {
            "form": self.encoding.form,
            "dtype": DTYPE_NAMES[self.dtype],
            "shape": list(self.shape),
            "parameters": dict(self.encoding.parameters()),
        }


def compressed(weight: torch.Tensor, encoding: Storable) -> Compressed | torch.Tensor:
    """`weight` in that encoding, or as it is if that is better. Raises ValueError if it cannot be encoded."""
    components = encoding.compress(weight)
    return weight if components is None else Compressed(weight.dtype, tuple(weight.shape), encoding, tuple(components))


def component_name(weight: str, role: str) -> str:
    """The name of the tensor that holds one component of a weight."""
    return f"{weight}.{role}"


def unread_entry(name: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...], encoding: Storable | None) -> TensorEntry:
    """The entry of a weight of a file that does not exist, encoded unless `encoding` is None."""
    if encoding is None:
        return TensorEntry(name, _NOWHERE, offset, math.prod(shape) * dtype.itemsize, dtype, shape)
    components = []
    for role, part in zip(encoding.roles, encoding.components(dtype, shape), strict=True):
        components.append(unread_entry(component_name(name, role), aligned_up(offset), part.dtype, part.shape, None))
        offset = components[-1].offset + components[-1].nbytes
    return encoded(name, dtype, shape, encoding, components)


def restored(name: str, row: Fields, stored: Mapping[str, TensorEntry]) -> TensorEntry:
    """The entry of the weight `name` that `row` describes, from the tensors `stored` in its file.

    Raises ValueError for an unknown form, and for components that are missing or of another dtype or shape.
    """
    form, dtype = row.text("form"), row.text("dtype")
    if form not in _FORMS:
        raise ValueError(f"{name} is stored as {shown(form)}, this version reads {', '.join(_FORMS)}")
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"{row.where}.dtype is {shown(dtype)}, supported are {', '.join(TORCH_DTYPES)}")
    encoding = _FORMS[form](row.fields("parameters"))
    shape = counts(row.take("shape"), f"{row.where}.shape")
    wanted = encoding.components(TORCH_DTYPES[dtype], shape)
    found = [_component(stored, component_name(name, role), part) for role, part in zip(encoding.roles, wanted, strict=True)]
    return encoded(name, TORCH_DTYPES[dtype], shape, encoding, found)


def _component(stored: Mapping[str, TensorEntry], name: str, wanted: Component) -> TensorEntry:
    entry = stored.get(name)
    if entry is None:
        raise ValueError(f"{name} is missing")
    if not wanted.fits(entry):
        raise ValueError(f"{name} is {list(entry.shape)} {entry.dtype}, expected {list(wanted.shape)} {wanted.dtype}")
    return entry
