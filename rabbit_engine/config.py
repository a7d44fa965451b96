"""What the caller asked for, checked once: frozen values and the keywords they come from."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.storage.jsonvalues import shown
from rabbit_engine.utils.platform import find_device
from rabbit_engine.utils.sizes import parse_bytes
from rabbit_engine.utils.speeds import Speeds

ATTENTION_IMPLEMENTATIONS = ("auto", "flash_attention_2", "sdpa", "eager")
SPLIT_MODES = ("auto", "always", "never")
COMPUTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a model computes in. Narrower ones only store weights, and torch has no kernels for sums in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where a checkpoint comes from, what may be done to get it, and which part and config of it are wanted.

    `config` is a config object, or where to find one; `overrides` are attributes of it, `key_mapping` patterns of stored names
    and what they become.
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

    def __post_init__(self) -> None:
        for name in ("revision", "subfolder", "variant", "code_revision", "gguf_file"):
            _check_text(name, getattr(self, name))
        if self.variant == "":
            raise ConfigurationError("variant='' names no variant: leave it out")
        _check_renamings(self.key_mapping)
        parts = Path(self.subfolder).parts
        if Path(self.subfolder).is_absolute() or ".." in parts:
            raise ConfigurationError(f"subfolder={self.subfolder!r} leads out of the checkpoint: name a folder inside of it")
        if self.gguf_file is not None and self.variant is not None:
            raise ConfigurationError(
                f"variant={self.variant!r} is of safetensors and pickles, gguf_file={self.gguf_file!r} is neither"
            )


_NAME_BYTES, _PATH_BYTES = 255, 4095
"""The longest that today's file systems and systems take."""


def _check_text(keyword: str, value: Any) -> None:
    """Raise ConfigurationError for what is neither None nor a text that can be, or be in, the name of a file."""
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{keyword}={value!r} is of type {type(value).__name__}: give text, or leave it out")
    if value is not None and not _can_be_file(value):
        raise ConfigurationError(f"{keyword}={shown(value)} cannot be in the name of a file: give another, or leave it out")


def _can_be_file(path: str) -> bool:
    """Whether the system can have a file of that name: not too long, and without characters that no name has."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) <= _PATH_BYTES and max(map(len, name.split(b"/"))) <= _NAME_BYTES


def _check_renamings(mapping: Any) -> None:
    """Raise ConfigurationError for what does not map patterns to names."""
    if not isinstance(mapping, Mapping) or not all(isinstance(text, str) for row in mapping.items() for text in row):
        raise ConfigurationError(f"key_mapping={mapping!r} does not map patterns of stored names to what they become")
    for pattern in mapping:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigurationError(f"key_mapping: {pattern!r} is no pattern: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """Whether and how a checkpoint is split: `dtype=None` keeps its own, `saving_path=None` splits beside it.

    `mode` "auto" streams from the original files where they hold the weights as the model has them, unless a path for
    shards is given; "always" splits, "never" does not.
    """

    dtype: torch.dtype | None = None
    saving_path: Path | None = None
    delete_original: bool = False
    mode: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in SPLIT_MODES:
            raise ConfigurationError(f"split={self.mode!r} is none of {', '.join(map(repr, SPLIT_MODES))}")
        if self.mode == "never" and (self.delete_original or self.saving_path):
            raise ConfigurationError('split="never" makes no shards: leave out layer_shards_saving_path and delete_original')
        if not isinstance(self.delete_original, bool):
            raise ConfigurationError(f"delete_original={self.delete_original!r} deletes files: say True or False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How finely. A module's weights below `least_bytes` travel with their layer; a head's blocks have `most_bytes` at most;
    what is left of a layer stays resident up to a `rest_share` of it. Experts are cut one by one, or with `by_expert=False`
    not at all."""

    least_bytes: int = 2**20
    most_bytes: int = 128 * 2**20
    rest_share: float = 1 / 12
    by_expert: bool = True


DEFAULT_CUT = Cut()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """How a model is run. Budgets are bytes; `None` is what is free, less a margin. `max_seq_len` tokens get room for their
    cache; `speeds` of `None` are measured; `cut` says how finely the model is cut into units."""

    device: torch.device
    device_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    attn_implementation: str = "auto"
    prefetching: bool = True
    profiling_mode: bool = False
    show_layer_progress: bool = False
    max_seq_len: int | None = None
    speeds: Speeds | None = None
    cut: Cut = DEFAULT_CUT

    def __post_init__(self) -> None:
        if self.max_seq_len is not None and (not isinstance(self.max_seq_len, int) or self.max_seq_len < 1):
            raise ConfigurationError(f"max_seq_len={self.max_seq_len!r} is no number of tokens; say how many, or None")
        if self.attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            known = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
            raise ConfigurationError(f"attn_implementation={self.attn_implementation!r} is none of {known}")


_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32", "fp64": "float64"}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """`"bfloat16"`, `"bf16"`, `"torch.bfloat16"`, `"half"` or a dtype; `None` and `"auto"` keep the checkpoint's own."""
    if dtype is None or dtype == "auto":
        return None
    name = str(dtype).strip().lower().removeprefix("torch.")
    found = getattr(torch, _DTYPE_ALIASES.get(name, name), None)
    if not isinstance(found, torch.dtype) or found not in COMPUTED_DTYPES:
        raise ConfigurationError(
            f'dtype={dtype!r} is no floating-point dtype that models compute in; try "bfloat16", "float16" or "float32"'
        )
    return found


def parse_path(keyword: str, value: Any) -> Path | None:
    """The path that a keyword names; None where it names none. Raises ConfigurationError for what is no path."""
    if value is None or value == "":
        return None
    if isinstance(value, bytes) or not isinstance(value, str | PathLike):
        raise ConfigurationError(f"{keyword}={value!r} is of type {type(value).__name__}: give a path, or leave it out")
    if not _can_be_file(str(value)):
        raise ConfigurationError(f"{keyword}={shown(value)} cannot be the name of a folder: give another, or leave it out")
    return Path(value)


_AUTOMATIC_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def parse_device(device: str | int | torch.device | None, device_map: Any = None) -> torch.device:
    """One device from `device` or from transformers' `device_map` (`"auto"` and its kin, a device, or `{"": device}`)."""
    if device_map is None or device_map in _AUTOMATIC_MAPS:
        return find_device(device)
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ConfigurationError(
                f'device_map names {len(places)} places, layers run on one: give device="cuda:0" and max_memory={{0: "8GiB"}}'
            )
        device_map = places.pop()
    if device is not None and not _same_device(device, device_map):
        raise ConfigurationError(f"device={device!r} and device_map={device_map!r} disagree; give one of them")
    return find_device(device_map)


def parse_planned_device(device: str | None, has_budget: Callable[[torch.device], bool]) -> torch.device:
    """A device to plan for: one that is here, or one that is not and has a budget of its own."""
    if device is None:
        return find_device(None)
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        return find_device(device)  # which says what is wrong
    wanted = torch.device("cpu") if wanted.type == "cpu" else torch.device(wanted.type, wanted.index or 0)
    return wanted if wanted.type in ("cuda", "mps") and has_budget(wanted) else find_device(wanted)


def _same_device(first: Any, second: Any) -> bool:
    try:
        devices = {(device.type, device.index or 0) for device in (torch.device(first), torch.device(second))}
    except (RuntimeError, TypeError):
        return False
    return len(devices) == 1


MaxMemory = Mapping[int, int | str] | Mapping[str, int | str] | Mapping[int | str, int | str]
"""`{0: "8GiB", "cpu": "24GiB"}`: bytes of each device, as a number or a text."""


def parse_max_memory(max_memory: MaxMemory | None, device: torch.device) -> tuple[int | None, int | None]:
    """transformers' `{0: "8GiB", "cpu": "24GiB"}` into `(device bytes, host bytes)`; None where nothing was said."""
    if max_memory is None:
        return None, None
    if not isinstance(max_memory, Mapping):
        raise ConfigurationError(f'max_memory={max_memory!r} is no mapping; write {{0: "8GiB", "cpu": "24GiB"}}')
    budgets: dict[int | str, int] = {}
    for name, size in max_memory.items():
        if name == "disk":  # what accelerate may offload to: weights are read from there whatever it says
            continue
        place = _place(name)
        try:
            budgets[place] = parse_bytes(size)
        except ValueError as error:
            raise ConfigurationError(f"max_memory[{place!r}]: {error}") from error
    host = budgets.get("cpu")
    if device.type == "cpu" and host is None:
        warnings.warn(
            f'max_memory={dict(max_memory)!r} bounds no CPU, and the model runs there; add "cpu"', UserWarning, stacklevel=3
        )
    own = host if device.type == "cpu" else budgets.get(device.index or 0, budgets.get(device.type))
    return own, host


def _place(place: int | str | torch.device) -> int | str:
    """`0`, `"0"`, `"cuda:0"` and `torch.device("cuda:0")` are the first GPU; `"cpu"` and `"mps"` are themselves."""
    name = str(place).removeprefix("cuda:").removesuffix(":0")
    if name.isdigit():
        return int(name)
    if name not in ("cpu", "mps"):
        raise ConfigurationError(f'max_memory[{place!r}] names no place; write {{0: "8GiB", "cpu": "24GiB"}}')
    return name
