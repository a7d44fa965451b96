"""Splits a checkpoint into shards: plans on names, writes one shard at a time, resumes, and writes the manifest last.

While it runs, a journal next to the shards describes the source, so that an interrupted split that has already deleted
some of its originals can resume. The manifest replaces it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from rabbit_engine.architectures import Conversion, Target, find_layout
from rabbit_engine.checkpoints.compression import is_transposed, shape_to_encode
from rabbit_engine.checkpoints.formats import LazyTensor, SafetensorsTensor, TensorSource, are_equal, digest
from rabbit_engine.checkpoints.hub import require_room
from rabbit_engine.checkpoints.shard_encodings import Weight
from rabbit_engine.checkpoints.shards import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    ORIGIN_KEY,
    Journal,
    Manifest,
    ShardRecord,
    Stripe,
    finished_shard,
    is_shard,
    remove_journal,
    verify_shard,
    without_scratch,
    write_manifest,
    write_shard,
)
from rabbit_engine.checkpoints.skeleton import require_weights
from rabbit_engine.checkpoints.split_plan import (
    ShardPlan,
    Ties,
    files_done_after,
    peak_extra_bytes,
    plan_shards,
    settle_ties,
    stored_separately,
    tied_together,
)
from rabbit_engine.checkpoints.striping import ShardSet, striped
from rabbit_engine.errors import (
    DamagedShardError,
    MismatchedWeightsError,
    ShardsNotWritableError,
)
from rabbit_engine.quantization.storable import Storable
from rabbit_engine.quantization.stored import compressed
from rabbit_engine.storage.directio import is_file
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, aligned_bytes
from rabbit_engine.transformers_bridge.tied_weights import tied_weights
from rabbit_engine.utils.bar import Bar
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)

_CONVERTED_TOGETHER = 256 * 2**20
"""Bytes of weights that are in memory before they are compressed."""

DeleteOriginal = Callable[[Path], None]

Records = tuple[ShardRecord, ...]
"""Of one shard: that of its file in each folder."""


@contextmanager
def only_one_process(*folders: Path) -> Iterator[None]:
    """Hold the locks of shards folders, which are in order; they are released whenever the process ends. Raises
    ShardsNotWritableError."""
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(_only_one_process(folder))
        yield


@contextmanager
def _only_one_process(folder: Path) -> Iterator[None]:
    path = folder.with_name(f".{folder.name}.lock")
    if path.is_symlink():
        raise ShardsNotWritableError(f"{path} is a link to {path.resolve()}, and nothing is written through it: delete the link")
    lock = FileLock(path)
    try:
        _acquire(lock, folder)
    except OSError as error:
        raise ShardsNotWritableError(f"{path} cannot be locked ({error.strerror or error}): pass another saving path") from error
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, folder: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is splitting into %s: waiting for it", folder)
        lock.acquire()


@dataclass(slots=True)
class Split:
    """One split of one checkpoint, from the plan to the manifests of its `folders`, the first of which has the journal.

    `source` is the fingerprint of the originals in `originals`; `tensors` reads them, except those that `journal` lists
    as deleted. Weights in `encodings` are stored encoded. `delete` removes an original; None keeps them.
    """

    folders: tuple[Path, ...]
    originals: Path
    source: Mapping[str, Any]
    tensors: TensorSource
    conversion: Conversion
    dtype: torch.dtype
    encodings: Mapping[str, Storable] = field(default_factory=dict)
    journal: Journal | None = None
    delete: DeleteOriginal | None = None
    progress: bool = True
    _verified: set[str] = field(default_factory=set)
    _copied: Mapping[str, str] = field(default_factory=dict)
    """A weight that is stored but has no tensor of its own -> the weight that has its values."""

    @property
    def folder(self) -> Path:
        """The first of its folders."""
        return self.folders[0]

    @property
    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device."""
        return self.conversion.skeleton

    def run(self) -> Manifest:
        """Write the missing shards. Raises NotEnoughDiskError, MismatchedWeightsError or another CheckpointError."""
        targets = self.conversion.targets
        settled = self._settle_ties(targets)
        ties, self._copied = self._without_encoded(settled)
        plans = self._plan(targets, ties)
        journal = self._open_journal(settled)
        finished = {plan.name: whole for plan in plans if (whole := self._finished(plan))}
        self._require_originals(plans, frozenset(finished))
        self._require_room(plans, frozenset(finished))
        missing = sum(plan.file_bytes for plan in plans if plan.name not in finished)
        logger.info("writing %s into %s", format_bytes(missing), self.folder)
        records = self._write_all(plans, finished, journal)
        used = sorted({file for plan in plans for file in plan.files})
        manifest = self._finish(list(records.values()), ties, used, self.conversion.unused())
        self._delete_originals(files_done_after(plans)[plans[-1].name], plans, records, journal)
        return manifest

    def _settle_ties(self, targets: Mapping[str, Target | None]) -> Ties:
        if self.journal is not None:
            return self._ties_of(self.journal)
        key_of = {target.name: key for key, target in targets.items() if target is not None}

        def equal(first: str, second: str) -> bool:
            return are_equal(self.tensors.tensors[key_of[first]], self.tensors.tensors[key_of[second]])

        ties = settle_ties(tied_weights(self.skeleton), frozenset(key_of), equal)
        self.tensors.release()
        return ties

    def _without_encoded(self, ties: Ties) -> tuple[Ties, dict[str, str]]:
        """The ties of what is stored: an encoded head shares nothing. See `stored_separately`."""
        copied: dict[str, str] = {}
        for name in sorted(tied_together(tied_weights(self.skeleton)).keys() & self.encodings):
            ties, more = stored_separately(ties, name)
            copied |= more
        return ties, copied

    def _ties_of(self, journal: Journal) -> Ties:
        """The ties recorded when the split began. Raises DamagedShardError if the model does not tie these weights."""
        tied = tied_together(tied_weights(self.skeleton))
        strange = [name for name, stored in journal.shared.items() if stored not in tied.get(name, ())]
        strange += [name for name in journal.dropped if name not in journal.shared]
        if strange:
            raise DamagedShardError(
                f"{self.folder / JOURNAL_NAME} is damaged: {type(self.skeleton).__name__} does not tie {strange[0]} this way; "
                "pass another layer_shards_saving_path, or delete the folder and split again"
            )
        return Ties(journal.shared, frozenset(journal.dropped))

    def _plan(self, targets: Mapping[str, Target | None], ties: Ties) -> tuple[ShardPlan, ...]:
        layout = find_layout(self.skeleton)
        wanted = {key: target for key, target in targets.items() if target is not None and target.name not in ties.dropped}
        shard_of_key = {key: layout.shard_of(target.name) for key, target in wanted.items()}
        converted = {shard_of_key[key] for key, target in wanted.items() if target.converted}
        stored = {target.name for target in wanted.values()} | set(self._copied)
        copies = [
            (key, layout.shard_of(copy)) for copy, name in self._copied.items() for key in wanted if wanted[key].name == name
        ]
        unsure = {name for name in self.skeleton.state_dict() if layout.shard_of(name) in converted}
        self._require_all(stored | unsure, ties)
        sizes: dict[str, list[int]] = {}
        for name, tensor in self.skeleton.state_dict().items():
            sizes.setdefault(layout.shard_of(name), []).extend(self._stored_bytes(name, tensor))
        return plan_shards(
            layout.shard_names(),
            [*shard_of_key.items(), *copies],
            {key: files_of(self.tensors.tensors[key], self.originals) for key in wanted},
            {shard: aligned_bytes(found) for shard, found in sizes.items()},
        )

    def _stored_bytes(self, name: str, weight: torch.Tensor) -> list[int]:
        if name not in self.encodings:
            return [weight.numel() * weight.itemsize]
        parts = self.encodings[name].components(self.conversion.dtype_of(name), shape_to_encode(self.skeleton, name))
        return [part.nbytes for part in parts]

    def _require_all(self, stored: set[str], ties: Ties) -> None:
        require_weights(self.skeleton, stored, ties, self.originals)

    def _open_journal(self, ties: Ties) -> Journal:
        if self.journal is not None:
            return self.journal
        for folder in self.folders:
            without_scratch(folder)
        journal = Journal(
            self.source, dict(ties.shared), sorted(ties.dropped), journal_rows(self.tensors.tensors, self.originals), []
        )
        journal.write(self.folder)
        return journal

    def _require_originals(self, plans: tuple[ShardPlan, ...], finished: frozenset[str]) -> None:
        """Raise DamagedShardError for a damaged or missing shard whose originals were deleted."""
        for plan in plans:
            gone = next((file for file in sorted(plan.files) if not is_file(self.originals / file)), None)
            if plan.name not in finished and gone is not None:
                raise DamagedShardError(
                    f"{self._paths(plan)[0]} is damaged or missing, and so is {gone}, which it was made from: "
                    f"download the checkpoint again and delete {self.folder}"
                )

    def _require_room(self, plans: tuple[ShardPlan, ...], finished: frozenset[str]) -> None:
        gone = self.journal.deleted if self.journal else ()
        freed = {row["name"]: row["bytes"] for row in self.source["files"] if row["name"] not in gone} if self.delete else {}
        if len(self.folders) > 1:  # on other disks than most of what is deleted
            freed = {}
        share = -(-peak_extra_bytes(plans, finished, freed) // len(self.folders))
        disks = Counter(folder.stat().st_dev for folder in self.folders)
        for folder in self.folders:
            require_room(folder, share * disks[folder.stat().st_dev], f"splitting {self.originals.name}")

    def _write_all(self, plans: tuple[ShardPlan, ...], finished: Mapping[str, Records], journal: Journal) -> dict[str, Records]:
        done_after = files_done_after(plans)
        records: dict[str, Records] = {}
        total = sum(plan.file_bytes for plan in plans)
        with Bar(desc="Splitting", total=total, unit="B", unit_scale=True, disable=None if self.progress else True) as bar:
            for plan in plans:
                bar.set_postfix_str(plan.name)
                records[plan.name] = finished.get(plan.name) or self._write(plan)
                bar.update(plan.file_bytes)
                if plan is not plans[-1]:  # the last originals are deleted after the manifest is written
                    self._delete_originals(done_after[plan.name], plans, records, journal)
        return records

    def _finished(self, plan: ShardPlan) -> Records:
        """The records of a shard that is complete in all folders; else none."""
        found = [finished_shard(path, self._origin(plan, index)) for index, path in enumerate(self._paths(plan))]
        records = tuple(record for record in found if record is not None)
        return records if len(records) == len(found) else ()

    def _write(self, plan: ShardPlan) -> Records:
        try:
            weights = self._compressed(plan) if self.encodings else self.conversion.convert(plan.keys)
        except MismatchedWeightsError as error:
            files = ", ".join(str(self.originals / file) for file in sorted(plan.files))
            raise MismatchedWeightsError(f"{files}: {error}") from error
        records = []
        for index, (path, (part, said)) in enumerate(zip(self._paths(plan), striped(weights, len(self.folders)), strict=True)):
            records.append(write_shard(path, part, {**said, ORIGIN_KEY: self._origin(plan, index), "format": "pt"}))
        self.tensors.release()
        logger.debug("wrote %s", records[0].file)
        return tuple(records)

    def _compressed(self, plan: ShardPlan) -> dict[str, Weight]:
        """The weights of a shard; only a few are in memory in full at a time."""
        named_here = {source: copy for copy, source in self._copied.items() if copy.startswith(f"{plan.name}.")}
        found: dict[str, Weight] = {}
        for keys in self._batches(plan):
            for name, weight in self.conversion.convert(keys).items():
                name = named_here.get(name, name)
                found[name] = self._compress(name, weight)
        return found

    def _batches(self, plan: ShardPlan) -> Iterator[list[str]]:
        """The keys of weights of up to `_CONVERTED_TOGETHER` bytes, or of one larger weight. Calls of transformers cost time."""
        keys: dict[str, list[str]] = {}
        for key in plan.keys:
            target = self.conversion.targets[key]
            keys.setdefault(target.name if target else key, []).append(key)
        batch: list[str] = []
        state, size = self.skeleton.state_dict(), 0
        for name, some in keys.items():
            nbytes = state[name].nbytes if name in state else 0
            if batch and size + nbytes > _CONVERTED_TOGETHER:
                yield batch
                batch, size = [], 0
            batch = [*batch, *some]
            size += nbytes
        yield batch

    def _compress(self, name: str, weight: torch.Tensor) -> Weight:
        encoding = self.encodings.get(name)
        if encoding is None:
            return weight
        try:
            return compressed(weight.t() if is_transposed(self.skeleton, name) else weight, encoding)
        except ValueError as error:
            logger.warning("%s is not compressed: %s", name, error)
            return weight

    def _delete_originals(
        self, names: list[str], plans: tuple[ShardPlan, ...], records: Mapping[str, Records], journal: Journal
    ) -> None:
        if self.delete is None:
            return
        for name in names:
            if name not in journal.deleted:
                self._verify([records[plan.name] for plan in plans if name in plan.files])
                journal.deleted.append(name)
                if len(records) < len(plans):
                    journal.write(self.folder)  # before the deletion: a killed split must know that the file may be missing
            self.delete(self.originals / name)

    def _verify(self, shards: list[Records]) -> None:
        for records in shards:
            if records[0].name not in self._verified:
                for folder, record in zip(self.folders, records, strict=True):
                    verify_shard(folder, record)
                self._verified.add(records[0].name)

    def _finish(self, shards: Sequence[Records], ties: Ties, used: list[str], unused: list[str]) -> Manifest:
        source = {**self.source, "used": used, "deleted": self.delete is not None, "unused_weights": unused}
        dtype, ties_made = str(self.dtype).removeprefix("torch."), dict(ties.shared)
        count = len(self.folders)
        manifests = tuple(
            Manifest(dtype, source, ties_made, records, stripe=Stripe(index, count) if count > 1 else None)
            for index, records in enumerate(zip(*shards, strict=True))
        )
        self._require_all(set(ShardSet(self.folders, manifests).entries()), ties)
        if count > 1:
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)  # no moment has new manifests and old ones
        for folder, manifest in reversed(list(zip(self.folders, manifests, strict=True))):  # the first completes the split
            _remove_strangers(folder, manifest)
            write_manifest(folder, manifest)
        remove_journal(self.folder)
        return manifests[0]

    def _paths(self, plan: ShardPlan) -> list[Path]:
        """Its file in each folder."""
        return [folder / f"{plan.name}.safetensors" for folder in self.folders]

    def _origin(self, plan: ShardPlan, index: int) -> str:
        model = {name: list(t.shape) for name, t in self.skeleton.state_dict().items() if name.startswith(f"{plan.name}.")}
        made_from = {"source": self.source, "keys": plan.keys, "dtype": str(self.dtype), "model": model}
        kinds = {name: self.encodings[name].form for name in sorted(model.keys() & self.encodings)}
        stripe = {"stripe": [index, len(self.folders)]} if len(self.folders) > 1 else {}
        return digest({**made_from, **stripe, **({"encodings": kinds} if self.encodings else {})})


def _remove_strangers(folder: Path, manifest: Manifest) -> None:
    """Delete shards of an earlier split with another layout; files of other origin are kept."""
    known = {record.file for record in manifest.shards}
    for path in folder.glob("*.safetensors"):
        if path.name not in known and is_shard(path):
            path.unlink()


def file_of(tensor: LazyTensor, originals: Path) -> str:
    """The name of the original file that holds a tensor, relative to the folder."""
    return tensor.path.relative_to(originals).as_posix()


def files_of(tensor: LazyTensor, originals: Path) -> frozenset[str]:
    """The names of all files that it is stored in: a quantised weight may be stored in several."""
    places = tensor.entry.places if isinstance(tensor, SafetensorsTensor) else [tensor]
    return frozenset(place.path.relative_to(originals).as_posix() for place in places)


def journal_rows(tensors: Mapping[str, LazyTensor], originals: Path) -> list[tuple[str, str, str, list[int]]]:
    """Every tensor as a journal row: enough to plan with after its file is deleted."""
    return [(key, file_of(t, originals), DTYPE_NAMES[t.dtype], list(t.shape)) for key, t in tensors.items()]
