"""Plans a model before anything is downloaded or split: from its config, and from its files' headers if available."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from rabbit_engine.architectures import warn_of_unused
from rabbit_engine.checkpoints import HEADERS_ONLY, MustSplit, Shards, Source, build_plain, resolve
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.errors import BudgetError, first_line
from rabbit_engine.planning.decide import plan_for
from rabbit_engine.planning.machines import Machine
from rabbit_engine.planning.partition import Partition, partition_model
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.stages import MOST_ROUNDS, LayeredUnits, layered_units, plan_stages
from rabbit_engine.planning.stages_plan import StagesPlan
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.utils.sizes import format_seconds

Decide = Callable[[Partition, StreamConfig], Plan]
"""`planning.decide.plan_for`, or another way to plan a model."""


def forecast(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig, decide: Decide = plan_for) -> Plan:
    """The plan that `AutoModel.from_pretrained` would make on this machine now, and the files it would stream from.

    A lossless compression that makes no pass faster is left out, as loading does; a note says so. Reads only the config and
    headers, those of a Hub repo by range requests; a repo with a single GGUF file is downloaded, since its config is inside.
    Raises what loading would raise before it reads a weight.
    """
    if not _is_lossless(split):
        return _plan_as_asked(name, source, split, stream, decide)
    plan, useless = _plan_with_gain(name, source, split, stream)
    return replace(plan, notes=(*plan.notes, left_out(useless))) if useless else plan


def forecast_stages(
    name: str | Path,
    source: SourceConfig,
    split: SplitConfig,
    stream: StreamConfig,
    machines: Sequence[Machine],
    *,
    texts: int = 1,
    most_rounds: int = MOST_ROUNDS,
) -> StagesPlan:
    """How `machines` would share the model: see `plan_stages`. `max_seq_len` of `stream` reserves memory for that many tokens of
    all texts. Reads what `forecast` reads. Raises BudgetError and what loading would raise before it reads a weight.
    """
    return plan_stages(layers_of(name, source, split, stream), machines, texts=texts, most_rounds=most_rounds)


def layers_of(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> LayeredUnits:
    """The units of a model by layer, with room for the caches of `max_seq_len` tokens. Reads what `forecast` reads."""
    partition, _ = partition_of(name, source, split, stream)
    return layered_units(partition, cached_tokens=stream.max_seq_len or 0)


def why_lossless_gains_nothing(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> str:
    """Why a pass would not be faster with the lossless compression of `split` than without; empty if it would be, or if `split`
    has none.

    Both are planned with the same measured rates. Shards whose originals are deleted are used in any case. Raises what `forecast`
    raises.
    """
    return _plan_with_gain(name, source, split, stream)[1] if _is_lossless(split) else ""


def left_out(reason: str) -> str:
    """What a log and a plan say of a lossless compression that is not used."""
    return f'compression="lossless" is left out: {reason}'


def _is_lossless(split: SplitConfig) -> bool:
    return split.compression is not None and split.compression.method == "lossless"


def _plan_with_gain(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> tuple[Plan, str]:
    """The plan with the lossless compression of `split` and an empty text, or the plan without it and the reason."""
    if _is_without_originals(resolve(name, source, split, reading=HEADERS_ONLY).source):
        return _plan_as_asked(name, source, split, stream), ""
    plain = _plan_as_asked(name, source, replace(split, compression=None), stream)
    if not plain.pass_bytes and not plain.link_bytes:
        return plain, "no weight moves after loading"
    try:
        packed = _plan_as_asked(name, source, split, replace(stream, speeds=plain.speeds))
    except BudgetError as error:  # decoding needs a scratch
        return plain, first_line(error)
    if not packed.decoding.nbytes:
        return plain, "none of the weights that move is a bfloat16 matrix"
    if packed.pass_s < plain.pass_s:
        return packed, ""
    with_it, without = format_seconds(packed.pass_s), format_seconds(plain.pass_s)
    return plain, f"a pass would take {with_it} (bound by {packed.bound}), and takes {without} without"


def _plan_as_asked(
    name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig, decide: Decide = plan_for
) -> Plan:
    partition, found = partition_of(name, source, split, stream)
    plan = decide(partition, stream)
    return replace(plan, notes=(*plan.notes, str(found)))


def partition_of(name: str | Path, source: SourceConfig, split: SplitConfig, stream: StreamConfig) -> tuple[Partition, Source]:
    """The model's units, and where its weights would come from."""
    resolution = resolve(name, source, split, reading=HEADERS_ONLY)
    found, model = resolution.source, resolution.model
    if model is None:
        model = build_plain(found.architecture, found.dtype)
    entries, ties = _entries(found, model)
    return partition_model(model, entries, ties, stream.cut, stream.device.type), found


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
