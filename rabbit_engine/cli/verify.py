"""`rabbit verify DIR_OR_MODEL`: read every shard, and every file of a checkpoint in place, and compare checksums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from rabbit_engine.cli import engine
from rabbit_engine.cli.loading import Revision
from rabbit_engine.errors import (
    CheckpointNotFoundError,
    DamagedShardError,
    HubUnreachableError,
    ShardsNotFoundError,
    UnreadableFileError,
)
from rabbit_engine.utils.bar import Bar
from rabbit_engine.utils.names import nearest_path, read_name

Result = TypeVar("Result")


@dataclass(slots=True)
class _Tally:
    """The number of files compared, and of those that differ."""

    compared: int = 0
    damaged: int = 0


def verify(
    target: Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A folder that contains shards, or a model.")],
    record: Annotated[bool, typer.Option("--record", help="Record the checksums of a folder's files as they are now.")] = False,
    revision: Revision = None,
) -> None:
    """Compare every byte of MODEL with its checksums; exit code 1 if a file differs or nothing could be compared.

    Shards are compared with their manifest, files of the Hub cache with the names of their blobs, and files of a plain
    folder with the sums that --record wrote.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    repo, root = _find(target, revision)
    if record:
        if repo is None or repo.commit is not None:
            raise ShardsNotFoundError(f"{target} is not a plain folder with a checkpoint: cannot record checksums")
        path = _with_bar(repo, lambda on_bytes: engine.checkpoints.record_sums(repo, on_bytes))
        print(f"recorded {len(engine.checkpoints.checked_files(repo))} files in {path}")
        return
    tally = _Tally()
    for folder in _splits(root, repo):
        _verify_split(folder, console, tally)
    if repo is not None:
        _verify_originals(repo, target, console, tally)
    if tally.damaged or not tally.compared:
        raise typer.Exit(1)


def _find(target: str, revision: str | None) -> tuple[engine.checkpoints.Repo | None, Path]:
    """The checkpoint, if there is one, and the folder that contains its splits."""
    path = Path(target).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        folder = path.parent.resolve()
        return engine.checkpoints.Repo(str(path), folder, (path.name,)), folder / engine.checkpoints.SHARDS_FOLDER
    target = read_name(target).name
    path = Path(target).expanduser()
    try:
        repo = engine.checkpoints.find_repo(target, engine.config.SourceConfig(local_files_only=True, revision=revision))
    except HubUnreachableError as error:  # offline on purpose
        at = f" at revision {revision}" if revision else ""
        nearest = nearest_path(path)
        raise CheckpointNotFoundError(
            f"cannot find {target}{at} on this machine: it is neither a folder nor in the Hub cache{nearest}"
        ) from error
    if path.is_dir():
        own = any(name.endswith((".safetensors", ".bin", ".gguf")) for name in repo.names) and not _is_split(path)
        return (repo if own else None), path
    return repo, repo.folder.parent.parent / engine.checkpoints.SHARDS_FOLDER


def _is_split(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and not (folder / "config.json").is_file()


def _splits(root: Path, repo: engine.checkpoints.Repo | None) -> list[Path]:
    """The splits; required if there is no checkpoint."""
    try:
        return engine.checkpoints.find_splits(root)
    except ShardsNotFoundError:
        if repo is None:
            raise
        return []


def _verify_split(folder: Path, console: Console, tally: _Tally) -> None:
    manifest = engine.checkpoints.read_manifest(folder)
    assert manifest is not None  # noqa: S101 - find_splits lists folders that hold one
    damaged = 0
    for shard in manifest.shards:
        try:
            engine.checkpoints.verify_shard(folder, shard, manifest)
        except (DamagedShardError, UnreadableFileError) as error:
            damaged += 1
            console.print(f"damaged: {error}", markup=False)
    tally.compared += len(manifest.shards)
    tally.damaged += damaged
    print(f"{folder}: {len(manifest.shards) - damaged} of {len(manifest.shards)} shards are whole")


def _verify_originals(repo: engine.checkpoints.Repo, target: str, console: Console, tally: _Tally) -> None:
    states = _with_bar(repo, lambda on_bytes: list(engine.checkpoints.compare_files(repo, on_bytes)))
    for state in states:
        if state.state == "damaged":
            console.print(f"damaged: {state.said}", markup=False)
    damaged = sum(state.state == "damaged" for state in states)
    compared = [state for state in states if state.state != "unrecorded"]
    tally.compared += len(compared)
    tally.damaged += damaged
    if compared:
        print(f"{repo.folder}: {len(compared) - damaged} of {len(compared)} files are whole")
    missing = [state.path.name for state in states if state.state == "unrecorded"]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        names = ", ".join(missing[:3]) + more
        console.print(f"unrecorded: {names}; `rabbit verify --record {target}` records their sums as they are now", markup=False)


def _with_bar(repo: engine.checkpoints.Repo, work: Callable[[Callable[[int], object]], Result]) -> Result:
    total = sum((repo.folder / name).stat().st_size for name in engine.checkpoints.checked_files(repo))
    with Bar(desc="Verifying", total=total, unit="B", unit_scale=True, disable=None) as bar:
        return work(bar.update)
