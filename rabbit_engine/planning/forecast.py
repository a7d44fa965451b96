"""Plans a model before anything is downloaded or split: from its config, and from its files' headers if available."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from rabbit_engine.architectures import warn_of_unused
from rabbit_engine.checkpoints import HEADERS_ONLY, MustSplit, Shards, Source, build_plain, resolve
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import BudgetError, first_line
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.partition import partition_model, unread_entries
from rabbit_engine.planning.plan import Plan
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.utils.sizes import format_seconds


def forecast(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> Plan:
    """The plan that `AutoModel.from_pretrained` would make on this machine now, and the files it would stream from.

    Reads only the config and headers, those of a Hub repo by range requests; a repo with a single GGUF file is downloaded,
    since its config is inside. Raises what loading would raise before it reads a weight.
    """
    resolution = resolve(name, source, split, reading=HEADERS_ONLY)
    found, model = resolution.source, resolution.model
    if model is None:
        model = build_plain(found.architecture, found.dtype)
    entries, ties = _entries(found, model)
    plan = plan_for(partition_model(model, entries, ties, stream.cut, stream.device.type), stream)
    return replace(plan, notes=(*plan.notes, str(found)))


def why_lossless_gains_nothing(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> str:
    """Why a pass would not be faster with the lossless compression of `split` than without; empty if it would be.

    Both are planned with the same measured rates. Shards whose originals are deleted are used in any case. Raises what `forecast`
    raises.
    """
    if _is_without_originals(resolve(name, source, split, reading=HEADERS_ONLY).source):
        return ""
    plain = forecast(name, source, replace(split, compression=None), stream)
    if not plain.pass_bytes and not plain.link_bytes:
        return "no weight moves after loading"
    try:
        packed = forecast(name, source, split, replace(stream, speeds=plain.speeds))
    except BudgetError as error:  # decoding needs a scratch
        return first_line(error)
    if not packed.decoding.nbytes:
        return "none of the weights that move is a bfloat16 matrix"
    if packed.pass_s < plain.pass_s:
        return ""
    with_it, without = format_seconds(packed.pass_s), format_seconds(plain.pass_s)
    return f"a pass would take {with_it} (bound by {packed.bound}), and takes {without} without"


def _is_without_originals(found: Source) -> bool:
    """Whether a split has deleted the files that it was made from, or was interrupted while it did."""
    if isinstance(found, Shards):
        return bool(found.manifest.source["deleted"])
    return isinstance(found, MustSplit) and found.journal is not None and bool(found.journal.deleted)


def _entries(found: Source, model: PreTrainedModel) -> tuple[Mapping[str, TensorEntry], Mapping[str, str]]:
    """Entries and ties of the weights; for shards that do not exist yet, those derived from the model."""
    if isinstance(found, MustSplit):
        return unread_entries(model, found.request.split.compression)
    warn_of_unused(found.unused, found.architecture.cls)
    return found.entries, found.ties
