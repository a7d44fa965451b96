"""The steps of sentence-transformers that change a vector after pooling, read from a checkpoint's folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import activation as activations

from rabbit_engine.checkpoints.formats import PickleFile
from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError
from rabbit_engine.storage.directio import damage_as, is_file
from rabbit_engine.storage.jsonvalues import Fields
from rabbit_engine.storage.tensorfiles import read_header, read_tensor
from rabbit_engine.tasks.jsonfiles import parsed

_VECTOR = "sentence_embedding"
"""sentence-transformers' name of the vector of a text."""


Step = Callable[[torch.Tensor], torch.Tensor]
"""Changes vectors: float32 [texts, width] into [texts, width]."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A product with `weight` [out, in], the `activation`, and, of a residual step, the input itself, or its product with
    `residual` [out, in]."""

    path: Path
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: nn.Module
    is_residual: bool = False
    residual: torch.Tensor | None = None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Raises ConfigurationError for vectors of another width than its weight's."""
        _require_width(self.path, self.weight.shape[-1], vectors)
        found: torch.Tensor = self.activation(functional.linear(vectors, self.weight, self.bias))
        if not self.is_residual:
            return found
        return found + (vectors if self.residual is None else functional.linear(vectors, self.residual))


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """Layer normalization with `weight` and `bias` [width]."""

    path: Path
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Raises ConfigurationError for vectors of another width."""
        _require_width(self.path, len(self.weight), vectors)
        return functional.layer_norm(vectors, self.weight.shape, self.weight, self.bias)


def normalize(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., width] of length 1."""
    return functional.normalize(vectors, dim=-1)


def read_step(kind: str, folder: Path) -> Step | None:
    """The step of a class of sentence-transformers, from its folder; None for one that changes nothing.

    Raises ConfigurationError for a class or setting that is not supported, DamagedCheckpointError for files that cannot be
    read or do not fit each other.
    """
    return _READERS[kind](folder)


def _read_dense(folder: Path) -> Dense:
    path = folder / "config.json"
    with parsed(path) as listed:
        config = Fields.of(listed)
        inner, outer, bias = config.count("in_features"), config.count("out_features"), _flag(config, "bias", default=True)
        residual, named = _flag(config, "use_residual", default=False), config.optional_text("activation_function")
        _require_vector(config, path)
    weights = _weights(folder)
    taken = {"linear.weight": (outer, inner), **({"linear.bias": (outer,)} if bias else {})}
    if residual and inner != outer:
        taken["residual.weight"] = (outer, inner)
    _require_shapes(weights, taken, path)
    return Dense(
        path,
        weights["linear.weight"],
        weights.get("linear.bias") if bias else None,
        _activation(named, path),
        residual,
        weights["residual.weight"] if "residual.weight" in taken else None,
    )


def _read_layer_norm(folder: Path) -> LayerNorm:
    path = folder / "config.json"
    with parsed(path) as listed:
        width = Fields.of(listed).count("dimension")
    weights = _weights(folder)
    _require_shapes(weights, {"norm.weight": (width,), "norm.bias": (width,)}, path)
    return LayerNorm(path, weights["norm.weight"], weights["norm.bias"])


def _read_normalize(folder: Path) -> Step:
    path = folder / "config.json"
    if is_file(path):  # older checkpoints have none
        with parsed(path) as listed:
            _require_vector(Fields.of(listed), path)
    return normalize


_READERS: Mapping[str, Callable[[Path], Step | None]] = MappingProxyType(
    {"Dense": _read_dense, "LayerNorm": _read_layer_norm, "Normalize": _read_normalize, "Dropout": lambda _: None}
)
KINDS = frozenset(_READERS)
"""The classes of sentence-transformers that `read_step` knows."""


def _flag(config: Fields, key: str, *, default: bool) -> bool:
    return config.flag(key) if key in config.values else default


def _require_vector(config: Fields, path: Path) -> None:
    """Raise ConfigurationError for a step of anything but the text's vector, such as those of its tokens."""
    for key in ("module_input_name", "module_output_name"):
        name = config.optional_text(key) or _VECTOR
        if name != _VECTOR:
            raise ConfigurationError(f"{path} has {key} {name!r}, which is not supported: only {_VECTOR!r} is")


def _activation(name: str | None, path: Path) -> nn.Module:
    """One of torch's by its full name; sentence-transformers' default is Tanh. Raises ConfigurationError for any other."""
    module, _, last = (name or "torch.nn.Tanh").rpartition(".")
    found = nn.Identity if last == "Identity" else getattr(activations, last, None) if last in activations.__all__ else None
    if found is not None and module.split(".")[:2] == ["torch", "nn"]:
        try:
            made: nn.Module = found()
        except TypeError:  # it needs arguments, such as a dimension
            pass
        else:
            return made.eval()
    raise ConfigurationError(f"{path} has the activation {name}, which is not supported: only those of torch.nn are")


@damage_as(DamagedCheckpointError)
def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a step in float32, by name."""
    stored = folder / "model.safetensors"
    if is_file(stored):
        found = {entry.name: read_tensor(entry) for entry in read_header(stored).tensors}
    else:
        file = PickleFile(folder / "pytorch_model.bin")
        found = {name: file.read(name) for name in file.tensors()}
    return {name: tensor.float() for name, tensor in found.items()}


def _require_shapes(weights: Mapping[str, torch.Tensor], taken: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in taken.items():
        found = list(weights[name].shape) if name in weights else "missing"
        if found != list(shape):
            raise DamagedCheckpointError(f"{path} needs {name} of {list(shape)}, and it is {found}: download the folder again")


def _require_width(path: Path, width: int, vectors: torch.Tensor) -> None:
    if vectors.shape[-1] != width:
        raise ConfigurationError(f"{path} takes vectors of {width} values, and they have {vectors.shape[-1]} with this pooling")
