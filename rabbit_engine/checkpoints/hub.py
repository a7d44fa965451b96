"""Resolves a repo id or a folder to a local folder through huggingface_hub, downloading only the files that are needed."""

from __future__ import annotations

import errno
import os.path
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rabbit_engine.config import SourceConfig
from rabbit_engine.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    GatedCheckpointError,
    HubUnreachableError,
    NotEnoughDiskError,
    RabbitError,
    first_line,
)
from rabbit_engine.storage.directio import disk_errors, is_file
from rabbit_engine.storage.jsonvalues import file_name
from rabbit_engine.storage.tensorfiles import TORCH_DTYPES, TensorEntry
from rabbit_engine.utils.names import nearest_path
from rabbit_engine.utils.sizes import format_bytes

HTTPError: type[Exception] = vars(hub_errors)["HTTPError"]
"""The error class of the HTTP library that huggingface_hub uses."""

_READ_AS_TEXT = ["modeling_baichuan.py", "modeling_chatglm.py", "tokenization_chatglm.py"]
"""Code that identifies the version of its family; it is never run."""

_STEPS = [f"[0-9]_{kind}/{file}" for kind in ("Dense", "LayerNorm") for file in ("model.safetensors", "pytorch_model.bin")]
"""Weights of sentence-transformers' steps after pooling."""

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", *_READ_AS_TEXT, *_STEPS]
_NOT_WANTED = ["original/*", "onnx/*", "openvino/*", "runs/*", "checkpoint-*"]


@dataclass(frozen=True, slots=True)
class Repo:
    """A checkpoint's folder on this machine and the names of all its files in it, fetched or not.

    `commit` is None for a local folder; `subfolder` is the part of the repo that `folder` is. If the Hub was not asked,
    `only_cached` is true and `names` are the files fetched earlier.
    """

    name: str
    folder: Path
    names: tuple[str, ...]
    commit: str | None = None
    only_cached: bool = False
    subfolder: str = ""

    @property
    def cache(self) -> Path:
        """The repo's folder in the Hub cache, which holds all its commits."""
        return self.folder.parents[1 + len(Path(self.subfolder).parts)]

    def path_in_repo(self, name: str) -> str:
        """The path of one of the folder's files within the repo."""
        return (Path(self.subfolder) / name).as_posix()

    def read_text(self, name: str) -> str:
        """A small file's text. Raises MissingFileError, UnreadableFileError, and ValueError if it is not UTF-8."""
        with disk_errors(self.folder / name):
            return (self.folder / name).read_text(encoding="utf-8")


def find_repo(name: str | Path, source: SourceConfig) -> Repo:
    """The folder itself, or the repo's small files (config, tokenizer, index) fetched into the Hub cache.

    Raises CheckpointNotFoundError, GatedCheckpointError or HubUnreachableError.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    if os.path.isdir(path):  # noqa: PTH112 - and for a name that is too long
        folder = path / source.subfolder
        if not folder.is_dir():
            raise CheckpointNotFoundError(f"{path} has no subfolder {source.subfolder!r}{nearest_path(folder)}")
        return Repo(str(name), folder.resolve(), _local_names(folder, source.gguf_file))
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise CheckpointNotFoundError(f"{name} does not exist here, and is not a repo id (organisation/name){nearest_path(path)}")
    with _own_errors(str(name), source):
        return _find_cached(str(name), source) if _offline(source) else _find_online(str(name), source)


def _local_names(folder: Path, gguf_file: str | None) -> tuple[str, ...]:
    """The files directly in the folder; a GGUF file may be in a folder below."""
    with disk_errors(folder):
        names = {path.name for path in folder.iterdir() if path.is_file()}
    if gguf_file is not None and (folder / gguf_file).is_file():
        names.add(gguf_file)
    return tuple(sorted(names))


def _offline(source: SourceConfig) -> bool:
    return source.local_files_only or constants.HF_HUB_OFFLINE


def _switch() -> str:
    """The setting that turns downloads off."""
    return "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "local_files_only"


def _find_online(name: str, source: SourceConfig) -> Repo:
    try:
        info = HfApi().model_info(name, revision=source.revision, token=source.token, timeout=20)
    except (RepositoryNotFoundError, RevisionNotFoundError, LocalTokenNotFoundError):
        raise
    except (HTTPError, OSError) as error:  # no network, or the Hub fails: try the cache
        try:
            return _find_cached(name, source)
        except LocalEntryNotFoundError:
            raise HubUnreachableError(
                f"{name}: the Hub does not answer ({type(error).__name__}) and it is not in the cache; is the network up?"
            ) from error
    wanted = _SMALL_FILES + (["*.py"] if source.trust_remote_code else [])
    folder = _download(name, source.revision, wanted, source)  # by branch name, so that the cache can resolve it offline
    return _part(name, folder, [file.rfilename for file in info.siblings or ()], source.subfolder)


def _part(name: str, snapshot: Path, names: Sequence[str], subfolder: str) -> Repo:
    """The repo, or the requested subfolder. Raises CheckpointNotFoundError."""
    inside = Path(subfolder)
    found = sorted(Path(file).relative_to(inside).as_posix() for file in names if Path(file).is_relative_to(inside))
    if not found:
        folders = {Path(file).parent.as_posix() for file in names} - {"."}
        raise CheckpointNotFoundError(f"{name} has no subfolder {subfolder!r}; it has {', '.join(sorted(folders)) or 'none'}")
    return Repo(name, snapshot / inside, tuple(found), snapshot.name, subfolder=inside.as_posix() if subfolder else "")


def _find_cached(name: str, source: SourceConfig) -> Repo:
    root = _cache(source) / f"models--{name.replace('/', '--')}"
    revision = source.revision or "main"
    commit = _cached_commit(root / "refs" / revision) or revision
    folder = root / "snapshots" / commit
    if not folder.is_dir():
        raise LocalEntryNotFoundError(f"{name} at {revision} is not in {root.parent}")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return replace(_part(name, folder, names, source.subfolder), only_cached=True)


def _cached_commit(reference: Path) -> str | None:
    """The commit of a branch in the cache, or None. Raises DamagedCheckpointError."""
    if not reference.is_file():
        return None
    try:
        with disk_errors(reference):
            return file_name(reference.read_text(encoding="utf-8").strip())
    except ValueError as error:
        raise DamagedCheckpointError(
            f"{reference} does not name a commit ({first_line(error)}): delete it and load the model again"
        ) from error


def _cache(source: SourceConfig) -> Path:
    """The Hub cache as an absolute path: a program may change its working directory after loading."""
    return Path(source.cache_dir or constants.HF_HUB_CACHE).absolute()


def fetch_weights(repo: Repo, names: Sequence[str], source: SourceConfig) -> None:
    """Fetch the weight files that are not in the cache yet; disk space is checked before the first byte.

    Raises NotEnoughDiskError, GatedCheckpointError, HubUnreachableError or CheckpointNotFoundError.
    """
    if repo.commit is None or (not source.force_download and all(is_file(repo.folder / name) for name in names)):
        return
    if _offline(source):
        raise weights_not_cached(repo)
    with _own_errors(repo.name, source):
        _check_room(repo, names, source)
        _download(repo.name, repo.commit, [repo.path_in_repo(name) for name in names], source)


def weights_not_cached(repo: Repo) -> HubUnreachableError:
    """The error for a repo whose small files are in the cache, but not its weights."""
    return HubUnreachableError(
        f"the weights of {repo.name} are not in the cache, and downloads are off ({_switch()}) or the Hub "
        f"does not answer: allow downloads once; its other files are in {repo.folder}"
    )


def read_remote_headers(repo: Repo, names: Sequence[str], source: SourceConfig) -> list[TensorEntry]:
    """The tensors of a repo's safetensors files, from their headers, which are fetched with range requests.

    Offsets count from the start of each file's data: the Hub client does not return the header's length. Raises
    GatedCheckpointError, HubUnreachableError, CheckpointNotFoundError.
    """
    if _offline(source):
        raise HubUnreachableError(f"{repo.name}: its headers are on the Hub, and downloads are off ({_switch()})")
    api = HfApi()

    def read(name: str) -> list[TensorEntry]:
        found = api.parse_safetensors_file_metadata(repo.name, repo.path_in_repo(name), revision=repo.commit, token=source.token)
        return [
            TensorEntry(
                key,
                repo.folder / name,
                row.data_offsets[0],
                row.data_offsets[1] - row.data_offsets[0],
                TORCH_DTYPES[row.dtype],
                tuple(row.shape),
            )
            for key, row in found.tensors.items()
        ]

    with _own_errors(repo.name, source), ThreadPoolExecutor(8) as pool:
        return [entry for entries in pool.map(read, names) for entry in entries]


def _check_room(repo: Repo, names: Sequence[str], source: SourceConfig) -> None:
    planned = snapshot_download(
        repo.name,
        revision=repo.commit,
        cache_dir=_cache(source),
        token=source.token,
        allow_patterns=[repo.path_in_repo(name) for name in names],
        force_download=source.force_download,
        dry_run=True,
    )
    needed = sum(file.file_size or 0 for file in planned if file.will_download)
    require_room(_cache(source), needed, f"downloading {repo.name}")


def require_room(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise NotEnoughDiskError if the disk of `folder` has less free space than `needed_bytes`."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise NotEnoughDiskError(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}, {format_bytes(free)} are free: "
            "free some, or pass another folder (layer_shards_saving_path=, cache_dir=), or delete_original=True"
        )


def _download(name: str, revision: str | None, patterns: list[str], source: SourceConfig) -> Path:
    folder = snapshot_download(
        name,
        revision=revision,
        cache_dir=_cache(source),
        token=source.token,
        local_files_only=_offline(source),
        allow_patterns=patterns,
        ignore_patterns=[pattern for pattern in _NOT_WANTED if not fnmatchcase(f"{source.subfolder}/", pattern)],
        force_download=source.force_download and not _offline(source),
    )
    return Path(folder)


@contextmanager
def _own_errors(name: str, source: SourceConfig) -> Iterator[None]:
    """Raise huggingface_hub's errors as this library's: what happened, and what to do."""
    try:
        yield
    except RabbitError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, LocalTokenNotFoundError) as error:
        raise _refusal(error, name, source) from error
    except (HTTPError, OSError) as error:
        raise _failure(error, name, source) from error


def _refusal(error: Exception, name: str, source: SourceConfig) -> CheckpointError:
    """The error for a request that the Hub refuses."""
    if isinstance(error, GatedRepoError):
        given = "" if source.token is None else " (the given token has no access)"
        return GatedCheckpointError(
            f'{name} is gated: accept its licence on its page, then pass token="hf_..." or set HF_TOKEN{given}'
        )
    if isinstance(error, LocalTokenNotFoundError):
        return GatedCheckpointError(f"{name}: token=True, but no token is saved: run `hf auth login`, or pass token=")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointNotFoundError(f"{name} has no revision {source.revision!r}")
    if isinstance(error, HFValidationError):
        return CheckpointNotFoundError(
            f"{name} is neither a folder on this machine nor a repo id ({first_line(error)}){nearest_path(Path(name))}"
        )
    return CheckpointNotFoundError(
        f"{name} is neither a folder on this machine nor a repo that this token can see: check the spelling, or "
        f"give token= for a private one{nearest_path(Path(name))}"
    )


def _failure(error: Exception, name: str, source: SourceConfig) -> RabbitError:
    """The error for a failure of the Hub, the network or the disk."""
    if getattr(error, "errno", None) == errno.ENOSPC:
        return NotEnoughDiskError(f"the disk filled up while downloading {name}: free some space and run it again to resume")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled) and _offline(source):
        revision = f" at revision {source.revision!r}" if source.revision else ""
        return HubUnreachableError(
            f"{name}{revision} is not in the cache, and downloads are off ({_switch()}): allow them once"
            f"{nearest_path(Path(name))}"
        )
    return HubUnreachableError(f"{name}: the Hub failed ({first_line(error)}); try again")


def delete_original(path: Path, repo: Repo) -> None:
    """Delete a weight file of the repo's own folder; in the Hub cache its blob too, unless another revision still links to it.

    Raises DamagedCheckpointError for a path outside the folder. The target of a user's own link is kept.
    """
    folder = repo.folder.resolve()
    if ".." in path.parts or not path.parent.resolve().is_relative_to(folder):
        raise DamagedCheckpointError(f"{path} is not in {folder}: nothing outside it is deleted; do not use this checkpoint")
    blob = path.resolve()
    path.unlink(missing_ok=True)
    cache = repo.cache.resolve()
    if repo.commit is not None and blob.parent == cache / "blobs" and not _linked(blob, cache / "snapshots"):
        blob.unlink(missing_ok=True)


def _linked(blob: Path, snapshots: Path) -> bool:
    return any(link.is_symlink() and link.resolve() == blob for link in snapshots.rglob("*"))
