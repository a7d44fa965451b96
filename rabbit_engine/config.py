"""The caller's settings as frozen values, checked once, and the parsing of the keywords they come from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.utils.speeds import Speeds

ATTENTION_IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "eager")
CacheDtype = Literal["int8"]
CACHE_DTYPES = ("int8",)
SPLIT_MODES = ("auto", "always", "never")
COMPUTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes that a model can compute in. Narrower ones only store weights: torch has no arithmetic for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where a checkpoint comes from, how it may be fetched, and which part and config of it to use.

    `config` is a config object, or the place of one; `overrides` are attributes of it; `key_mapping` maps patterns of stored
    names to replacements. `auto` names the auto class of transformers that chooses the model's class; None is what the
    checkpoint names.
    """

    token: str | bool | None = None
    revision: str | None = None
    cache_dir: Path | None = None
    local_files_only: bool = False
    trust_remote_code: bool = False
    gguf_file: str | None = None
    subfolder: str = ""
    variant: str | None = None
    use_safetensors: bool | None = None
    force_download: bool = False
    code_revision: str | None = None
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    config: Any = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    auto: str | None = None

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder", "variant", "code_revision", "gguf_file"):
            _check_text(name, getattr(self, name))
        if self.variant == "":
            raise ConfigurationError("variant='' is empty: leave it out")
        _check_renamings(self.key_mapping)
        parts = Path(self.subfolder).parts
        if Path(self.subfolder).is_absolute() or ".." in parts:
            raise ConfigurationError(f"subfolder={self.subfolder!r} is outside the checkpoint: name a folder inside it")
        if self.gguf_file is not None and self.variant is not None:
            raise ConfigurationError(
                f"variant={self.variant!r} applies to safetensors and pickles, gguf_file={self.gguf_file!r} is neither"
            )


_NAME_BYTES, _PATH_BYTES = 255, 4095
"""The longest names that today's file systems and operating systems accept."""


def _check_text(keyword: str, value: object) -> None:
    """Raise ConfigurationError unless `value` is None or a string that can be part of a file name."""
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{keyword}={value!r} is of type {type(value).__name__}: pass a string, or leave it out")
    if value is not None and not _can_be_file(value):
        raise ConfigurationError(f"{keyword}={shown(value)} cannot be part of a file name: pass another, or leave it out")


def _can_be_file(path: str) -> bool:
    """Whether the system allows a file of that name: not too long, and without invalid characters."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) <= _PATH_BYTES and max(map(len, name.split(b"/"))) <= _NAME_BYTES


def _check_renamings(mapping: object) -> None:
    """Raise ConfigurationError unless `mapping` maps regular expressions to names."""
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for row in mapping.items() for text in row):
        raise ConfigurationError(f"key_mapping={mapping!r} does not map patterns of stored names to replacements")
    for pattern in mapping:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(f"key_mapping: {pattern!r} is not a valid pattern: {error}") from error


COMPRESSIONS = ("4bit", "8bit", "lossless")


COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
"""In which layers with bitsandbytes' 4-bit weights compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytes:
    """What bitsandbytes makes of linear layers: codes of `kind` "nf4" or "fp4", whose scales are quantised too if `nested`, or
    "int8".

    Modules in `skip` stay as they are; None stands for transformers' own choice. Layers compute in `compute_dtype`, or, in int8,
    with columns of states that hold a value of `threshold` or more apart.
    """

    kind: str
    nested: bool = False
    skip: tuple[str, ...] | None = None
    compute_dtype: str = "float32"
    threshold: float = 6.0

    def __post_init__(self) -> None:
        """Raise ConfigurationError, by the names that transformers' config has for the values."""
        if self.kind not in ("nf4", "fp4", "int8"):
            raise ConfigurationError(f"bnb_4bit_quant_type={self.kind!r} is not 'nf4' or 'fp4'")
        if self.compute_dtype not in COMPUTE_DTYPES:
            listed = ", ".join(COMPUTE_DTYPES)
            raise ConfigurationError(f"bnb_4bit_compute_dtype={self.compute_dtype} is not supported, only {listed}")
        if not self.threshold >= 0:  # NaN is not
            raise ConfigurationError(f"llm_int8_threshold={self.threshold} is not a number from 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionConfig:
    """How shards store weights: "4bit", "8bit", "lossless", or as `bitsandbytes` does; arranged for devices of a type."""

    method: str
    bitsandbytes: BitsAndBytes | None = None
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        if self.bitsandbytes is None and self.method not in COMPRESSIONS:
            raise ConfigurationError(f"compression={self.method!r} is not one of {', '.join(map(repr, COMPRESSIONS))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Whether and how a checkpoint is split: `dtype=None` keeps its own, `saving_path=None` splits next to it. With `more_paths`
    it is spread over those too.

    `mode` "auto" streams from the original files if they hold the weights in the model's form and neither a path for shards
    nor a `compression` is given; "always" splits; "never" does not.
    """

    dtype: torch.dtype | None = None
    saving_path: Path | None = None
    more_paths: tuple[Path, ...] = ()
    delete_original: bool = False
    mode: str = "auto"
    compression: CompressionConfig | None = None

    def __post_init__(self) -> None:
        if self.mode not in SPLIT_MODES:
            raise ConfigurationError(f"split={self.mode!r} is not one of {', '.join(map(repr, SPLIT_MODES))}")
        if self.mode == "never" and (self.delete_original or self.saving_path):
            raise ConfigurationError('split="never" makes no shards: leave out layer_shards_saving_path and delete_original')
        if self.mode == "never" and self.compression is not None:
            raise ConfigurationError(
                'split="never" makes no shards, but compressed weights are stored in some: leave out one of them'
            )
        if self.more_paths and len({path.expanduser().resolve() for path in self.saving_paths}) < len(self.saving_paths):
            named = ", ".join(map(str, self.saving_paths))
            raise ConfigurationError(f"layer_shards_saving_path names a folder twice ({named}): name each disk once")
        if not isinstance(self.delete_original, bool):
            raise ConfigurationError(f"delete_original={self.delete_original!r} must be True or False: it deletes files")

    @property
    def saving_paths(self) -> tuple[Path, ...]:
        """All of them."""
        return () if self.saving_path is None else (self.saving_path, *self.more_paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How finely a model is cut into units.

    A module's weights below `least_bytes` move with their layer; a head's blocks have at most `most_bytes`; the rest of a
    layer stays resident up to a `rest_share` of the layer. Experts are separate units, unless `by_expert` is False.
    """

    least_bytes: int = 2**20
    most_bytes: int = 128 * 2**20
    rest_share: float = 1 / 12
    by_expert: bool = True


DEFAULT_CUT = Cut()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How a model is run.

    Budgets are bytes; None is the free memory less a margin. Memory is reserved for the cache of `max_seq_len` tokens. Texts keep
    keys and values in `cache_dtype`; None is the dtype that they are computed in.
    `draft_bytes` of the budget are a draft's: one that `draft_is_loaded` has taken them of the free memory already. `speeds` of
    None are measured. `fused_products` True multiplies by stored forms of weights where it can, False never, and None where the
    encoding says so.
    """

    device: torch.device
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    attn_implementation: str = "auto"
    prefetching: bool = True
    profiling_mode: bool = False
    show_layer_progress: bool = False
    max_seq_len: int | None = None
    cache_dtype: CacheDtype | None = None
    draft_bytes: int = 0
    draft_is_loaded: bool = True
    speeds: Speeds | None = None
    fused_products: bool | None = None
    cut: Cut = DEFAULT_CUT

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and (not isinstance(self.max_seq_len, int) or self.max_seq_len < 1):
            raise ConfigurationError(
                f"max_seq_len={self.max_seq_len!r} is not a number of tokens: pass an integer from 1, or None"
            )
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            known = " or ".join(map(repr, CACHE_DTYPES))
            raise ConfigurationError(f"cache_dtype={self.cache_dtype!r} is not {known}, or None for the model's own")
        if self.attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            known = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
            raise ConfigurationError(f"attn_implementation={self.attn_implementation!r} is not one of {known}")
        if self.fused_products not in (None, True, False):
            raise ConfigurationError(f"fused_products={self.fused_products!r} is not True, False or None")
        if not isinstance(self.cut, Cut):
            raise ConfigurationError(f"cut={self.cut!r} is not a rabbit_engine.config.Cut: pass one, or leave it out")


_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32", "fp64": "float64"}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`"bfloat16"`, `"bf16"`, `"torch.bfloat16"`, `"half"` or a dtype; `None` and `"auto"` keep the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).strip().lower().removeprefix("torch.")
    found = getattr(torch, _DTYPE_ALIASES.get(name, name), None)
    if not isinstance(found, torch.dtype) or found not in COMPUTED_DTYPES:
        raise ConfigurationError(
            f'dtype={dtype!r} is not a floating-point dtype that models compute in; try "bfloat16", "float16" or "float32"'
        )
    return found


def parse_path(keyword: str, value: object) -> Path | None:
    """A keyword's value as a path, or None if it is not given. Raises ConfigurationError for a value that is not a path."""
    if value is None or value == "":
        return None
    if isinstance(value, bytes) or not isinstance(value, str | PathLike):
        raise ConfigurationError(f"{keyword}={value!r} is of type {type(value).__name__}: pass a path, or leave it out")
    if not _can_be_file(str(value)):
        raise ConfigurationError(f"{keyword}={shown(value)} cannot be a folder name: pass another, or leave it out")
    return Path(value)


def parse_paths(keyword: str, value: object) -> tuple[Path, ...]:
    """A keyword's value as paths: one, a list of several, or none if it is not given. Raises ConfigurationError.

    Several are in the order of their names: it does not matter in which order they are given.
    """
    if not isinstance(value, list | tuple):
        path = parse_path(keyword, value)
        return () if path is None else (path,)
    paths = [parse_path(keyword, item) for item in value]
    if not paths or None in paths:
        raise ConfigurationError(f"{keyword}={value!r} names no folder, or an empty one: pass a path, or a list of them")
    return tuple(sorted((path for path in paths if path is not None), key=lambda path: path.expanduser().resolve()))
