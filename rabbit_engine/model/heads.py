"""A checkpoint's multi-token heads as a small streamed model, in the least memory that it runs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import Cache, PretrainedConfig, PreTrainedModel

from rabbit_engine.architectures import Architecture
from rabbit_engine.checkpoints import HEADERS_ONLY, WHOLE_FILES, MustSplit, Reading, Resolution, execute, resolve
from rabbit_engine.config import StreamConfig
from rabbit_engine.decoding import NO_HEADS
from rabbit_engine.errors import BudgetError, CheckpointError, ConfigurationError, DraftError, first_line
from rabbit_engine.model.assembly import Assembly, assemble
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.partition import Partition, partition_model
from rabbit_engine.planning.plan import Plan
from rabbit_engine.transformers_bridge.multi_token import build_heads, can_run_heads, heads_in


@dataclass(frozen=True, slots=True)
class StreamedHeads:
    """See `decoding.Heads`."""

    model: Any
    assembly: Assembly

    @property
    def config(self) -> PretrainedConfig:
        """Of the heads: their number is that of its layers."""
        return self.model.config  # type: ignore[no-any-return]

    @property
    def count(self) -> int:
        """See `decoding.Heads`."""
        return heads_in(self.model.config)

    @property
    def nbytes(self) -> int:
        """See `decoding.Heads`."""
        return self.assembly.plan.device_bytes

    @property
    def is_closed(self) -> bool:
        """See `decoding.Heads`."""
        return self.assembly.transfer.closed

    def __call__(
        self, tokens: Sequence[int], states: torch.Tensor, cache: Cache, position: int, depth: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `decoding.Heads`."""
        device = states.device
        ids, positions = (torch.tensor([row], device=device) for row in (tokens, range(position, position + len(tokens))))
        with torch.no_grad():
            output = self.model(ids, states[None], cache, positions, depth)
        return output.logits[0], output.states[0]

    def close(self) -> None:
        """Stop reading, and free the memory."""
        self.assembly.close()


def load_heads(name: str, settings: LoadSettings) -> StreamedHeads:
    """Set the heads of a checkpoint streaming. Raises DraftError if it has none, or they cannot be streamed from its files."""
    checkpoint, model = execute(_resolve(name, settings, WHOLE_FILES))
    with torch.inference_mode(False):  # as for the model
        return StreamedHeads(model, assemble(model, checkpoint.entries, checkpoint.ties, settings.stream, decide=plan_least))


def forecast_heads(name: str, settings: LoadSettings) -> Plan:
    """Their plan, from headers. Raises as `load_heads`."""
    found = _resolve(name, settings, HEADERS_ONLY)
    source, model = found.source, found.model
    assert model is not None  # noqa: S101 - nothing is to be split
    assert not isinstance(source, MustSplit)  # noqa: S101
    stream = settings.stream
    return plan_least(partition_model(model, source.entries, source.ties, stream.cut, stream.device.type), stream)


def plan_least(partition: Partition, stream: StreamConfig) -> Plan:
    """The plan that takes the least memory. Raises BudgetError if not even that is free."""
    try:
        return plan_for(partition, replace(stream, device_budget_bytes=0, draft_bytes=0))
    except BudgetError as error:
        return plan_for(partition, replace(stream, device_budget_bytes=error.smallest_bytes, draft_bytes=0))


def _resolve(name: str, settings: LoadSettings, reading: Reading) -> Resolution:
    split = replace(settings.split, mode="never", compression=None, delete_original=False, saving_path=None, more_paths=())
    try:
        return resolve(name, settings.source, split, reading=reading, build=partial(_build, name))
    except DraftError:
        raise
    except (ConfigurationError, CheckpointError) as error:
        raise DraftError(f"the multi-token heads of {name} cannot be streamed from its files: {first_line(error)}") from error


def _build(name: str, architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    if not heads_in(architecture.config):
        raise DraftError(f"{name} has no multi-token heads: {NO_HEADS}")
    if not can_run_heads():
        raise DraftError("this release of transformers does not run multi-token heads: pip install -U transformers")
    try:
        return build_heads(architecture.cls, architecture.config, dtype)
    except (ValueError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
        raise DraftError(f"transformers cannot build the multi-token heads of {name}: {first_line(error)}") from error
