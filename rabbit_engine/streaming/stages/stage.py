"""What a model and a stage of it say to each other: the calls of its layers in one pass, and their result."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from rabbit_engine.streaming.part_masks import MaskRecipe
from rabbit_engine.streaming.scheduler import SharedPass
from rabbit_engine.transformers_bridge.block_ends import Copies, EndsRecipe


class Stands(enum.Enum):
    """What stands in the arguments of a call for something that the stage has."""

    CACHE = "the cache of the text"
    OUTPUT = "the output of the call before"


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """Stands in the arguments of a call for what the stage keeps under this number as long as the text, or until it is dropped.
    `tensor`: keep this from now on."""

    number: int
    tensor: Any = None


@dataclass(frozen=True, slots=True)
class MaskOfPart:
    """Stands for the mask of the part that runs, for layers of a kind."""

    kind: str


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments of layer number `layer`."""

    layer: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a layer of a cache beside passes: see `transformers_bridge.mirrored`."""

    layer: int
    name: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of one forward, in order: the output of the last is the answer's."""

    calls: tuple[LayerCall, ...]


@dataclass(frozen=True, slots=True)
class PartCalls:
    """The calls of a part of a prompt, tokens `first` to `stop` of the text."""

    calls: tuple[LayerCall, ...]
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class CallsInParts:
    """The calls of parts of a prompt, whose masks are made of the recipe `masks`: the answer's output has one for each part. What
    layers forget at the `ends` of blocks is copied for the answer meanwhile."""

    parts: tuple[PartCalls, ...]
    masks: MaskRecipe
    ends: EndsRecipe | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Keys and values of tokens `first` to `stop` of the layers of a cache, but those `without`."""

    first: int
    stop: int
    without: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NewText:
    """The layers of a `cache` that the stage has from now on; those in tiers it makes of its `recipe`."""

    cache: Any
    recipe: object = None


@dataclass(frozen=True, slots=True)
class TextOfRequest:
    """The cache of a text by `name`, with its layers if it is `new` to the stage. `changes` are done before anything runs."""

    name: str
    new: NewText | None = None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True, slots=True)
class ActiveAdapters:
    """The adapters of one pass: the `modules` that `OpenStage.adapt` was given under this name, and for each of them, or once
    for all, the names of those that are `active`, and whether they are used at all."""

    modules: str
    active: tuple[tuple[tuple[str, ...], bool], ...]


@dataclass(frozen=True, slots=True)
class PassSetting:
    """What the layers compute with in a pass: adapters, and an implementation of attention; None as they were loaded."""

    adapters: ActiveAdapters | None = None
    attention: str | None = None


@dataclass(frozen=True, slots=True)
class StageRequest:
    """What a stage does for one text, or for none: `work` is calls of its layers, states that are read, or nothing but changes.

    The calls are on `sequences` sequences. The answer has outputs of modules `inside` layers: a layer's number, and a name in it.
    `shared` is the pass of several texts that this is part of: each of them is expected to make such a request, beginning with
    the same layer.
    """

    work: Calls | CallsInParts | Wanted | None
    text: TextOfRequest | None = None
    sequences: int = 1
    setting: PassSetting = PassSetting()
    inside: frozenset[tuple[int, str]] = frozenset()
    shared: SharedPass | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that run, in order."""
        match self.work:
            case Calls(calls) | CallsInParts((PartCalls(calls), *_)):
                return tuple(call.layer for call in calls)
            case _:
                return ()

    @property
    def alters(self) -> bool:
        """Whether the text's cache is another one afterwards."""
        return bool(self.layers) or (self.text is not None and bool(self.text.changes))


@dataclass(frozen=True, slots=True)
class StageAnswer:
    """The `output` of the last call, what the layers of the text's cache are now (`facts`), the `seconds` it took, the
    outputs of modules `inside` layers, as they came, and what they hold at the `ends` of blocks of a prompt in parts."""

    output: Any
    facts: Mapping[int, Mapping[str, Any]]
    seconds: float
    inside: tuple[tuple[tuple[int, str], Any], ...] = ()
    ends: Copies = field(default_factory=dict)


class OpenStage(Protocol):
    """Layers of a model that run elsewhere, in one range or several. All methods but `close` may be called from any thread."""

    @property
    def name(self) -> str:
        """The device or machine, for messages."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers, ascending."""
        ...

    @property
    def reads(self) -> bool:
        """Whether weights move in each pass."""
        ...

    @property
    def computes_parts(self) -> bool:
        """Whether it has the memory to compute parts of a prompt in one pass."""
        ...

    @property
    def kernels(self) -> str:
        """The instructions of the processor that it computes with: the same ones give the same bits."""
        ...

    def submit(self, request: StageRequest) -> Future[StageAnswer]:
        """Run the calls, in turn for each text. The future raises what they raise."""
        ...

    def fork(self, text: str, changes: tuple[Change, ...], copy: str) -> None:
        """Do the changes, and name a copy of the text's cache `copy`."""
        ...

    def forget(self, text: str) -> None:
        """Free a text's cache. Does not wait; a text that is not there is no error."""
        ...

    def adapt(self, name: str, modules: bytes) -> None:
        """Have the modules of adapters that `streaming.stages.adapted` has packed. Raises MissingExtraError without peft."""
        ...

    def withdraw(self, name: str) -> None:
        """Drop these modules, which no further request names. Does not wait."""
        ...

    def free_bytes(self) -> int:
        """Bytes that caches and activations may take there now."""
        ...

    def tier_bytes(self) -> int:
        """Bytes that caches may take beside the memory of its device: of disk, or of the host's memory."""
        ...

    def close(self) -> None:
        """Free everything. Idempotent."""
        ...
