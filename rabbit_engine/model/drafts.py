"""Models as drafts: loads named ones whole into memory, before the plan of the model they guess for is made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rabbit_engine.checkpoints import HEADERS_ONLY, Shards, open_request, resolve
from rabbit_engine.config import CompressionConfig, SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.decoding import Draft, Heads, claimed_bytes
from rabbit_engine.errors import BudgetError, DraftError, RabbitError
from rabbit_engine.model.assembly import Assembly, assemble
from rabbit_engine.model.heads import forecast_heads, load_heads
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.planning.budget import budget_for
from rabbit_engine.planning.decide import find_free_memory, plan_for
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan
from rabbit_engine.transformers_bridge.multi_token import can_run_heads, heads_in
from rabbit_engine.utils.sizes import format_bytes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

Load = Callable[..., Any]
"""`model.loading.load`: from a name, settings and a function that assembles, to a streamed model."""


@dataclass(frozen=True, slots=True)
class DraftLoader:
    """Loads drafts for the model `target` that is loaded with `settings`.

    Drafts take of the target's budget before it `is_planned`, later of the memory that is free.
    """

    target: str
    settings: LoadSettings
    load: Load
    is_planned: bool = False
    _loaded: list[Any] = field(default_factory=list)

    def __call__(self, name: str | Path | None, compression: str | None) -> PreTrainedModel:
        """A model whole in the memory of the target's device; None names the target's own checkpoint. Raises DraftError."""
        place, settings = self._found(name, compression)
        logger.info("loading %s as a draft for %s", place, self.target)
        with self._loading(name, compression):
            found: PreTrainedModel = self.load(place, settings, partial(assemble, decide=partial(plan_whole, place)))
        self._loaded.append(found)
        return found

    def load_heads(self) -> Heads:
        """The target's multi-token heads. Raises DraftError."""
        found = load_heads(self.target, self.settings)
        self._loaded.append(found)
        return found

    def has_heads(self) -> bool:
        """Whether the target's config says that its files hold multi-token heads, and transformers can run them."""
        asked = self.settings
        return (
            can_run_heads()
            and heads_in(open_request(self.target, asked.source, asked.split, HEADERS_ONLY).architecture.config) > 0
        )

    def forecast_heads(self) -> Plan:
        """The plan of the target's multi-token heads, from its headers. Raises DraftError."""
        return forecast_heads(self.target, self.settings)

    def forecast(self, name: str | Path | None, compression: str | None) -> int:
        """The bytes that such a model would take, from its headers. Raises DraftError."""
        place, settings = self._found(name, compression)
        with self._loading(name, compression):
            plan = forecast(place, settings.source, settings.split, settings.stream, partial(plan_whole, place))
        return claimed_bytes(plan)

    def has_copy(self, compression: str) -> bool:
        """Whether there is a split of the target's checkpoint with that compression, which is not what the target streams."""
        try:
            own = self._own_settings(compression)
            return isinstance(resolve(self.target, own.source, own.split, reading=HEADERS_ONLY).source, Shards)
        except RabbitError:
            return False

    def _found(self, name: str | Path | None, compression: str | None) -> tuple[str, LoadSettings]:
        """The checkpoint of a draft, and how it is loaded."""
        return (self.target, self._own_settings(compression)) if name is None else (str(name), self._settings(compression))

    @contextmanager
    def _loading(self, name: str | Path | None, compression: str | None) -> Iterator[None]:
        """Raise what loading a draft raises as DraftError: the user named two models, and must know which is meant."""
        try:
            yield
        except DraftError:
            raise
        except RabbitError as error:
            other = f"the draft {name}, which must be a folder with weights, a .gguf file or a repo id"
            draft = other if name is not None else f"the {compression} copy of {self.target} as its draft"
            raise DraftError(f"cannot load {draft}: {error}") from error

    def close(self) -> None:
        """Close all drafts that were loaded."""
        for draft in self._loaded:
            draft.close()

    def _settings(self, compression: str | None) -> LoadSettings:
        """For another checkpoint: it shares the target's access to the Hub, and its memory."""
        asked = self.settings.source
        source = SourceConfig(
            token=asked.token,
            cache_dir=asked.cache_dir,
            local_files_only=asked.local_files_only,
            trust_remote_code=asked.trust_remote_code,
        )
        split = SplitConfig(
            compression=self._compression(compression),
            saving_path=self.settings.split.saving_path if compression is not None else None,
        )
        return LoadSettings(source, split, self._stream())

    def _own_settings(self, compression: str | None) -> LoadSettings:
        """For a compressed copy of the target. Raises DraftError if that would be the target again."""
        stored = self.settings.split.compression
        if stored is not None and stored.method == compression:
            raise DraftError(
                f"{self.target} is stored in {compression} already, and a copy of it would guess no faster: "
                "give another compression, DraftModel(...), or Lookup()"
            )
        split = replace(self.settings.split, mode="auto", delete_original=False, compression=self._compression(compression))
        return LoadSettings(self.settings.source, split, self._stream())

    def _compression(self, method: str | None) -> CompressionConfig | None:
        device = self.settings.stream.device
        return None if method is None else CompressionConfig(method=method, device_type=device.type)

    def _stream(self) -> StreamConfig:
        """Masks of trees need an attention that takes any mask, which flash attention does not."""
        asked = self.settings.stream
        return StreamConfig(
            device=asked.device,
            device_budget_bytes=None if self.is_planned else asked.device_budget_bytes,
            attn_implementation="auto" if asked.device.type == "cpu" else "sdpa",
            max_seq_len=asked.max_seq_len,
        )


def plan_whole(name: str, partition: Partition, stream: StreamConfig) -> Plan:
    """A plan that keeps every weight on the device but the embedding, of which a step reads a few rows.

    Raises DraftError if memory is too small for it.
    """
    partition = _with_embedding_by_row(partition)
    try:
        plan = plan_for(partition, stream)
        if not plan.pass_bytes and not plan.link_bytes:
            return plan
    except BudgetError:
        pass
    budget = budget_for(partition, stream, find_free_memory(stream))
    device, unbounded = str(stream.device), replace(budget, device_bytes=None, host_bytes=None)
    needed = place(partition.sizes, device, unbounded).held_bytes(device)
    raise DraftError(
        f"the draft {name} needs {format_bytes(needed)} on {device}, and has {format_bytes(budget.device_bytes or 0)}: "
        'take a smaller one, DraftModel(..., compression="4bit"), or raise max_memory'
    )


def _with_embedding_by_row(partition: Partition) -> Partition:
    """A step reads some rows in 0.1 ms; in memory, a large vocabulary would take as much as a third of a small draft."""
    sizes = (replace(size, only_by_row=True) if size.role == "embedding" else size for size in partition.sizes)
    return replace(partition, sizes=tuple(sizes))


@dataclass(frozen=True, slots=True)
class PlannedTarget:
    """A model whose memory is not planned yet, as drafts see it."""

    model: Any
    loader: DraftLoader

    @property
    def config(self) -> PretrainedConfig:
        """See `TargetModel`."""
        return self.model.config  # type: ignore[no-any-return]

    @property
    def tokenizer(self) -> object:
        """See `TargetModel`."""
        return self.model.tokenizer

    @property
    def device(self) -> torch.device:
        """See `TargetModel`."""
        return self.loader.settings.stream.device

    @property
    def name_or_path(self) -> str:
        """See `TargetModel`."""
        return self.loader.target

    def load_heads(self) -> Heads:
        """See `TargetModel`."""
        self.model.watch_states()
        return self.loader.load_heads()

    def load_draft(self, name: str | Path | None, compression: str | None) -> PreTrainedModel:
        """See `TargetModel`."""
        return self.loader(name, compression)


def assemble_with(speculate: Draft | str | None, target: PlannedTarget, rest: Callable[[StreamConfig], Assembly]) -> Assembly:
    """Attach a draft, then assemble the model in the memory that it leaves. Raises DraftError if that is too small."""
    draft, stream = speculate, target.loader.settings.stream
    if draft is None or isinstance(draft, str):
        return rest(stream)
    draft.attach(target)
    return within_rest(draft.name, target.name_or_path, replace(stream, draft_bytes=draft.nbytes), rest)


def within_rest(draft: str, target: str, stream: StreamConfig, rest: Callable[[StreamConfig], Result]) -> Result:
    """Do `rest` in the memory that a draft of `stream.draft_bytes` leaves. Raises DraftError if that is too small."""
    try:
        return rest(stream)
    except BudgetError as error:
        if not stream.draft_bytes:
            raise
        missing = error.smallest_bytes - (stream.device_budget_bytes or 0)
        lack = f"{format_bytes(missing)} more than max_memory" if stream.device_budget_bytes is not None else "more than is free"
        raise DraftError(
            f"{draft} takes {format_bytes(stream.draft_bytes)} on {stream.device}; with {target} it needs "
            f"{format_bytes(error.smallest_bytes)}, {lack}: raise max_memory, take a smaller draft, or leave it out"
        ) from error
