"""A model in stages: some layers, with all that is not a layer, in this process, the others where `OpenStage`s have them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rabbit_engine.checkpoints import Streamable
from rabbit_engine.config import StreamConfig
from rabbit_engine.model.assembly import Assembly, assemble
from rabbit_engine.model.loading import load
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.model.tiered_caches import make_text_states, tier_room
from rabbit_engine.planning.device_rows import with_probe_share
from rabbit_engine.planning.partition import Partition, partition_model
from rabbit_engine.planning.parts import layer_of
from rabbit_engine.planning.stages import StagesPlan
from rabbit_engine.storage.tensorfiles import TensorEntry
from rabbit_engine.streaming import OpenStage, RemoteLayers, StageAnswer, StageRequest, StageRunner, tell_what_is_shown
from rabbit_engine.utils.platform import kernels_of
from rabbit_engine.utils.spans import format_layers


@dataclass(frozen=True, slots=True)
class Opened:
    """The stages of a model; layers that none of them has run in this process, in `device_bytes` of memory for weights, and
    `host_bytes` of the host's, if those are given. `plan` says why."""

    stages: Sequence[OpenStage]
    device_bytes: int | None = None
    plan: StagesPlan | None = None
    host_bytes: int | None = None


StageOpener = Callable[[Partition, Streamable], Opened]
"""Decides on the stages of a model and opens them."""


def load_in_stages(name: str | Path, settings: LoadSettings, open_stages: StageOpener, *, required: bool = True) -> Any:
    """`load`, with the layers of the stages that `open_stages` gives elsewhere. Unless that is `required`, a model that cannot be
    in stages has none."""
    return load(name, settings, functools.partial(_assemble_rest, open_stages=open_stages, required=required))


def _assemble_rest(
    model: PreTrainedModel,
    entries: Mapping[str, TensorEntry],
    ties: Mapping[str, str],
    stream: StreamConfig,
    *,
    open_stages: StageOpener,
    required: bool,
    **keywords: Any,
) -> Assembly:
    """Assemble what no stage has, and connect the stages."""
    if not required and model.config.is_encoder_decoder:
        return assemble(model, entries, ties, stream, **keywords)
    partition = partition_model(model, entries, ties, stream.cut, stream.device.type)
    opened = open_stages(partition, getattr(model, "_checkpoint"))  # noqa: B009 - of a class that is made at run time
    stages = opened.stages
    if not stages and opened.plan is None:
        return assemble(model, entries, ties, stream, **keywords)
    if opened.device_bytes is not None:
        stream = replace(stream, device_budget_bytes=opened.device_bytes, host_budget_bytes=opened.host_bytes, max_seq_len=None)
    try:
        names = partition.layout.layers
        elsewhere = [names[number] for stage in stages for number in stage.layers]
        share = _largest_share(stages, len(names), stream.device)

        def part(whole: Partition) -> Partition:
            return with_probe_share(whole.only(lambda module: not _is_in(module, elsewhere)), share)

        assembly = assemble(model, entries, ties, stream, part=part, **keywords)
    except BaseException:
        for stage in stages:
            stage.close()
        raise
    assembly.stages, assembly.stages_plan = tuple(stages), opened.plan
    assembly.plan = replace(assembly.plan, row=opened.plan)
    _connect(model, assembly, names, stream.device)
    return assembly


def _connect(model: PreTrainedModel, assembly: Assembly, names: Sequence[str], device: torch.device) -> None:
    """Have the layers of the model that stages have run there."""
    passes = assembly.binding.passes
    for stage in assembly.stages:
        layers = {number: model.get_submodule(names[number]) for number in stage.layers}
        remote = RemoteLayers(stage, layers, assembly.binding, device, passes.sequences, dict(enumerate(names)))
        assembly.remote_layers = *assembly.remote_layers, remote
        if isinstance(stage, LocalStage):
            weakref.finalize(model, stage.close).atexit = False  # its thread would keep it
    for part in model.modules():
        if assembly.stages and isinstance(part, PreTrainedModel):
            tell_what_is_shown(part)


def _largest_share(stages: Sequence[OpenStage], layers: int, device: torch.device) -> float:
    """The largest part of a text's cache that lies in one memory: that of this process, a device's, or another machine's."""
    own = layers - sum(len(stage.layers) for stage in stages)
    shares = {device: own}
    for stage in stages:
        place: Any = stage.device if isinstance(stage, LocalStage) else stage
        shares[place] = shares.get(place, 0) + len(stage.layers)
    return max(shares.values()) / layers


def _is_in(module: str, parents: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{parent}.") for parent in parents)


def load_layers(name: str | Path, settings: LoadSettings, layers: Collection[int]) -> Any:
    """The model, of which only `layers` can run: what a stage loads."""

    def part(whole: Partition) -> Partition:
        mine = [whole.layout.layers[number] for number in layers]
        return whole.only(lambda module: _is_in(module, mine))

    return load(name, replace(settings, speculate=None), functools.partial(assemble, part=part))


class LocalStage:
    """Layers on another device of this machine, with residents, a ring and reads of their own.

    The ring reads ahead while the stage waits for a request: after one range of layers the next, after the last the first.
    """

    def __init__(self, name: str | Path, settings: LoadSettings, layers: Iterable[int], place: str | None = None) -> None:
        """Load the layers; `place` names the device, if its own name does not."""
        self.layers = tuple(sorted(layers))
        self._model = load_layers(name, settings, self.layers)
        runtime = runtime_of(self._model)
        self.device = runtime.device
        self.name = place or str(runtime.device)
        self.kernels = kernels_of(runtime.device)
        names = runtime.partition.layout.layers
        modules = {number: self._model.get_submodule(names[number]) for number in self.layers}
        self.reads, self.computes_parts = bool(runtime.transfer.units), runtime.computes_parts
        make_text = functools.partial(make_text_states, runtime)
        self._runner = StageRunner(
            modules,
            runtime.binding,
            runtime.device,
            self.name,
            make_text=make_text,
            layer_of=functools.partial(layer_of, layers=names),
            computes_parts=self.computes_parts,
        )

    def __repr__(self) -> str:
        return f"{format_layers(self.layers)} on {self.name}: {runtime_of(self._model).plan!r}"

    @property
    def model(self) -> Any:
        """The model of which the layers are, for its plan and profile."""
        return self._model

    @property
    def assembly(self) -> Assembly:
        """Its running parts."""
        return runtime_of(self._model).assembly

    @property
    def texts(self) -> int:
        """The number of texts with caches here."""
        return self._runner.texts

    def submit(self, request: StageRequest) -> Future[StageAnswer]:
        """Run the calls with the next pass."""
        return self._runner.submit(request)

    def fork(self, text: str, changes: Any, copy: str) -> None:
        """Copy a text's cache."""
        self._runner.fork(text, changes, copy)

    def forget(self, text: str) -> None:
        """Free a text's cache."""
        self._runner.forget(text)

    def adapt(self, name: str, modules: bytes) -> None:
        """Have the modules of adapters."""
        self._runner.adapt(name, modules)

    def withdraw(self, name: str) -> None:
        """Drop the modules of adapters."""
        self._runner.withdraw(name)

    def free_bytes(self) -> int:
        """Bytes that caches and activations may take on its device now."""
        return self.assembly.free_bytes()

    def tier_bytes(self) -> int:
        """Bytes that caches may take beside it now."""
        return tier_room(runtime_of(self._model))

    def close(self) -> None:
        """End its thread and free its memory. Idempotent."""
        self._runner.close()
        self._model.close()
