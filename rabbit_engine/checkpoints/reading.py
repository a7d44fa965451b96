"""How a resolution reads weight files: loading fetches and opens them, a plan reads only headers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rabbit_engine.checkpoints.formats import SafetensorsTensor, TensorSource, WeightFiles, check_present, open_tensors
from rabbit_engine.checkpoints.hub import Repo, fetch_weights, read_remote_headers
from rabbit_engine.config import SourceConfig
from rabbit_engine.errors import ConfigurationError, DamagedCheckpointError
from rabbit_engine.storage.directio import damage_as
from rabbit_engine.storage.tensorfiles import TensorEntry, is_tied, same_bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """`open` returns the unread tensors of weight files; `equal` compares two stored tensors.

    With `headers_only` no weight file is downloaded, and offsets in remote files count from the start of their data: such
    tensors cannot be read.
    """

    open: Callable[[Repo, WeightFiles, SourceConfig], TensorSource]
    equal: Callable[[TensorEntry, TensorEntry], bool]
    headers_only: bool


def _fetch_tensors(repo: Repo, files: WeightFiles, source: SourceConfig) -> TensorSource:
    """Fetch the files that are not here yet, and open them."""
    fetch_weights(repo, files.names, source)
    check_present(repo.folder, files)
    return open_tensors(repo.folder, files)


@damage_as(DamagedCheckpointError)
def _equal_in_files(first: TensorEntry, second: TensorEntry) -> bool:
    if first.is_absent or second.is_absent:
        return is_tied(first, second)
    return same_bytes(first, second)


def _read_headers(repo: Repo, files: WeightFiles, source: SourceConfig) -> TensorSource:
    """The headers of safetensors files, here or on the Hub; the tensors of local pickles."""
    if all((repo.folder / name).is_file() for name in files.names):
        return open_tensors(repo.folder, files)
    if repo.commit is None:
        check_present(repo.folder, files)
    if files.format != "safetensors":
        raise ConfigurationError(f"{repo.name} holds pickles and its config names no dtype: pass dtype=")
    entries = read_remote_headers(repo, files.names, source)
    return TensorSource({entry.name: SafetensorsTensor(entry) for entry in entries})


def _taken_as_equal(first: TensorEntry, second: TensorEntry) -> bool:
    """Assume that stored copies of a tied weight are equal: only reading them tells, and they hardly ever differ."""
    return first.shape == second.shape


WHOLE_FILES = Reading(_fetch_tensors, _equal_in_files, headers_only=False)
HEADERS_ONLY = Reading(_read_headers, _taken_as_equal, headers_only=True)
