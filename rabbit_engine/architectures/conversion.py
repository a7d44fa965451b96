"""Converts a checkpoint's tensors to the model's weights with transformers' own conversion, one shard at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import Concatenate, MergeModulelist, PreTrainedModel

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.architectures.building import config_path
from rabbit_engine.architectures.families.fused import SplitQKV
from rabbit_engine.architectures.gguf_config import GgufConfigFile
from rabbit_engine.errors import CompressionUnavailableError, DamagedCheckpointError, MismatchedWeightsError, first_line
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.transformers_bridge.gguf import GgufFile
from rabbit_engine.transformers_bridge.gguf_weights import Shape, Source
from rabbit_engine.transformers_bridge.loading import Loaded, load_weights, may_be_unused, weight_dtypes
from rabbit_engine.transformers_bridge.multi_token import HeadsNameMap, MultiTokenModel
from rabbit_engine.transformers_bridge.quantizers import (
    PACKED_METHODS,
    Format,
    Quantizer,
    block_of,
    dequantizes,
    method_of,
    open_dequantizer,
    roles_of,
)
from rabbit_engine.transformers_bridge.weight_transforms import (
    NameMap,
    Place,
    WeightTransform,
    in_loading_order,
    transforms_for,
)
from rabbit_engine.utils.extras import missing_extra

logger = logging.getLogger(__name__)

_LISTED = 20

_COMPUTED = ("inv_freq", "masked_bias", "future_mask")
"""Name suffixes of tensors that models compute and some checkpoints store anyway."""

_STACKS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

_NEED_SCALES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """One of the tensors that a quantised weight is stored as: its `role` in the format of that `method`.

    `block` is the number of rows and columns that share a scale, if the config says it.
    """

    method: str
    role: str
    block: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The weight of the model that a stored tensor goes into.

    `converted`: the weight is made from several tensors, or is the first of several made from one. `slices`: (weight, rows)
    for each of those, if they are plain row ranges of the tensor. `stack`: (index, count) of a tensor in a weight that stacks
    tensors unchanged, or groups of them concatenated along rows (experts). `quantised`: what the tensor is to a weight that is
    dequantised first.
    """

    name: str
    converted: bool
    slices: tuple[tuple[str, int], ...] = ()
    stack: tuple[int, int] | None = None
    quantised: QuantisedTensor | None = None


@dataclass(frozen=True)
class Conversion:
    """transformers' own loading, applied to any group of a checkpoint's keys.

    `skeleton` is the model on the meta device; it provides names, shapes and dtypes, and never holds weights. `quantised`: some
    of the weights are, so the others may be stored in another float dtype than the model's.
    """

    skeleton: PreTrainedModel
    tensors: Mapping[str, Any]
    dtype: torch.dtype
    quantizer: Quantizer | None = None
    transforms: Sequence[WeightTransform] = ()
    family: str | None = None
    quantised: bool = False

    @cached_property
    def _all_transforms(self) -> list[WeightTransform]:
        return transforms_for(self.skeleton, self.quantizer, first=self.transforms)

    @cached_property
    def _names(self) -> NameMap | HeadsNameMap:
        if isinstance(self.skeleton, MultiTokenModel):
            return HeadsNameMap(self.skeleton, self.quantizer, self.transforms)
        return NameMap(self.skeleton, self._all_transforms)

    @cached_property
    def _state(self) -> Mapping[str, torch.Tensor]:
        return self.skeleton.state_dict()

    @cached_property
    def _dtypes(self) -> Mapping[str, torch.dtype]:
        return weight_dtypes(self.skeleton, self.dtype)

    @cached_property
    def targets(self) -> Mapping[str, Target | None]:
        """Checkpoint key -> the weight of the model it goes into; None for a key that the model does not use."""
        places = {key: self._names.place_of(key) for key in in_loading_order(self.tensors)}
        found = {key: None if place is None else self._target(place) for key, place in places.items()}
        self._require_used(found)
        self._require_scales(found)
        return found

    def _require_used(self, found: Mapping[str, Target | None]) -> None:
        """Raise MismatchedWeightsError if a converted family has unused weights: some config option was misread."""
        unused = [key for key, target in found.items() if target is None and not key.endswith(_COMPUTED)]
        if self.family is not None and unused:
            raise MismatchedWeightsError(
                f"{self.tensors[unused[0]].path}: {len(unused)} weights of this {self.family} model have no place in "
                f"{type(self.skeleton).__name__}, such as {unused[0]}: config.json does not match them, or this variant is "
                "not supported"
            )

    def unused(self) -> list[str]:
        """The stored weights that have no place in the model; as in transformers, without those that its class ignores."""
        ignored = may_be_unused(self.skeleton, dequantizes=self.quantizer is not None)
        return [key for key, target in self.targets.items() if target is None and not ignored.search(self._names.renamed(key))]

    def _require_scales(self, found: Mapping[str, Target | None]) -> None:
        """Raise an error for 8-bit floats whose scales are not known.

        That is CompressionUnavailableError without a quantization_config, and DamagedCheckpointError if they are not stored.
        """
        if self.quantised and self.quantizer is None:
            return  # joined with their scales before
        scaled = {
            _owner(key) for key, target in found.items() if target and target.quantised and target.quantised.role == "scales"
        }
        for key, target in found.items():
            if target is None or getattr(self.tensors[key], "dtype", None) not in _NEED_SCALES:
                continue
            path, dtype = self.tensors[key].path, self.tensors[key].dtype
            if not self.quantised:
                raise CompressionUnavailableError(
                    f"{path}: {key} is stored in {dtype}, but the config has no quantization_config that defines its scale: "
                    "use the unquantised repository"
                )
            if target.quantised and target.quantised.role == "values" and _owner(key) not in scaled:
                raise DamagedCheckpointError(f"{path}: {key} is stored in {dtype}, but its scales are not: download it again")

    def _target(self, place: Place) -> Target:
        converter = place.converter
        if converter is None:
            return Target(place.weight, False)
        steps = converter.operations
        if steps and (stored := dequantizes(steps[0])) is not None:
            block = None if self.quantizer is None else block_of(self.quantizer)
            return _quantised_target(place, converter.source_patterns, stored, steps[1:], block)
        if _stacks(steps):
            return Target(place.weight, True, stack=(place.source, len(converter.source_patterns)))
        if len(steps) != 1 or not isinstance(steps[0], SplitQKV):
            return Target(place.weight, True)
        first, *_ = converter.target_patterns
        names = [place.weight.replace(first, target) for target in converter.target_patterns]
        return Target(place.weight, True, tuple(zip(names, steps[0].rows(self.skeleton.config), strict=True)))

    def shape_for(self, key: str) -> tuple[int, ...] | None:
        """The shape of the weight that a tensor named `key` goes into unchanged; None if there is no such weight."""
        place = self._names.place_of(key)
        return None if place is None or place.converter is not None else tuple(self._state[place.weight].shape)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the model's weight `name`."""
        return self._dtypes[name]

    def differs(self, name: str, tensor: TensorEntry) -> str | None:
        """How a stored tensor differs from the model's weight `name` in dtype or shape, or None if it can be used unchanged."""
        weight, dtype = self._state[name], self.dtype_of(name)
        if tensor.dtype != dtype:
            return f"stored as {tensor.dtype}, the model needs {dtype}"
        if tuple(tensor.shape) != tuple(weight.shape):
            return f"stored as {list(tensor.shape)}, the model needs {list(weight.shape)}"
        return None

    def convert(self, keys: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Read `keys` and return the model's weights made from them, with the model's names, shapes and dtypes, on the CPU.

        Raises MismatchedWeightsError, or the error of a file that cannot be read.
        """
        tensors = {key: self.tensors[key] for key in keys}
        loaded = load_weights(self.skeleton, tensors, self.dtype, self._all_transforms, self.quantizer)
        _raise_mismatches(loaded)
        return loaded.weights


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _stacks(steps: Sequence[Any]) -> bool:
    return [(type(step), getattr(step, "dim", None)) for step in steps] in _STACKS


def _quantised_target(
    place: Place, patterns: Sequence[str], stored: Format, steps: Sequence[Any], block: tuple[int, int] | None
) -> Target:
    """The target of one tensor of a weight that is dequantised, alone or as part of a stack."""
    roles = roles_of(stored, patterns)
    if roles is None or (steps and not _stacks(steps)):
        return Target(place.weight, True)
    role, which = roles[place.source]
    stack = (which, 1 + max(index for _, index in roles)) if steps else None
    return Target(place.weight, True, stack=stack, quantised=QuantisedTensor(stored.method, role, block))


def open_conversion(
    architecture: Architecture, skeleton: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype
) -> Conversion:
    """The conversion of a safetensors or pickle checkpoint's `tensors` (any object that `tensor[...]` reads).

    The architecture's transforms run before transformers' own, which also undo the quantisation of FP8 and MXFP4; weights in
    another quantised format are entries that decode them.
    """
    quantizer, quantization = None, architecture.quantization
    if quantization is not None and method_of(quantization) not in PACKED_METHODS:
        quantizer = _open_quantizer(quantization, config_path(skeleton.config))
    return Conversion(skeleton, tensors, dtype, quantizer, architecture.transforms, architecture.family, quantization is not None)


def _open_quantizer(quantization: Mapping[str, Any], path: str) -> Quantizer:
    try:
        return open_dequantizer(quantization)
    except (ValueError, TypeError, AttributeError) as error:
        raise CompressionUnavailableError(f"{path}: quantization_config cannot be read: {first_line(error)}") from error


def open_gguf(path: Path) -> GgufFile:
    """A GGUF file as transformers reads it. Raises MissingExtraError without the package gguf."""
    try:
        return GgufFile(path)
    except ImportError as error:
        raise missing_extra(str(path), "gguf", error) from error


def gguf_dtype(path: Path) -> torch.dtype:
    """The dtype that transformers gives a GGUF checkpoint: its own if it holds plain floats, float32 if it is quantised."""
    return open_gguf(path).dtype()


_UNFIT = (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError)
"""Errors caused by inconsistent values, not by the disk, memory or a missing package."""


def open_gguf_conversion(skeleton: PreTrainedModel, path: Path, dtype: torch.dtype) -> Conversion:
    """The conversion of a GGUF file, dequantised by transformers to `dtype`.

    Architectures that only transformers' older GGUF reader supports are dequantised at once, in memory. Raises
    DamagedCheckpointError if the header does not match the tensors.
    """
    file = open_gguf(path)
    with _unfit_as_damaged(path):
        tensors = file.open_tensors(skeleton, dtype)
    return Conversion(skeleton, tensors, dtype, file.quantizer)


def gguf_sources(
    file: GgufFile, skeleton: PreTrainedModel, architecture: str, config: GgufConfigFile, shapes: Mapping[str, Shape]
) -> Mapping[str, Source]:
    """Weight of the model -> what it is of a GGUF file's tensors, of `shapes`. Raises DamagedCheckpointError as above."""
    with _unfit_as_damaged(file.path):
        return file.sources(skeleton, architecture, config.read, shapes)


@contextmanager
def _unfit_as_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNFIT as error:  # the reader trusts the header's numbers
        raise DamagedCheckpointError(
            f"{path} cannot be converted: its header does not match its tensors ({first_line(error)}); download it again"
        ) from error


def warn_of_unused(unused: Sequence[str], cls: type[PreTrainedModel]) -> None:
    """Log a warning that lists the stored weights that have no place in the model."""
    if unused:
        listed = ", ".join(unused[:_LISTED]) + (f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else "")
        logger.warning("%d weights of the checkpoint have no place in %s and are not used: %s", len(unused), cls.__name__, listed)


def _raise_mismatches(loaded: Loaded) -> None:
    if loaded.mismatched:
        rows = "; ".join(f"{name} is {list(got)}, the model needs {list(want)}" for name, got, want in loaded.mismatched)
        raise MismatchedWeightsError(f"weights do not have the shapes of the config: {rows}")
    if loaded.failed:
        name, text = next(iter(loaded.failed.items()))
        raise MismatchedWeightsError(f"{name} could not be converted: {text.strip().splitlines()[-1]}")
