"""Parts of a prompt on their way through stages: each stage has the parts of a text in order.

A stage that reads weights gets all parts in one request, and computes them in one pass; another gets each part as it comes, so
that stages compute different parts of one prompt at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import Any

from rabbit_engine.streaming.part_masks import PartMasks
from rabbit_engine.streaming.stages.stage import (
    Calls,
    CallsInParts,
    LayerCall,
    MaskOfPart,
    OpenStage,
    PartCalls,
    StageAnswer,
    StageRequest,
)
from rabbit_engine.transformers_bridge.block_ends import EndsRecipe


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What a part asks of a stage: `request` with these `calls`, and copies of what is forgotten at the `ends` of blocks."""

    part: int
    calls: tuple[LayerCall, ...]
    request: StageRequest
    ends: EndsRecipe | None
    answered: Future[StageAnswer]


class _StageLine:
    """The parts that have come to a stage and are not sent yet, and what is under way."""

    def __init__(self, stage: OpenStage, parts: int) -> None:
        self._stage, self._parts = stage, parts
        self._waiting: deque[_Waiting] = deque()
        self._sent: list[Future[StageAnswer]] = []

    def add(self, waiting: _Waiting) -> None:
        """Parts come in order: none overtakes another."""
        self._waiting.append(waiting)

    @property
    def under_way(self) -> list[Future[StageAnswer]]:
        """The answers that are awaited."""
        return [answer for answer in self._sent if not answer.done()]

    def send(self, bounds: Sequence[tuple[int, int]], masks: PartMasks) -> None:
        """Send what may go now: one request at a time, so that parts arrive in order."""
        if self.under_way or not self._waiting:
            return
        if self._stage.reads and len(self._waiting) < self._parts:
            return
        going = list(self._waiting) if self._stage.reads else [self._waiting[0]]
        for _ in going:
            self._waiting.popleft()
        self._sent = [each.answered for each in going]
        self._stage.submit(_joined(going, bounds, masks)).add_done_callback(lambda answer: _settle(going, answer))


class PartHops:
    """The way of the parts of one prompt, tokens `bounds` of the text, through the stages; `masks` are theirs."""

    def __init__(self, bounds: Sequence[tuple[int, int]], masks: PartMasks) -> None:
        self._bounds, self._masks = bounds, masks
        self._lines: dict[int, _StageLine] = {}
        self._known: dict[int, frozenset[Any]] = {}

    def submit(self, stage: OpenStage, part: int, request: StageRequest, ends: EndsRecipe | None) -> Future[StageAnswer]:
        """The request of a part for calls, after those of the parts before it. Its answer comes after `send` was called."""
        assert isinstance(request.work, Calls)  # noqa: S101 - parts of a prompt run layers
        answered: Future[StageAnswer] = Future()
        line = self._lines.setdefault(id(stage), _StageLine(stage, len(self._bounds)))
        line.add(_Waiting(part, request.work.calls, request, ends, answered))
        line.send(self._bounds, self._masks)
        return answered

    def send(self) -> None:
        """Send what may go now. Call it whenever a part has got an answer."""
        for line in self._lines.values():
            line.send(self._bounds, self._masks)

    @property
    def under_way(self) -> list[Future[StageAnswer]]:
        """The answers that are awaited."""
        return [answer for line in self._lines.values() for answer in line.under_way]

    def known_at_first(self, stage: OpenStage, known: Callable[[], frozenset[Any]]) -> frozenset[Any]:
        """What was `known` when the first part came to the stage: all parts make the same requests, whatever is learnt meanwhile.
        Otherwise one that makes fewer would overtake another."""
        if id(stage) not in self._known:
            self._known[id(stage)] = known()
        return self._known[id(stage)]

    def stand_of(self, value: object) -> MaskOfPart | None:
        """What stands for a mask, which each stage makes itself; None for another value."""
        kind = self._masks.kind_of(value)
        return None if kind is None else MaskOfPart(kind)


def first_of(futures: Iterable[Future[Any]]) -> Future[None]:
    """Done as soon as one of them is."""
    first: Future[None] = Future()

    def note(_: Future[Any]) -> None:
        try:
            first.set_result(None)
        except InvalidStateError:
            return  # another was first

    for future in futures:
        future.add_done_callback(note)
    return first


def _joined(going: Sequence[_Waiting], bounds: Sequence[tuple[int, int]], masks: PartMasks) -> StageRequest:
    first = going[0].request
    parts = tuple(PartCalls(each.calls, *bounds[each.part]) for each in going)
    changes = tuple(change for each in going if each.request.text is not None for change in each.request.text.changes)
    text = None if first.text is None else replace(first.text, changes=changes)
    return replace(first, work=CallsInParts(parts, masks.recipe, going[0].ends), text=text)


def _settle(going: Sequence[_Waiting], answer: Future[StageAnswer]) -> None:
    if answer.cancelled():  # as a stage does that is closed
        for each in going:
            each.answered.cancel()
        return
    error = answer.exception()
    if error is not None:
        for each in going:
            each.answered.set_exception(error)
        return
    found = answer.result()
    for each, output in zip(going, found.output, strict=True):
        each.answered.set_result(replace(found, output=output))
        found = replace(found, ends={})  # the first has those of all
