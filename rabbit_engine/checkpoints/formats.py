"""A local checkpoint's weight files as lazily read, named tensors: safetensors and PyTorch pickles; GGUF files by name."""

from __future__ import annotations

import errno
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import xxhash

from rabbit_engine.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    MissingFileError,
    RabbitError,
    UnsafePickleError,
    first_line,
)
from rabbit_engine.storage.directio import damage_as, disk_errors, is_file, open_unchanged, stamp_of, unreadable
from rabbit_engine.storage.jsonvalues import Fields, OutsideError, file_name, parse, shown
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, TensorEntry, advice_for, read_header, read_tensor, same_bytes
from rabbit_engine.utils.foreign import foreign_code

Format = Literal["safetensors", "bin", "gguf"]

_CANDIDATES: tuple[tuple[str, Format], ...] = (
    ("model.safetensors", "safetensors"),
    ("model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "bin"),
    ("pytorch_model.bin.index.json", "bin"),
)
_NAMES = tuple(name for name, _ in _CANDIDATES)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The names of a checkpoint's weight files, sorted; `index` is the file that lists them, or None.

    `dtype` is the dtype in the index's metadata.
    """

    format: Format
    names: tuple[str, ...]
    index: str | None = None
    dtype: str | None = None


class LazyTensor(Protocol):
    """A tensor that transformers' loading reads with `tensor[...]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""

    @property
    def path(self) -> Path:
        """The file that holds it."""

    def __getitem__(self, index: object) -> torch.Tensor:
        """Read it; the only index used is `...`."""


def find_weight_files(
    names: Iterable[str],
    read_text: Callable[[str], str],
    gguf_file: str | None,
    where: str,
    *,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> WeightFiles:
    """Choose the weight files among a folder's or repo's file names, as transformers does: safetensors before pickles.

    `use_safetensors` selects one kind; a `variant` is part of the names, as in `model.fp16.safetensors`.
    Raises CheckpointNotFoundError, which lists the files, and DamagedCheckpointError for an index that cannot be read.
    """
    present = set(names)
    if gguf_file is not None:
        if gguf_file not in present:
            raise CheckpointNotFoundError(
                f"{where} has no {gguf_file}; it has {listed(n for n in present if n.endswith('.gguf'))}"
            )
        return WeightFiles("gguf", (gguf_file,))
    candidates = [
        (_of_variant(name, variant), kind)
        for name, kind in _CANDIDATES
        if use_safetensors is None or use_safetensors == (kind == "safetensors")
    ]
    for name, kind in candidates:
        if name in present:
            return _from_index(name, kind, read_text, where) if name.endswith(".json") else WeightFiles(kind, (name,))
    raise CheckpointNotFoundError(_nothing_to_load(present, where, [name for name, _ in candidates]))


def _of_variant(name: str, variant: str | None) -> str:
    """`model.safetensors` is `model.fp16.safetensors` in the variant fp16."""
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


_IN_VARIANT = re.compile(r"(?:model|pytorch_model)(?:\.safetensors\.index|\.bin\.index)?\.([^.]+)\.(?:safetensors|bin|json)")


def _variants(present: set[str]) -> list[str]:
    found = {match[1] for name in present if (match := _IN_VARIANT.fullmatch(name))}
    return sorted(found - {"safetensors", "bin", "index"})


def _from_index(name: str, kind: Format, read_text: Callable[[str], str], where: str) -> WeightFiles:
    try:
        index = Fields.of(parse(read_text(name)))
        files = {file_name(file) for file in index.fields("weight_map").values.values()}
        metadata = Fields.of(index.values.get("metadata") or {}, "metadata")
        if not files:
            raise ValueError("weight_map is empty")
        return WeightFiles(kind, tuple(sorted(files)), name, metadata.optional_text("dtype"))
    except OutsideError as error:
        raise DamagedCheckpointError(
            f"{where}/{name} names files outside its folder: {error}; do not use this checkpoint"
        ) from error
    except (ValueError, OSError) as error:
        raise DamagedCheckpointError(f"{where}/{name} cannot be read ({first_line(error)}): download it again") from error


def _nothing_to_load(present: set[str], where: str, wanted: Sequence[str] = _NAMES) -> str:
    if "adapter_config.json" in present:
        return f"{where} is an adapter: load its base model, then call model.load_adapter({where!r})"
    ggufs = [name for name in present if name.endswith(".gguf")]
    if ggufs:
        return f"{where} has several GGUF files: choose with gguf_file=, one of {listed(ggufs)}"
    variants = _variants(present)
    hint = f"; its variants, for variant=: {listed(variants)}" if variants else ""
    return f"{where} has none of {', '.join(wanted)}; it has {listed(present)}{hint}"


def require_one_gguf(names: Iterable[str], where: str) -> None:
    """Raise CheckpointNotFoundError for a folder of several GGUF files and neither config nor other weights."""
    present = set(names)
    if "config.json" not in present and any(name.endswith(".gguf") for name in present) and only_gguf(present) is None:
        raise CheckpointNotFoundError(_nothing_to_load(present, where))


def listed(names: Iterable[str], most: int = 12) -> str:
    """File names for an error message."""
    found = sorted(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "") if found else "nothing"


def only_gguf(names: Iterable[str]) -> str | None:
    """The one GGUF file of a folder that has no other weights, or None."""
    present = set(names)
    ggufs = [name for name in present if name.endswith(".gguf")]
    return ggufs[0] if len(ggufs) == 1 and not present.intersection(name for name, _ in _CANDIDATES) else None


def check_present(folder: Path, files: WeightFiles) -> None:
    """Raise MissingFileError for a file that the index names and the folder lacks."""
    for name in files.names:
        if not is_file(folder / name):
            raise MissingFileError(f"{folder / name} is missing, {files.index or 'the checkpoint'} lists it: download it again")


def fingerprint(folder: Path, files: WeightFiles, commit: str | None) -> dict[str, Any]:
    """What identifies a source: names, sizes, safetensors headers, and the commit or the change times."""
    rows = [file_row(folder, name, files.format, commit) for name in files.names]
    return {"format": files.format, "commit": commit, "files": rows}


@damage_as(DamagedCheckpointError)
def file_row(folder: Path, name: str, kind: Format, commit: str | None) -> dict[str, Any]:
    """One file's part of a fingerprint; `name` is relative to `folder`."""
    with disk_errors(folder / name):
        status = (folder / name).stat()
    row: dict[str, Any] = {"name": name, "bytes": status.st_size}
    if kind == "safetensors":
        row["header_xxh3_128"] = read_header(folder / name).checksum
    if commit is None:
        row["mtime_ns"] = status.st_mtime_ns
    return row


def changed_files(folder: Path, source: Mapping[str, Any]) -> list[str]:
    """Names of the files of `folder` that differ from the fingerprint `source`; deleted files count as unchanged."""
    rows = {row["name"]: row for row in source["files"]}
    present = [name for name in rows if is_file(folder / name)]
    return [name for name in present if file_row(folder, name, source["format"], source["commit"]) != rows[name]]


def digest(value: Mapping[str, Any]) -> str:
    """A short hash of a fingerprint."""
    return xxhash.xxh3_64_hexdigest(json.dumps(value, sort_keys=True).encode())


class _Named:
    """The interface of an unread tensor that transformers' quantisers use."""

    __slots__ = ()

    def get_dtype(self: LazyTensor) -> str:
        """Its dtype as safetensors names it, such as "BF16"."""
        return DTYPE_NAMES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsTensor(_Named):
    """One tensor of a safetensors file."""

    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, from the header."""
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype, from the header."""
        return self.entry.dtype

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.entry.path

    @damage_as(DamagedCheckpointError)
    def __getitem__(self, _: object) -> torch.Tensor:
        return read_tensor(self.entry)


@damage_as(DamagedCheckpointError)
def are_equal(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two stored tensors hold the same values; safetensors are compared in pieces."""
    if isinstance(first, SafetensorsTensor) and isinstance(second, SafetensorsTensor):
        return same_bytes(first.entry, second.entry)
    return torch.equal(first[...], second[...])


@dataclass(slots=True)
class PickleFile:
    """A `pytorch_model*.bin`, loaded weights-only, mapped if its format allows, and kept until `release()`."""

    path: Path
    _loaded: dict[str, torch.Tensor] | None = None
    _mapped: bool = field(default=True)
    _stamp: tuple[int, int] | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name. Raises UnsafePickleError, DamagedCheckpointError."""
        if self._loaded is None:
            self._loaded = {k: v for k, v in self._load().items() if isinstance(v, torch.Tensor)}
            for name, tensor in self._loaded.items():
                _require_plain(self.path, name, tensor)
        return self._loaded

    @damage_as(DamagedCheckpointError)
    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its own memory: a mapped file that another process truncates would kill this one."""
        tensor = self.tensors()[name]
        if not self._mapped:
            return tensor
        open_unchanged(self.path, self._stamp).close()
        return tensor.clone()

    @damage_as(DamagedCheckpointError)
    def _load(self) -> dict[str, Any]:
        with open_unchanged(self.path, self._stamp) as file:  # check that it can be read
            self._stamp = stamp_of(file)
        with foreign_code(partial(_load_error, self.path)):
            _check_members(self.path)
            loaded = self._unpickle()
        if not isinstance(loaded, dict):
            raise DamagedCheckpointError(f"{self.path} holds a {type(loaded).__name__}, not named tensors")
        strange = next((key for key in loaded if not isinstance(key, str)), None)
        if strange is not None:
            raise DamagedCheckpointError(f"{self.path} holds an item named {shown(strange)}, but names must be strings")
        return loaded

    def _unpickle(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except RuntimeError as error:
            if not self._mapped or "mmap" not in str(error):
                raise
        self._mapped = False  # files from before torch 1.6 cannot be mapped
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def release(self) -> None:
        """Unmap the file; one that could not be mapped stays loaded, as reading it again for each layer would cost more."""
        if self._mapped:
            self._loaded = None


def _check_members(path: Path) -> None:
    """Raise BadZipFile if the archive's directory does not point to its members, which torch does not check in a mapped file:
    tensors would be read from other bytes."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            archive.open(member).close()


def _require_plain(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raise DamagedCheckpointError for a tensor that is not a plain array of numbers."""
    kind = str(tensor.layout) if tensor.layout != torch.strided else str(tensor.dtype)
    if tensor.is_meta:
        raise DamagedCheckpointError(f"{path} holds only the shape of {name}, not its values: save the weights themselves")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in DTYPE_NAMES:
        raise DamagedCheckpointError(f"{path} holds {name} as {kind}: save plain tensors")


@damage_as(DamagedCheckpointError)
def _pickle_error(path: Path, error: pickle.UnpicklingError) -> RabbitError:
    with open_unchanged(path, None) as file, disk_errors(path):
        is_pickle = file.read(2).startswith((b"\x80", b"PK"))  # protocol 2 and newer, or torch's zip around one
    if is_pickle and "Unsupported" in str(error):
        return UnsafePickleError(
            f"{path} contains more than tensors and was not loaded ({_reason(error)}): "
            "use the repository's safetensors files, or convert it on a disposable machine"
        )
    return DamagedCheckpointError(f"{path} is not a complete PyTorch file ({_reason(error)}): {advice_for(path)}")


def _load_error(path: Path, error: Exception) -> RabbitError:
    """The error of a failed load: EINVAL comes from bad offsets in a damaged file, other OSErrors from the disk."""
    if isinstance(error, pickle.UnpicklingError):
        return _pickle_error(path, error)
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return unreadable(path, error)
    return DamagedCheckpointError(f"{path} is not a complete PyTorch file ({first_line(error)}): {advice_for(path)}")


def _reason(error: pickle.UnpicklingError) -> str:
    """The line of torch's long message that names what it found."""
    return next((line.strip() for line in str(error).splitlines() if "Unsupported" in line), first_line(error))


@dataclass(frozen=True, slots=True)
class PickleTensor(_Named):
    """One tensor of a pickle."""

    file: PickleFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def path(self) -> Path:
        """The file that holds it."""
        return self.file.path

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.file.read(self.name)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file, as transformers reads it: `inner` holds blocks or values, `shape` is its shape."""

    inner: Any
    path: Path
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.uint8

    def __getitem__(self, index: object) -> torch.Tensor:
        return self.inner[index]  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Every tensor of a checkpoint by its stored name, unread; call `release()` between shards."""

    tensors: Mapping[str, LazyTensor]
    pickles: tuple[PickleFile, ...] = ()

    def release(self) -> None:
        """Unmap the files that were read."""
        for file in self.pickles:
            file.release()


@damage_as(DamagedCheckpointError)
def open_tensors(folder: Path, files: WeightFiles) -> TensorSource:
    """The tensors of a safetensors or pickle checkpoint. Raises CheckpointError."""
    paths = [folder / name for name in files.names]
    if files.format == "safetensors":
        entries = [entry for path in paths for entry in read_header(path).tensors]
        return TensorSource({entry.name: SafetensorsTensor(entry) for entry in entries})
    pickles = tuple(PickleFile(path) for path in paths)
    tensors: dict[str, LazyTensor] = {}
    for file in pickles:
        tensors.update({name: PickleTensor(file, name, tuple(t.shape), t.dtype) for name, t in file.tensors().items()})
        file.release()
    return TensorSource(tensors, pickles)


def first_floating_dtype(source: TensorSource, files: WeightFiles, folder: Path) -> torch.dtype:
    """The dtype of a checkpoint whose config names none, as transformers derives it.

    It is the dtype in the index's metadata, else that of the first floating-point tensor of the first file: by name in
    safetensors files, in stored order in pickles. A model may not be able to run in it. Raises DamagedCheckpointError.
    """
    if files.dtype is not None:
        found = getattr(torch, files.dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise DamagedCheckpointError(
                f"{files.index} names a dtype that torch does not know, {shown(files.dtype)}: pass dtype="
            )
        return found
    first = [(key, tensor.dtype) for key, tensor in source.tensors.items() if tensor.path == folder / files.names[0]]
    if files.format == "safetensors":
        first.sort(key=lambda row: row[0])
    plain = (dtype for _, dtype in first if dtype.is_floating_point and dtype.itemsize > 1)
    return next(plain, first[0][1] if first else torch.float32)
