"""Runs the layers that a stage has: all texts that wait share the transfer of the weights."""

from __future__ import annotations

import copy
import functools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rabbit_engine.errors import ModelClosedError
from rabbit_engine.streaming.binding.binding import Binding
from rabbit_engine.streaming.part_masks import PartMasks
from rabbit_engine.streaming.parts import LayerOf, run_in_parts
from rabbit_engine.streaming.scheduler import Scheduler
from rabbit_engine.streaming.stages.adapted import AdaptersThere
from rabbit_engine.streaming.stages.arrivals import Arrivals
from rabbit_engine.streaming.stages.given import GivenArguments
from rabbit_engine.streaming.stages.hops import bring, finish, use_here
from rabbit_engine.streaming.stages.shown import ShownThere
from rabbit_engine.streaming.stages.stage import (
    Calls,
    CallsInParts,
    Change,
    KeptTensor,
    LayerCall,
    PassSetting,
    StageAnswer,
    StageRequest,
    TextOfRequest,
    Wanted,
)
from rabbit_engine.transformers_bridge.attention import attention_configs, attention_of, set_attention
from rabbit_engine.transformers_bridge.block_ends import BlockEnds, Copies
from rabbit_engine.transformers_bridge.caches import PartCache, states_between
from rabbit_engine.transformers_bridge.mirrored import change_layer, facts_of, layer_at, move_states, own_layers
from rabbit_engine.transformers_bridge.tiered import end_turns, put_back_in_tiers
from rabbit_engine.transformers_bridge.tiered_layers import TextLayers


@dataclass(frozen=True, slots=True)
class _Work:
    """What the thread does; in a pass of layers, for this `request`."""

    run: Callable[[], None]
    request: StageRequest | None = None

    @property
    def setting(self) -> PassSetting | None:
        """What all of a pass have in common; None if it runs no layers."""
        return self.request.setting if self.request is not None and self.request.layers else None


class StageRunner:
    """The `layers` of a model by number, and the caches of its texts on `device`, in a thread of its own.

    Requests that have come while a pass ran are computed together in the next, if they have the same adapters and attention:
    each has the bits it has alone. Where weights move, a pass begins when all texts have come that share it, as the requests
    tell. It waits for them no longer than reading again would take for those that come later: so the wait costs at most what it
    might save.
    """

    def __init__(
        self,
        layers: Mapping[int, nn.Module],
        binding: Binding,
        device: torch.device,
        name: str,
        *,
        make_text: Callable[[Any], TextLayers],
        layer_of: LayerOf,
        computes_parts: bool = True,
    ) -> None:
        """`make_text` makes the tiers of a text of their recipe, `layer_of` tells the layer of a unit. `computes_parts`: the ring
        holds a layer, so that all parts of a prompt take one pass, else one each."""
        self._make_text, self._layer_of = make_text, layer_of
        self._layers, self._binding, self._device, self._name = layers, binding, device, name
        self._arrivals, self._computes_parts = Arrivals(), computes_parts
        self._texts: dict[str, Any] = {}
        self._saved: defaultdict[str, dict[int, Any]] = defaultdict(dict)
        """Copies of states of each text's cache, which it may go back to."""
        self._adapters, self._shown = AdaptersThere(layers, device), ShownThere(layers)
        self._configs = attention_configs(part for layer in layers.values() for part in layer.modules())
        self._attention = list(map(attention_of, self._configs))
        """As loaded."""
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"rabbit-stage-{name}", daemon=True)
        self._thread.start()

    def submit(self, request: StageRequest) -> Future[StageAnswer]:
        """The calls of `request`, with the next pass. Waits until its tensors are computed."""
        finish(
            [
                list(map(_tensors_of, _calls_of(request))),
                [] if request.text is None else _tensors_of_changes(request.text.changes),
            ]
        )
        return self._put(functools.partial(self._run, request), request)

    def fork(self, text: str, changes: tuple[Change, ...], copied: str) -> None:
        """Name a copy of the cache of `text` after the changes; between passes."""
        finish(_tensors_of_changes(changes))
        self._put(functools.partial(self._fork, text, changes, copied)).result()

    def forget(self, text: str) -> None:
        """Free the cache of `text`."""
        with suppress(ModelClosedError):
            self._put(functools.partial(self._forget, text))

    def adapt(self, name: str, modules: bytes) -> None:
        """Have the modules of adapters; between passes. Raises MissingExtraError."""
        self._put(functools.partial(self._adapters.add, name, modules)).result()

    def withdraw(self, name: str) -> None:
        """Drop them, after the requests that have come."""
        with suppress(ModelClosedError):
            self._put(functools.partial(self._adapters.drop, name))

    @property
    def texts(self) -> int:
        """The number of texts with caches here."""
        return len(self._texts)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closed = True
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._texts.clear()
        self._saved.clear()

    def _put(self, work: Callable[[], Any], request: StageRequest | None = None) -> Future[Any]:
        self._require_open()
        future: Future[Any] = Future()
        self._queue.put(_Work(functools.partial(_settle, future, work), request))
        return future

    def _require_open(self) -> None:
        if self._closed:
            raise ModelClosedError(f"the stage on {self._name} is closed")

    def _serve(self) -> None:
        torch.set_grad_enabled(False)
        use_here(self._device)
        scheduler = Scheduler(self._binding)
        while (works := self._take_all()) is not None:
            for group in _in_turn(works):
                self._serve_together(group, scheduler)

    def _serve_together(self, works: Sequence[_Work], scheduler: Scheduler) -> None:
        for work in works:
            scheduler.add(work.run)
        while scheduler.fibers:
            scheduler.run_pass()

    def _take_all(self) -> list[_Work] | None:
        """Everything that waits, at least one, and what else its passes expect; None at the end, when what waits is refused."""
        works: list[_Work] = []
        item, until = self._queue.get(), time.monotonic() + self._binding.pass_read_s
        with suppress(queue.Empty):
            while item is not None:
                works.append(item)
                self._arrivals.note(item.request)
                lacking_s = until - time.monotonic() if self._arrivals.are_lacking else 0.0
                item = self._queue.get(timeout=lacking_s) if lacking_s > 0 else self._queue.get_nowait()
        self._arrivals.go()
        if item is not None:
            return works
        for work in works:
            work.run()
        return None

    def _run(self, request: StageRequest) -> StageAnswer:
        """One request, in a fiber."""
        self._require_open()
        cache = None if request.text is None else self._cache_of(request.text)
        match request.work:
            case None:
                return StageAnswer(None, {}, 0.0)
            case Wanted() as wanted:
                return StageAnswer(_copies(cache, wanted), {}, 0.0)
            case CallsInParts(parts) as work if len(parts) > 1 and not self._computes_parts:
                return _joined([self._run_layers(request, one, cache) for one in _apart(work)])
            case work:
                return self._run_layers(request, work, cache)

    def _run_layers(self, request: StageRequest, work: Calls | CallsInParts, cache: Any) -> StageAnswer:
        """This work of a request, in one pass."""
        self._adapters.use(request.setting.adapters)
        self._set_attention(request.setting.attention)
        with self._binding.root_pass(request.sequences), self._shown.taking(request.inside) as inside:
            start = time.perf_counter()
            kept = {} if request.text is None else self._saved[request.text.name]
            output, ends = self._outputs(work, cache, kept)
            finish([output, [found for _, found in inside]])
            end_turns(cache)
            seconds = time.perf_counter() - start
        facts = {} if cache is None else {index: facts_of(layer_at(cache, index)) for index in own_layers(cache)}
        return StageAnswer(output, facts, seconds, tuple(inside), ends)

    def _outputs(self, work: Calls | CallsInParts, cache: Any, kept: dict[int, Any]) -> tuple[Any, Copies]:
        """What layers return, and what they held at the ends of blocks."""
        if isinstance(work, Calls):
            return self._run_calls(work.calls, GivenArguments(self._device, cache, kept)), {}
        ends = None if work.ends is None else BlockEnds.made(cache, work.ends)
        output = self._run_parts(work, cache, kept, ends)
        return output, {} if ends is None else ends.copies

    def _run_calls(self, calls: Sequence[LayerCall], given: GivenArguments) -> Any:
        """The output of the last of them."""
        output: Any = None
        for call in calls:
            args, kwargs = given.of(call)
            output = self._layers[call.layer](*args, **kwargs)
            given.go_on(output)
        return output

    def _run_parts(self, work: CallsInParts, cache: Any, kept: dict[int, Any], ends: BlockEnds | None) -> list[Any]:
        """The outputs of all parts, which go through each layer one after another."""
        masks, parts = PartMasks.made(work.masks, self._device), work.parts
        outputs: list[Any] = [None] * len(parts)

        def show(index: int) -> None:
            masks.show(parts[index].first, parts[index].stop - parts[index].first)

        def run(index: int) -> None:
            part = parts[index]
            own = PartCache(cache, part.first, part.stop, ends)
            given = GivenArguments(self._device, own, kept, lambda kind: masks.one(kind, part.first, part.stop - part.first))
            outputs[index] = self._run_calls(part.calls, given)

        works = [functools.partial(run, index) for index in range(len(parts))]
        if len(works) == 1:
            show(0)
            run(0)
        else:
            run_in_parts(self._binding, works, self._layer_of, show)
        return outputs

    def _set_attention(self, changed: str | None) -> None:
        """Have the layers compute as all requests of this pass ask."""
        for config, loaded in zip(self._configs, self._attention, strict=True):
            name = loaded if changed is None else changed
            if attention_of(config) != name:
                set_attention(config, name)

    def _cache_of(self, text: TextOfRequest) -> Any:
        """The cache of a text after its changes."""
        if text.new is not None:
            moved = move_states(text.new.cache, self._device)
            is_plain = text.new.recipe is None
            self._texts[text.name] = moved if is_plain else put_back_in_tiers(moved, self._make_text(text.new.recipe))
        cache = self._texts.get(text.name)
        if cache is None:
            raise KeyError(f"the stage on {self._name} has no cache of text {text.name}")
        self._change(text.name, cache, text.changes)
        return cache

    def _fork(self, text: str, changes: Sequence[Change], copied: str) -> None:
        cache = self._texts[text]
        self._change(text, cache, changes)
        self._texts[copied] = copy.deepcopy(cache)

    def _forget(self, text: str) -> None:
        self._texts.pop(text, None)
        self._saved.pop(text, None)

    def _change(self, text: str, cache: Any, changes: Sequence[Change]) -> None:
        for change in changes:
            change_layer(cache, change.layer, change.name, bring(change.args, self._device), self._saved[text])


def _apart(work: CallsInParts) -> Iterator[CallsInParts]:
    """Each part by itself, in order."""
    for part in work.parts:
        yield replace(work, parts=(part,))


def _joined(answers: Sequence[StageAnswer]) -> StageAnswer:
    outputs = [output for answer in answers for output in answer.output]
    ends: dict[int, dict[str, torch.Tensor]] = {}
    for answer in answers:
        for block, copies in answer.ends.items():
            ends.setdefault(block, {}).update(copies)
    return replace(answers[-1], output=outputs, seconds=sum(answer.seconds for answer in answers), ends=ends)


def _copies(cache: Any, wanted: Wanted) -> dict[str, torch.Tensor]:
    """Copies in memory of the host of what a cache has between two tokens."""
    found = states_between(cache, wanted.first, wanted.stop, wanted.without)
    if found is None:
        raise KeyError(f"a layer of the cache has forgotten tokens {wanted.first} to {wanted.stop}")
    return {name: states.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, states in found.items()}


def _calls_of(request: StageRequest) -> Iterator[LayerCall]:
    match request.work:
        case Calls(calls):
            yield from calls
        case CallsInParts(parts):
            for part in parts:
                yield from part.calls


def _tensors_of_changes(changes: Sequence[Change]) -> list[Any]:
    return [change.args for change in changes]


def _tensors_of(call: LayerCall) -> list[Any]:
    values = [*call.args, *call.kwargs.values()]
    return [value.tensor if isinstance(value, KeptTensor) else value for value in values]


def _in_turn(works: Sequence[_Work]) -> Iterator[list[_Work]]:
    """What may be done together: passes that follow one another with the same setting, and what is no pass."""
    group: list[_Work] = []
    setting: PassSetting | None = None
    for work in works:
        if setting is not None and work.setting not in (None, setting):
            yield group
            group, setting = [], None
        group.append(work)
        setting = setting or work.setting
    yield group


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - raised in whoever waits
        future.set_exception(error)
    else:
        future.set_result(result)
