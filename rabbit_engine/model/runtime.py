"""The running parts of a streamed model behind one typed interface, for sessions, servers and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rabbit_engine.architectures import Architecture
from rabbit_engine.checkpoints import Streamable
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.assembly import Assembly
from rabbit_engine.planning.partition import Partition
from rabbit_engine.planning.parts import MASKED, layer_ring_bytes
from rabbit_engine.planning.plan import Plan
from rabbit_engine.streaming import Binding, Ring, Trace, Transfer
from rabbit_engine.transformers_bridge.attention import attention_of


@dataclass(frozen=True, slots=True)
class Runtime:
    """A streamed model's parts: `checkpoint` is its source (class, dtype, files), `assembly` runs it, with the `attention` that
    its config named when this was asked for."""

    checkpoint: Streamable
    assembly: Assembly
    attention: str | None

    @property
    def architecture(self) -> Architecture:
        """The class, its config, and the properties of its family."""
        return self.checkpoint.architecture

    @property
    def plan(self) -> Plan:
        """Which tier keeps each unit, and what a pass costs."""
        return self.assembly.plan

    @property
    def partition(self) -> Partition:
        """The model's units, and the probe of what a text needs."""
        return self.assembly.partition

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.assembly.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the computation."""
        return self.checkpoint.dtype

    @property
    def transfer(self) -> Transfer:
        """What moves units: its threads, its queue, its counts."""
        return self.assembly.transfer

    @property
    def ring(self) -> Ring:
        """The memory on the device that weights stay in and pass through."""
        return self.assembly.ring

    @property
    def binding(self) -> Binding:
        """The wrapped forwards, and the running pass."""
        return self.assembly.binding

    @property
    def trace(self) -> Trace:
        """Spans of reads, copies and computation."""
        return self.assembly.trace

    @property
    def in_stages(self) -> bool:
        """Whether layers run on other devices or machines."""
        return bool(self.assembly.stages)

    def device_of_layer(self, layer: int) -> torch.device:
        """Where the states of a new text's layer are put: those of a layer elsewhere are in memory of the host until they go
        there."""
        return torch.device("cpu") if any(layer in stage.layers for stage in self.assembly.stages) else self.device

    @property
    def computes_parts(self) -> bool:
        """Whether a long prompt may be computed in parts in one pass: the class can, also with the attention that it has now,
        and the ring holds a layer, here and in each stage. Each part reads the experts on demand that it is routed to and that
        its layer has not kept.
        """
        plan, partition = self.plan, self.partition
        if not partition.computes_parts or self.attention not in MASKED:
            return False
        if not all(stage.computes_parts for stage in self.assembly.stages):
            return False
        moving = {*plan.streamed, *plan.host}
        units = [unit for unit in plan.units if unit.name in moving]
        return plan.ring_bytes >= layer_ring_bytes(units, partition.layout.layers)

    def free_bytes(self) -> int:
        """Bytes that caches and activations may take now."""
        return self.assembly.free_bytes()

    def close(self) -> None:
        """Stop reading and free the weights' memory. Idempotent."""
        self.assembly.close()


def runtime_of(model: object) -> Runtime:
    """The runtime of `model`, also if PEFT wraps it. Raises ConfigurationError for one that rabbit_engine did not load."""
    assembly, checkpoint = getattr(model, "_assembly", None), getattr(model, "_checkpoint", None)
    if not isinstance(assembly, Assembly) or checkpoint is None:
        raise ConfigurationError(f"{type(model).__name__} was not loaded by rabbit_engine: load it with rabbit_engine.AutoModel")
    return Runtime(checkpoint, assembly, attention_of(getattr(model, "config").get_text_config()))  # noqa: B009 - any model
