"""What a checkpoint is and can do, from its config and the headers of its files: no weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rabbit_engine.architectures import (
    Conversion,
    auto_class_of,
    auto_classes_for,
    find_layout,
    sliding_window,
    stated_lengths,
    task_of,
    template_in,
    template_of,
)
from rabbit_engine.checkpoints import HEADERS_ONLY, InPlace, ModelRequest, MustSplit, Resolution, Shards, build_plain, resolve
from rabbit_engine.model.auto import read_settings
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.storage.tensorfiles import DTYPE_NAMES, TensorEntry
from rabbit_engine.transformers_bridge.attention import attention_implementations
from rabbit_engine.transformers_bridge.experts import experts_of
from rabbit_engine.transformers_bridge.quantizers import method_of
from rabbit_engine.utils.report import Report
from rabbit_engine.utils.sizes import format_bytes

_CAUSAL = "AutoModelForCausalLM"

_MOST_SHOWN = 8
"""Labels in a report."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Capabilities(Report):
    """`cls` is the class of transformers that runs, `auto_class` the one that lists it, `task` its task as the Hub names it.

    `auto_classes` are those of this library that have a class for the model type: with another than `auto_class`, a head that
    the checkpoint lacks is initialised. `lengths` are tokens, by the attribute that states them. `stored` are bytes by the type
    they are stored in ("BF16", "Q4_K"), `quantization` the method, `parameters` values of the decoded weights. `layers` and
    `towers` are blocks: of the main stack, and of others (an encoder, images). `labels` are those of a classifier, in order.
    `experts` are those of a layer, and those that a token uses. `source` says where the weights are streamed from, and why they
    must be split if they must. `chat_template` is the default one, empty without.
    """

    name: str
    model_type: str
    cls: str
    auto_class: str | None
    auto_classes: tuple[str, ...]
    task: str | None
    can_generate: bool
    has_chat_template: bool
    chat_template: str
    labels: tuple[str, ...]
    lengths: Mapping[str, int]
    sliding_window: int | None
    attention: tuple[str, ...]
    dtype: torch.dtype
    quantization: str | None
    stored: Mapping[str, int]
    parameters: int
    layers: int
    towers: int
    experts: tuple[int, int] | None
    streams_in_place: bool
    must_split: bool
    source: str

    @property
    def context_length(self) -> int | None:
        """The smallest of `lengths`; None if nothing states one."""
        return min(self.lengths.values(), default=None)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(self.stored.values())

    def __repr__(self) -> str:
        return f"Capabilities({self.name!r}: {self.task or self.cls}, {format_bytes(self.weights_bytes)})"

    def rows(self) -> list[tuple[str, str]]:
        """See `Report`."""
        return [
            ("task", self.task or "none that an auto class has"),
            ("class", f"{self.cls} ({self.model_type})"),
            ("auto class", self.auto_class or f"AutoModel, which takes {self.cls} as the checkpoint names it"),
            ("also as", ", ".join(auto for auto in self.auto_classes if auto != self.auto_class) or "none"),
            *([("labels", _shown(self.labels))] if self.labels else []),
            ("generates", "text" if self.can_generate else "no"),
            ("chat template", "yes" if self.has_chat_template else "no"),
            ("context", _length(self)),
            ("attention", ", ".join(self.attention) or "none"),
            ("layers", f"{self.layers}" + (f", and {self.towers} of other stacks" if self.towers else "")),
            *([("experts", f"{self.experts[1]} of {self.experts[0]} a token, in each sparse layer")] if self.experts else []),
            ("weights", f"{format_bytes(self.weights_bytes)}, {self.parameters:,} parameters"),
            ("stored as", ", ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in self.stored.items())),
            ("quantised", self.quantization or "no"),
            ("computes in", str(self.dtype).removeprefix("torch.")),
            ("weights are", self.source),
        ]


def capabilities(pretrained_model_name_or_path: str | Path, **keywords: Any) -> Capabilities:
    """What a checkpoint is and can do: its task, class, length, attention, encodings, experts, and how it would stream.

    Takes the keywords of `AutoModel.from_pretrained`, and raises what that would raise before it reads a weight. Reads the
    config and headers alone, those of a Hub repo by range requests; a repo with a single GGUF file is downloaded, since the
    config is inside it.
    """
    name, settings = pretrained_model_name_or_path, read_settings(keywords, planned=True)
    return _describe(str(name), resolve(name, settings.source, settings.split, reading=HEADERS_ONLY))


def _describe(name: str, resolution: Resolution) -> Capabilities:
    source = resolution.source
    request, architecture, dtype = source.request, source.architecture, source.dtype
    model = resolution.model or build_plain(architecture, dtype)
    folder, layout = request.repo.folder, find_layout(model)
    auto: str | None = _CAUSAL
    autos: tuple[str, ...] = (_CAUSAL,)  # which converted families become
    if architecture.family is None:
        auto, autos = auto_class_of(architecture.cls, architecture.config, folder), auto_classes_for(architecture.config)
    return Capabilities(
        name=name,
        model_type=model.config.model_type,
        cls=architecture.cls.__name__,
        auto_class=auto,
        auto_classes=autos,
        task="feature-extraction" if "modules.json" in request.repo.names else task_of(auto),
        can_generate=model.can_generate(),
        has_chat_template=_has_chat_template(request),
        chat_template=_chat_template(request),
        labels=_labels(model, auto),
        lengths=stated_lengths(model, folder),
        sliding_window=sliding_window(model.config),
        attention=attention_implementations(architecture.cls, model.config),
        dtype=dtype,
        quantization=quantization_of(source),
        stored=_stored(source, model, resolution.conversion),
        parameters=sum(weight.numel() for weight in model.parameters()),
        layers=len(layout.layers),
        towers=len(layout.towers),
        experts=experts_of(model),
        streams_in_place=isinstance(source, InPlace),
        must_split=isinstance(source, MustSplit),
        source=str(source),
    )


def _labels(model: PreTrainedModel, auto: str | None) -> tuple[str, ...]:
    if auto is None or not auto.endswith("Classification"):
        return ()
    return tuple(str(label) for _, label in sorted((model.config.id2label or {}).items()))


def _has_chat_template(request: ModelRequest) -> bool:
    if request.gguf is not None:
        return bool(request.gguf.values.get("tokenizer.chat_template"))
    return template_in(request.repo.folder)


def _chat_template(request: ModelRequest) -> str:
    if request.gguf is not None:
        return str(request.gguf.values.get("tokenizer.chat_template") or "")
    return template_of(request.repo.folder)


def quantization_of(source: InPlace | Shards | MustSplit) -> str | None:
    """How the weights are quantised: a split's own compression, else as the checkpoint says."""
    if isinstance(source, Shards) and source.request.split.compression is not None:
        return source.request.split.compression.method
    if source.request.gguf is not None:
        return "gguf"
    quantization = source.architecture.quantization
    return None if quantization is None else method_of(quantization)


def _stored(source: InPlace | Shards | MustSplit, model: PreTrainedModel, conversion: Conversion | None) -> dict[str, int]:
    """Bytes by type, most first: of a GGUF file's tensors, of what is streamed, or of what is split."""
    if not isinstance(source, MustSplit) or source.request.gguf is not None:
        return stored_types(source)
    if conversion is not None:
        return _summed((DTYPE_NAMES[tensor.dtype], _nbytes(tensor)) for tensor in conversion.tensors.values())
    return _by_dtype(unread_entries(model)[0].values())


def stored_types(source: InPlace | Shards | MustSplit) -> dict[str, int]:
    """Bytes by type, most first, of a GGUF file's tensors or of what is streamed; none before a split."""
    if source.request.gguf is not None and not isinstance(source, Shards):
        return _summed((tensor.kind, tensor.nbytes) for tensor in source.request.gguf.tensors.values())
    return {} if isinstance(source, MustSplit) else _by_dtype(source.entries.values())


def _by_dtype(entries: Iterable[TensorEntry]) -> dict[str, int]:
    places = {(place.path, place.offset): place for entry in entries for place in entry.places}
    return _summed((DTYPE_NAMES[place.dtype], place.nbytes) for place in places.values())


def _nbytes(tensor: Any) -> int:
    return torch.Size(tensor.shape).numel() * int(tensor.dtype.itemsize)


def _summed(rows: Iterable[tuple[str, int]]) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for kind, nbytes in rows:
        counted[kind] += nbytes
    return dict(counted.most_common())


def _length(found: Capabilities) -> str:
    if found.context_length is None:
        return "not stated"
    stated = ", ".join(f"{name} {tokens}" for name, tokens in found.lengths.items())
    window = f"; some layers see {found.sliding_window}" if found.sliding_window else ""
    return f"{found.context_length} tokens ({stated}){window}"


def _shown(labels: tuple[str, ...]) -> str:
    more = f" and {len(labels) - _MOST_SHOWN} more" if len(labels) > _MOST_SHOWN else ""
    return f"{len(labels)}: {', '.join(labels[:_MOST_SHOWN])}{more}"
