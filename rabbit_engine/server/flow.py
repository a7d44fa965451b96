"""Splits an answer into reasoning, text and tool calls as it comes; every chat interface is built on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from rabbit_engine.server.calls import CallArguments, CallReader, CallStart, TextPart
from rabbit_engine.sessions import Piece, Reply, Request, Session, TokenLogprob
from rabbit_engine.sessions.thinking import thinking_of


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class SpokenText:
    """Text of the answer, and the log probabilities of the tokens since the last one; the text may be empty."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


Delta = Reasoning | SpokenText | CallStart | CallArguments


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How to read an answer.

    Args:
        names: the functions that the model may call.
        most_calls: the number of calls after which others are dropped; None keeps all.
        thinking: the marks of the template's reasoning; None leaves it in the text.
        begun: whether the prompt itself ends with the first mark, so that the answer begins with reasoning.
        calls_begin: texts with one of which an answer begins if it has calls; none if they may be anywhere.
    """

    names: Collection[str] = ()
    most_calls: int | None = None
    thinking: tuple[str, str] | None = None
    begun: bool = False
    calls_begin: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MadeCall:
    """A call of a function, whose arguments are JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Answer:
    """What the deltas of a whole answer add up to."""

    text: str = ""
    reasoning: str = ""
    calls: list[MadeCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Add the next one."""
        match delta:
            case Reasoning(text):
                self.reasoning += text
            case SpokenText(text):
                self.text += text
            case CallStart(_, identity, name):
                self.calls.append(MadeCall(identity, name, ""))
            case CallArguments(index, text):
                before = self.calls[index]
                self.calls[index] = MadeCall(before.id, before.name, before.arguments + text)


def form_of(session: Session, request: Request, names: Collection[str] = (), most_calls: int | None = None) -> AnswerForm:
    """How to read the answer to a conversation: the chat template shows whether there is reasoning, and the prompt's end
    whether the answer begins with it."""
    constraint = request.constraint
    found = thinking_of(session.model.tokenizer, request.prompt.ids) if constraint is None else constraint.constraint.thinking
    begin = () if constraint is None else constraint.constraint.calls_begin
    if found is None:
        return AnswerForm(names, most_calls, calls_begin=begin)
    return AnswerForm(names, most_calls, (found.begin, found.close), found.begun, begin)


class AnswerFlow:
    """Follows one answer. Deltas of streamed pieces and of the whole reply add up to the same Answer."""

    def __init__(self, form: AnswerForm) -> None:
        self._calls = CallReader(form.names, form.most_calls)
        self._calls_begin, self._undecided = form.calls_begin, ""
        self._thinking = form.thinking
        self._thinks: bool | None = True if form.begun else None if form.thinking else False
        # None until the answer's beginning has shown it
        self._held = ""
        self._trims = form.begun
        self._logprobs: list[TokenLogprob] = []
        self._tokens = 0
        self.reasoning_tokens = 0
        """The number of tokens up to the end of the reasoning so far."""

    @property
    def calls(self) -> int:
        """The number of calls so far."""
        return self._calls.calls

    @property
    def _may_reason(self) -> bool:
        return self._thinks is not False

    def push(self, piece: Piece) -> list[Delta]:
        """The deltas that a piece completes."""
        if piece.logprob is not None:
            self._logprobs.append(piece.logprob)
        thought, self._tokens = self._thinks, self._tokens + (piece.token is not None)
        deltas = list(self._with_logprobs(self._split(piece.text, ended=False)))
        if thought or self._thinks or any(isinstance(delta, Reasoning) for delta in deltas):
            self.reasoning_tokens = self._tokens
        return deltas

    def end(self) -> list[Delta]:
        """The deltas that were held back."""
        deltas = list(self._with_logprobs(self._split("", ended=True)))
        return [*deltas, SpokenText("", tuple(self._logprobs))] if self._logprobs else deltas

    @classmethod
    def read(cls, form: AnswerForm, reply: Reply) -> Answer:
        """A whole answer."""
        flow, answer = cls(form), Answer()
        for delta in (*flow.push(Piece(reply.text)), *flow.end()):
            answer.add(delta)
        return answer

    def _with_logprobs(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if isinstance(delta, SpokenText):
                found, self._logprobs = tuple(self._logprobs), []
                yield SpokenText(delta.text, found)
            else:
                yield delta
        if self._logprobs and not self._calls.names and not self._may_reason:
            found, self._logprobs = tuple(self._logprobs), []
            yield SpokenText("", found)

    def _split(self, text: str, *, ended: bool) -> Iterator[Delta]:
        if self._may_reason:
            self._held += text
            yield from self._reason(ended=ended)
            if self._may_reason:
                return
            text, self._held = self._held, ""
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        text = self._decided(text, ended=ended)
        for part in (*self._calls.push(text), *(self._calls.end() if ended else ())):
            yield SpokenText(part.text) if isinstance(part, TextPart) else part

    def _decided(self, text: str, *, ended: bool) -> str:
        """The text, held back while it may begin calls or an answer without any."""
        if not self._calls_begin:
            return text
        self._undecided += text
        start = self._undecided.lstrip()
        if not start.startswith(self._calls_begin):
            if not ended and any(begin.startswith(start) for begin in self._calls_begin):
                return ""
            self._calls = CallReader(())
        text, self._undecided, self._calls_begin = self._undecided, "", ()
        return text

    def _reason(self, *, ended: bool) -> Iterator[Delta]:
        """Give out reasoning up to its end mark; afterwards the rest is held and `_thinks` is False."""
        assert self._thinking is not None  # noqa: S101 - else `_thinks` is False
        begin, close = self._thinking
        if self._thinks is None:
            start = self._held.lstrip()
            if not start.startswith(begin):
                self._thinks = None if begin.startswith(start) and not ended else False
                return
            self._held, self._thinks, self._trims = start[len(begin) :], True, True
        if self._trims:
            self._held = self._held.lstrip("\n")
            self._trims = not self._held
        inside, mark, after = self._held.partition(close)
        if not mark and not ended:
            inside = self._held[: _certain(self._held, close)].rstrip("\n")
            after = self._held[len(inside) :]
        inside = inside.rstrip("\n") if mark else inside
        if inside:
            yield Reasoning(inside)
        self._held = after
        if mark or ended:
            self._thinks, self._trims = False, bool(mark)


def _certain(text: str, mark: str) -> int:
    """How much of the text cannot be the beginning of the mark."""
    return len(text) - max((size for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
