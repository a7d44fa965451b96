"""Calls the layers of a stage in their model: layers that follow one another make one request.

Which of them do is learned: in the first pass each layer is a request of its own, and its output is compared with what the next
layer is given. Where that is the same tensor, nothing between the two computes with it, and from then on the first returns a
stand-in, `StatesElsewhere`, which raises if anything does.
"""

from __future__ import annotations

import uuid
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from rabbit_engine.errors import UnsupportedOperationError
from rabbit_engine.streaming.binding.wrapping import not_compiled, refuse_gradients
from rabbit_engine.streaming.parts import part_on
from rabbit_engine.streaming.scheduler import UnitSource, fiber_on
from rabbit_engine.streaming.stages.adapted import AdaptersHere
from rabbit_engine.streaming.stages.hops import bring
from rabbit_engine.streaming.stages.shown import ShownHere
from rabbit_engine.streaming.stages.stage import (
    Calls,
    Change,
    KeptTensor,
    LayerCall,
    NewText,
    OpenStage,
    PassSetting,
    StageAnswer,
    StageRequest,
    Stands,
    TextOfRequest,
    Wanted,
)
from rabbit_engine.transformers_bridge.attention import attention_configs, attention_of
from rabbit_engine.transformers_bridge.block_ends import EndsRecipe
from rabbit_engine.transformers_bridge.forwards import is_capturing
from rabbit_engine.transformers_bridge.mirrored import (
    NUMBERS,
    has_layers,
    is_cache,
    is_mirrored,
    move_layers,
    relay_of,
    take_facts,
)

_Form = tuple[int, tuple[bool, ...], tuple[tuple[str, bool], ...]]
"""A layer's number, and the switches that it is called with: they may decide what it returns."""

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)
"""Whether the forward that runs returns the states of all layers."""

_INSIDE: ContextVar[bool] = ContextVar("inside", default=False)
"""Whether it returns outputs of modules inside layers."""

KEPT_BYTES = 65_536
"""Arguments that take as much are sent twice with a text, and then known."""

_SHOWS_INSIDE = ("output_attentions", "output_router_logits")

_ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class StatesElsewhere(torch.Tensor):
    """The output of a layer that stays on its stage: shape, dtype and device, no storage. Computing with it raises."""

    stage_name: str

    @staticmethod
    def __new__(cls, like: torch.Tensor, where: str) -> Self:
        """Like a tensor of the same shape."""
        self = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        self.stage_name = where
        return self

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"StatesElsewhere({self.stage_name}: {list(self.shape)} {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raise UnsupportedOperationError."""
        del types, kwargs
        if func in _ALIASES:
            return args[0]
        where = next((one.stage_name for one in args if isinstance(one, StatesElsewhere)), "a stage")
        raise UnsupportedOperationError(
            f"{where} has the output of this layer, and {func} needs it here: a forward hook on the layer, set before the "
            "pass, brings it"
        )


@dataclass(slots=True, weakref_slot=True)
class _Sent:
    """A tensor that was sent: which version of it, and under which number the stage keeps it."""

    version: int
    number: int | None = None


def _drop(text: weakref.ref[RemoteText], layer: int, number: int) -> None:
    """Have the stage drop what it keeps; with its text it has."""
    found = text()
    if found is not None:
        found.note(layer, "drop", (number,))


class RemoteText:
    """The cache of a text on a stage, by name: freed there with the last layer that refers to it."""

    def __init__(self, stage: OpenStage) -> None:
        self.name = uuid.uuid4().hex
        self._stage = stage
        self._changes: deque[Change] = deque()
        self._sent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        weakref.finalize(self, stage.forget, self.name)

    def note(self, index: int, change: str, args: tuple[Any, ...]) -> None:
        """Have this done to layer `index` before the next pass."""
        self._changes.append(Change(index, change, args))

    def lighter(self, calls: tuple[LayerCall, ...]) -> tuple[LayerCall, ...]:
        """The calls, with large tensors that were sent before with this text, such as the states of an encoder, as `KeptTensor`s:
        the second time with the tensor, and from then on, as long as it is there, with its number alone."""
        found: dict[int, Any] = {}

        def light(value: Any) -> Any:
            if type(value) is not torch.Tensor or value.nbytes < KEPT_BYTES or value.is_inference():
                return value
            if id(value) not in found:  # the same for all calls
                found[id(value)] = self._light(value, calls[0].layer)
            return found[id(value)]

        return tuple(
            LayerCall(call.layer, tuple(map(light, call.args)), {name: light(value) for name, value in call.kwargs.items()})
            for call in calls
        )

    def _light(self, value: torch.Tensor, layer: int) -> torch.Tensor | KeptTensor:
        sent = self._sent.get(value)
        if sent is None or sent.version != value._version:
            self._sent[value] = _Sent(value._version)
            return value
        if sent.number is not None:
            return KeptTensor(sent.number)
        sent.number = next(NUMBERS)
        weakref.finalize(sent, _drop, weakref.ref(self), layer, sent.number).atexit = False
        return KeptTensor(sent.number, value)

    def forget_sent(self) -> None:
        """Send all tensors anew: a request failed, and nobody knows what of it the stage has."""
        self._sent.clear()

    def take_changes(self) -> tuple[Change, ...]:
        """What was noted since the last time."""
        taken = []
        while self._changes:  # finalizers may add some meanwhile
            taken.append(self._changes.popleft())
        return tuple(taken)

    def of_request(self, new: NewText | None = None) -> TextOfRequest:
        """What the next request says of it; `new`: its layers, which are not there yet."""
        return TextOfRequest(self.name, new, self.take_changes())

    def read(self, first: int, stop: int, without: Collection[int]) -> Mapping[str, torch.Tensor]:
        """Copies of keys and values there."""
        wanted = Wanted(first, stop, tuple(without))
        answer = self._stage.submit(StageRequest(wanted, self.of_request())).result()
        found: Mapping[str, torch.Tensor] = answer.output
        return found

    def fork(self) -> RemoteText:
        """A copy as it is now."""
        copied = RemoteText(self._stage)
        self._stage.fork(self.name, self.take_changes(), copied.name)
        return copied


@dataclass(slots=True)
class _Flow:
    """What one forward, of which each has a greenlet, has reached in a stage."""

    calls: list[LayerCall] = field(default_factory=list)
    cache: Any = None
    last: tuple[_Form, Any] | None = None
    """The layer that returned last, and its output."""


class RemoteLayers:
    """The layers of a `stage` in their model, whose modules are `layers` by number. Weights of theirs are placeholders."""

    def __init__(
        self,
        stage: OpenStage,
        layers: Mapping[int, nn.Module],
        source: UnitSource,
        device: torch.device,
        sequences: Callable[[], int],
        names: Mapping[int, str],
    ) -> None:
        self._stage, self._source, self._device, self._sequences = stage, source, device, sequences
        self._modules = layers
        self._flows: weakref.WeakKeyDictionary[greenlet, _Flow] = weakref.WeakKeyDictionary()
        self._outputs: dict[_Form, Any] = {}
        """What each layer that was called returned: its first tensor's place is kept by None, the rest as it is."""
        self._joined: set[_Form] = set()
        """The layers whose output the next one gets unchanged."""
        self._adapters, self._shown = AdaptersHere(stage, layers), ShownHere(layers)
        self._configs = attention_configs(part for module in layers.values() for part in module.modules())
        self._attention = list(map(attention_of, self._configs))
        for number, module in layers.items():
            module.forward = not_compiled(self._forward_of(number, names[number], module), module.forward)

    def send_adapters(self) -> None:
        """Give the stage the adapters that the layers have here, which the next pass would do. Raises UnsupportedOperationError,
        MissingExtraError."""
        self._adapters.active(self._modules)

    def _forward_of(self, number: int, name: str, module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            refuse_gradients(name, module, args, kwargs)
            return self._run(number, args, kwargs)

        return run

    def _run(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._require_unseen(number)
        form = number, tuple(value for value in args if isinstance(value, bool)), _switches(kwargs)
        flow = self._flows.setdefault(getcurrent(), _Flow())
        self._learn(flow, number, args, kwargs)
        states = self._add(flow, number, args, kwargs)
        if self._may_wait(form) and isinstance(states, torch.Tensor):
            awaited = StatesElsewhere(states, self._stage.name)
            flow.last = form, awaited
            return _with_states(self._outputs[form], awaited)
        calls, cache, flow.calls, flow.cache = tuple(flow.calls), flow.cache, [], None
        output = bring(self._send(calls, cache), self._device)
        flow.last = form, _states_in(output)
        self._outputs[form] = _without_states(output)
        return output

    def _require_unseen(self, number: int) -> None:
        """Raise UnsupportedOperationError if somebody wants to see what runs inside the layer."""
        if any(map(_own_hooks, self._adapters.parts(number)[1:])):
            raise UnsupportedOperationError(
                f"a hook on a module inside layer {number} would not be called: the layer runs on {self._stage.name}. "
                "A hook on the layer itself is"
            )

    def _learn(self, flow: _Flow, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if flow.last is None or flow.last[0][0] != number - 1 or flow.last[1] is None:
            flow.calls.clear()  # of a pass that an exception ended
        elif any(value is flow.last[1] for value in (*args, *kwargs.values())):
            self._joined.add(flow.last[0])
        else:
            self._joined.discard(flow.last[0])

    def _may_wait(self, form: _Form) -> bool:
        """Whether nothing needs the layer's output here: the next layer of the stage gets it as it is."""
        if _SHOWN.get() or _own_hooks(self._modules[form[0]]):
            return False
        part = part_on(self._source)
        return form in (self._known() if part is None else part.hops.known_at_first(self._stage, self._known))

    def _known(self) -> frozenset[_Form]:
        """The layers that need not return at once."""
        return frozenset(self._joined & self._outputs.keys())

    def _add(self, flow: _Flow, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Add the call to those of the next request. The states it is for."""
        states: Any = None
        part = part_on(self._source)
        awaited = flow.last[1] if flow.last is not None and flow.calls else None

        def stand_in(value: Any) -> Any:
            nonlocal states
            if is_cache(value):
                flow.cache = value
                return Stands.CACHE
            mask = None if part is None else part.hops.stand_of(value)
            if mask is not None:
                return mask
            if states is None and isinstance(value, torch.Tensor) and value.is_floating_point():
                states = value
            return Stands.OUTPUT if awaited is not None and value is awaited else value

        given = tuple(map(stand_in, args))
        named = {name: stand_in(value) for name, value in kwargs.items()}
        flow.calls.append(LayerCall(number, given, named))
        return states

    def _send(self, calls: tuple[LayerCall, ...], cache: Any) -> Any:
        numbers = {call.layer for call in calls}
        adapters = self._adapters.active(numbers)
        text, new = self._text_of(cache)
        fiber, ends = fiber_on(self._source), getattr(cache, "watcher", None)
        request = StageRequest(
            Calls(calls if text is None else text.lighter(calls)),
            None if text is None else text.of_request(new),
            self._sequences(),
            PassSetting(adapters, self._changed_attention()),
            self._shown.wanted(numbers) if _INSIDE.get() else frozenset(),
            None if fiber is None else fiber.shared_pass,
        )
        try:
            future = self._submit(request, None if ends is None else ends.recipe)
            if fiber is not None:
                fiber.await_future(future)
            answer = future.result()
        except BaseException:
            if text is not None:
                text.forget_sent()
            raise
        if text is not None:
            take_facts(cache, answer.facts)
        if ends is not None:
            ends.merge(answer.ends)
        self._shown.give(bring(answer.inside, self._device))
        return answer.output

    def _submit(self, request: StageRequest, ends: EndsRecipe | None) -> Future[StageAnswer]:
        part = part_on(self._source)
        return self._stage.submit(request) if part is None else part.hops.submit(self._stage, part.index, request, ends)

    def _changed_attention(self) -> str | None:
        """The attention that was set since the model was loaded."""
        now = list(map(attention_of, self._configs))
        return None if now == self._attention else now[0]

    def _text_of(self, cache: Any) -> tuple[RemoteText | None, NewText | None]:
        """The text of a cache on the stage, and its layers if they are still here."""
        if cache is None:
            return None, None
        if not has_layers(cache, self._stage.layers):
            raise UnsupportedOperationError(
                f"{type(cache).__name__} cannot lie on {self._stage.name}: it takes a DynamicCache, or two of them"
            )
        if is_mirrored(cache, self._stage.layers):
            return relay_of(cache, self._stage.layers), None
        text = RemoteText(self._stage)
        return text, NewText(move_layers(cache, self._stage.layers, text), getattr(cache, "recipe", None))


def tell_what_is_shown(model: Any) -> None:
    """Let layers elsewhere know if a forward of `model` returns the states of all layers, or what is inside them."""
    native, config = model.forward, model.config

    def run(*args: Any, **kwargs: Any) -> Any:
        def is_asked(name: str) -> bool:
            asked = kwargs.get(name)
            asked = getattr(config, name, False) if asked is None else asked
            return not (asked is None or asked is False)

        states = _SHOWN.set(_SHOWN.get() or is_asked("output_hidden_states"))
        inside = _INSIDE.set(_INSIDE.get() or any(map(is_asked, _SHOWS_INSIDE)))
        try:
            return native(*args, **kwargs)
        finally:
            _SHOWN.reset(states)
            _INSIDE.reset(inside)

    model.forward = not_compiled(run, native)


def _switches(kwargs: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    return tuple(sorted((name, value) for name, value in kwargs.items() if isinstance(value, bool)))


def _own_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than those of transformers for the states that a forward returns."""
    return any(not is_capturing(hook) for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))


def _states_in(output: Any) -> torch.Tensor | None:
    """The states that a layer returned: its first tensor; None if there are other tensors."""
    values = list(output) if isinstance(output, tuple | list) else [output]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return tensors[0] if tensors and values[0] is tensors[0] and all(value is None for value in values[1:]) else None


def _without_states(output: Any) -> Any:
    return type(output)([None] * len(output)) if isinstance(output, tuple | list) else None


def _with_states(form: Any, states: torch.Tensor) -> Any:
    return states if form is None else type(form)([states, *form[1:]])
