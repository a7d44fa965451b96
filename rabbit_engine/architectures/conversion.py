"""A checkpoint's tensors into the model's own, through transformers' conversion, one shard's worth at a time."""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from rabbit_engine.architectures.architecture import Architecture
from rabbit_engine.architectures.building import config_path
from rabbit_engine.architectures.families.fused import SplitQKV
from rabbit_engine.errors import CompressionUnavailableError, DamagedCheckpointError, MismatchedWeightsError, first_line
from rabbit_engine.utils.extras import missing_extra

logger = logging.getLogger(__name__)

_LISTED = 20

_COMPUTED = ("inv_freq", "masked_bias", "future_mask")
"""Ends of the names of tensors that models compute by themselves and some checkpoints store."""

_STACKS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])

_NEED_SCALES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Target:
    """A weight of the model; `converted` when it is made from several tensors, or is the first of several made from one.

    `slices` are those several with the rows of the one that each is, where they are rows of it and nothing more. `stack`
    is (which, of how many) where the weight is a stack of tensors as they are stored, or of groups of them laid row under
    row: experts.
    """

    name: str
    converted: bool
    slices: tuple[tuple[str, int], ...] = ()
    stack: tuple[int, int] | None = None


@dataclass(slots=True)
class Conversion:
    """transformers' own loading, applied to any group of a checkpoint's keys.

    `skeleton` is the model on the meta device: it lends its names, shapes and dtypes, and keeps no weight.
    """

    skeleton: PreTrainedModel
    tensors: Mapping[str, Any]
    dtype: torch.dtype
    quantizer: Any = None
    transforms: Sequence[WeightTransform] = ()
    family: str | None = None
    _mapping: list[Any] | None = None

    def targets(self) -> dict[str, Target | None]:
        """checkpoint key -> the weight of the model it goes into; None for a key the model has no use for."""
        mapping = self._transforms()
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        state, prefix = self.skeleton.state_dict(), self.skeleton.base_model_prefix
        found: dict[str, Target | None] = {}
        for key in sorted(self.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            found[key] = self._target(name, pattern) if name in state else None
        self._require_used(found)
        self._require_scales(found)
        return found

    def _require_used(self, found: Mapping[str, Target | None]) -> None:
        """A converted family's weights all have a place: one without is a switch of its config that was read wrong."""
        unused = [key for key, target in found.items() if target is None and not key.endswith(_COMPUTED)]
        if self.family is not None and unused:
            raise MismatchedWeightsError(
                f"{self.tensors[unused[0]].path}: {len(unused)} weights of this {self.family} model have no place in "
                f"{type(self.skeleton).__name__}, such as {unused[0]}: config.json does not fit them, or it is a variant that is "
                "not converted"
            )

    def unused(self, targets: Mapping[str, Target | None]) -> list[str]:
        """The stored weights that have no place in the model, as transformers counts: but for those its class ignores."""
        ignored = self._ignored()
        return [key for key, target in targets.items() if target is None and not ignored.search(self._renamed(key))]

    def _ignored(self) -> re.Pattern[str]:
        """Names that transformers does not miss: the class's own, buffers that older versions stored, scales once undone."""
        patterns = list(self.skeleton._keys_to_ignore_on_load_unexpected or ())
        buffers = [name for name, _ in self.skeleton.named_buffers()]
        patterns += [
            re.escape(name) for name in ("rotary_emb.inv_freq", "position_ids") if any(b.endswith(name) for b in buffers)
        ]
        patterns += [r"_scale_inv$", r"_scales$"] if self.quantizer is not None else []
        return re.compile("|".join(f"({pattern})" for pattern in patterns) or r"(?!)")

    def _renamed(self, key: str) -> str:
        """`key` in the model's words, as far as there are any."""
        renamings = [t for t in self._transforms() if isinstance(t, WeightRenaming)]
        return rename_source_key(key, renamings, [], self.skeleton.base_model_prefix, self.skeleton.state_dict())[0]

    def _require_scales(self, found: Mapping[str, Target | None]) -> None:
        """Eight-bit floats mean nothing without the scales that a quantization_config would tell of."""
        if self.quantizer is None:
            for key, target in found.items():
                if target is not None and getattr(self.tensors[key], "dtype", None) in _NEED_SCALES:
                    raise CompressionUnavailableError(
                        f"{self.tensors[key].path}: {key} is stored in {self.tensors[key].dtype} and the config does not say "
                        "how it is scaled: use the unquantised repository"
                    )

    def _target(self, name: str, pattern: str | None) -> Target:
        """`pattern` is the source pattern of the converter that made `name`, its first target; None where none did."""
        converters = [t for t in self._transforms() if isinstance(t, WeightConverter) and pattern in t.source_patterns]
        if pattern is None or not converters:
            return Target(name, pattern is not None)
        converter, operations = converters[0], [(type(step), getattr(step, "dim", None)) for step in converters[0].operations]
        if operations in _STACKS:
            return Target(name, True, stack=(converter.source_patterns.index(pattern), len(converter.source_patterns)))
        if len(operations) != 1 or not isinstance(converter.operations[0], SplitQKV):
            return Target(name, True)
        names = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
        return Target(name, True, tuple(zip(names, converter.operations[0].rows(self.skeleton.config), strict=True)))

    def _transforms(self) -> list[Any]:
        if self._mapping is None:
            own = copy.deepcopy(list(self.transforms))
            self._mapping = own + get_model_conversion_mapping(self.skeleton, None, self.quantizer)
        return self._mapping

    def differs(self, name: str, tensor: Any) -> str | None:
        """How a stored tensor differs from the model's weight `name` in dtype or shape, or None where it can be used as it is."""
        weight = self.skeleton.get_parameter_or_buffer(name)
        dtype = _planned(self.skeleton._get_dtype_plan(self.dtype), name, weight.dtype)
        if tensor.dtype != dtype:
            return f"{tensor.dtype} is stored, {dtype} is wanted"
        if tuple(tensor.shape) != tuple(weight.shape):
            return f"{list(tensor.shape)} is stored, {list(weight.shape)} is wanted"
        return None

    def convert(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read `keys` and return the weights of the model they make, in its names, shapes and dtypes, on the CPU.

        Raises MismatchedWeightsError; a file that cannot be read raises its own error.
        """
        before = dict(self.skeleton.state_dict(keep_vars=True))
        plan = self.skeleton._get_dtype_plan(self.dtype)
        load_config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=plan,
            hf_quantizer=self.quantizer,
            weight_mapping=copy.deepcopy(self._transforms()),
        )
        try:
            with _quiet_progress():
                info, _ = convert_and_load_state_dict_in_model(
                    self.skeleton, {key: self.tensors[key] for key in keys}, load_config
                )
            _raise_mismatches(info)
            made = {
                name: self.skeleton.get_parameter_or_buffer(name).detach() for name in before if name not in info.missing_keys
            }
            # dequantising leaves some as they are stored
            return {name: tensor.to(_planned(plan, name, before[name].dtype)) for name, tensor in made.items()}
        finally:
            _restore(self.skeleton, before)


def _planned(plan: Mapping[str, torch.dtype], name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, unless the class's plan has another for this weight: some stay float32 whatever the model's is."""
    return next((kept for pattern, kept in plan.items() if re.search(pattern, name)), dtype)


def open_conversion(
    architecture: Architecture, skeleton: PreTrainedModel, tensors: Mapping[str, Any], dtype: torch.dtype
) -> Conversion:
    """The conversion of a safetensors or pickle checkpoint's `tensors` (anything that is read by `tensor[...]`).

    The architecture's transforms stand before transformers' own; quantised weights are dequantised by transformers.
    """
    quantizer = None
    if architecture.quantization is not None:
        quantizer = _open_quantizer(architecture.quantization, config_path(skeleton.config))
    return Conversion(skeleton, tensors, dtype, quantizer, architecture.transforms, architecture.family)


def _open_quantizer(quantization: Mapping[str, Any], path: str) -> Any:
    try:
        return AutoHfQuantizer.from_config({**quantization, "dequantize": True}, pre_quantized=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise CompressionUnavailableError(f"{path}: quantization_config cannot be read: {first_line(error)}") from error


def gguf_dtype(path: Path) -> torch.dtype:
    """The dtype transformers gives a GGUF checkpoint: its own where it is plain floats, float32 where it is quantised."""
    return _gguf_quantizer(path).update_dtype(None)  # type: ignore[no-any-return]


_UNFIT = (ValueError, LookupError, TypeError, ArithmeticError, AttributeError, RuntimeError)
"""What comes of numbers that do not fit, and not of the disk, the memory or a missing package."""


def open_gguf_conversion(skeleton: PreTrainedModel, path: Path, dtype: torch.dtype) -> Conversion:
    """The conversion of a GGUF file: dequantised by transformers, in `dtype`.

    Architectures that only transformers' older GGUF reader knows are dequantised whole, in memory. Raises
    DamagedCheckpointError where it cannot make tensors of what the header says.
    """
    quantizer = _gguf_quantizer(path)
    quantizer.update_dtype(dtype)
    quantizer.preprocess_model(model=skeleton, dtype=dtype, device_map=None, checkpoint_files=[str(path)])
    try:
        with _quiet_progress():
            tensors = quantizer.get_state_dict(str(path), skeleton)
    except _UNFIT as error:  # the reader believes the header's numbers, whatever they are
        raise DamagedCheckpointError(
            f"{path} cannot be converted: its header does not fit its tensors ({first_line(error)}); download it again"
        ) from error
    return Conversion(skeleton, tensors, dtype, quantizer)


def warn_of_unused(unused: Sequence[str], cls: type[PreTrainedModel]) -> None:
    """Name the stored weights that have no place in the model."""
    if unused:
        listed = ", ".join(unused[:_LISTED]) + (f" and {len(unused) - _LISTED} more" if len(unused) > _LISTED else "")
        logger.warning("%d weights of the checkpoint have no place in %s and are not used: %s", len(unused), cls.__name__, listed)


def _gguf_quantizer(path: Path) -> Any:
    try:
        quantizer = GgufHfQuantizer(GgufConfig(dequantize=True, gguf_file=str(path)))
        quantizer.read_header(str(path))
    except ImportError as error:
        raise missing_extra(str(path), "gguf", error) from error
    return quantizer


def _raise_mismatches(info: Any) -> None:
    if info.mismatched_keys:
        rows = "; ".join(
            f"{name} is {list(got)}, the model's is {list(want)}" for name, got, want in sorted(info.mismatched_keys)
        )
        raise MismatchedWeightsError(f"weights of another shape than the config says: {rows}")
    if info.conversion_errors:
        name, text = next(iter(info.conversion_errors.items()))
        raise MismatchedWeightsError(f"{name} could not be converted: {text.strip().splitlines()[-1]}")


def _restore(skeleton: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        module = skeleton.get_submodule(owner)
        table = module._buffers if attribute in module._buffers else module._parameters
        table[attribute] = tensor  # type: ignore[assignment]
    skeleton._weight_conversions = None  # type: ignore[assignment]


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """transformers' own bar would start anew for every shard; that of its GGUF reader asks nobody."""
    gguf_reader: Any = modeling_gguf_pytorch_utils
    enabled, gguf_bar = transformers_logging.is_progress_bar_enabled(), getattr(gguf_reader, "tqdm", tqdm)
    transformers_logging.disable_progress_bar()
    gguf_reader.tqdm = functools.partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        if enabled:
            transformers_logging.enable_progress_bar()
