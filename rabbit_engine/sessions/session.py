"""`Session`: many conversations with one model, each pass of which serves all that are waiting."""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

from transformers import GenerationConfig

from rabbit_engine.architectures import stated_positions
from rabbit_engine.errors import ConfigurationError, PromptTooLongError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.demand import Demand
from rabbit_engine.sessions.answer import AnswerText, Piece, Reply
from rabbit_engine.sessions.encoding import Encoder
from rabbit_engine.sessions.engine import Cancelled, Engine, Job
from rabbit_engine.sessions.foreign import refuse_foreign
from rabbit_engine.sessions.futures import Promise, computing_job, own_error
from rabbit_engine.sessions.generation import Generation, ends_of
from rabbit_engine.sessions.messages import read_messages
from rabbit_engine.sessions.options import NAMES, Options
from rabbit_engine.sessions.prompts import Limits, Message, Overflow, Prompt, fit_messages, fit_text
from rabbit_engine.sessions.room import measure_room
from rabbit_engine.sessions.template import TemplateVariables
from rabbit_engine.streaming import PassProgress

logger = logging.getLogger(__name__)

T = TypeVar("T")
Event = Piece | Reply | BaseException
Tell = Callable[[int, Event], None]
Chat = str | Message | Sequence[object]
"""A user's words, or messages as `{"role": "user", "content": "..."}` and in the other forms of `read_messages`."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt that fits and what is asked of its answer; `Session.ask` takes it."""

    prompt: Prompt
    options: Options


class Ticket:
    """A request under way. `cancel()` gives its place up; its end is told with what there is of the answer."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job

    def cancel(self) -> None:
        """Cancel it. Safe from any thread, more than once, and after its end."""
        self._engine.cancel(self._job)


class Events:
    """What becomes of requests, for one loop: `(index, Piece)` and last `(index, Reply)` of each. What went wrong is raised.

    `aclose()` gives their places up.
    """

    def __init__(self, session: Session, requests: Sequence[Request], *, bounded: bool = True) -> None:
        session.require_other_thread()
        self._loop, self._inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self._session, self._left = session, len(requests)
        self._tickets = session.ask(requests, self._tell, bounded=bounded)

    def _tell(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, event))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Piece | Reply]:
        self._session.require_process()
        if not self._left:
            raise StopAsyncIteration
        index, event = await self._inbox.get()
        if isinstance(event, BaseException):
            await self.aclose()
            raise event
        self._left -= isinstance(event, Reply)
        return index, event

    async def aclose(self) -> None:
        """Give up what is not over."""
        self._left = 0
        _cancel(self._tickets)


class Session:
    """Answers for a loaded model: one thread runs it, any number of threads and coroutines may ask.

    A pass over the weights serves every answer that is under way, and one that is asked for meanwhile joins the next; how
    many at a time is bounded by `max_requests` and by the memory that is free for their caches. Each gets what
    `model.generate` would give it alone, bit for bit, whatever its options, on every model that generates. Close it, or use
    it in a `with` block: a session that is only dropped keeps its thread and its model.

    Args:
        model: as `AutoModel.from_pretrained` returned it; it is not closed with the session.
        max_requests: answers under way at a time.
        max_queue: requests that may wait meanwhile; more raise QueueFullError.
        max_new_tokens: of an answer for which neither the request nor the checkpoint says a number.
        overflow: what becomes of a prompt that is too long: "refuse" raises PromptTooLongError, "truncate" leaves out the
            oldest messages (never the system's) or the beginning of a text, and says how much in `Reply.cut_tokens`.
        exact: False lets the texts of a pass share their matrix products: faster where computing takes longer than moving
            the weights, but results then differ by rounding from those alone.

    The model, its tokenizer and its generation config stay as they are; after `close` the model's layers do, too. A child
    that is forked from this process has no session: using one raises ModelClosedError there, closing it does nothing.

    Raises:
        ConfigurationError: for a wrong argument.
        ModelClosedError: for a model that is closed, or that was loaded before this process was forked.
    """

    def __init__(
        self,
        model: SessionModel,
        *,
        max_requests: int = 16,
        max_queue: int = 64,
        max_new_tokens: int = 1024,
        overflow: Overflow = "refuse",
        exact: bool = True,
    ) -> None:
        runtime = runtime_of(model)
        if overflow not in ("refuse", "truncate"):
            raise ConfigurationError(f'overflow={overflow!r}: it is "refuse" or "truncate"')
        if not all(isinstance(count, int) for count in (max_requests, max_queue, max_new_tokens)):
            raise ConfigurationError("max_requests, max_queue and max_new_tokens are whole numbers")
        if max_requests < 1 or max_queue < 0 or max_new_tokens < 1:
            raise ConfigurationError("max_requests and max_new_tokens are 1 at least, max_queue is 0 at least")
        runtime.transfer.require_open()
        self.model = model
        self._template = TemplateVariables(model)
        self._overflow = overflow
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        if max_requests > 1 and (why := keeps_state(model)):
            logger.warning("%s keeps %s in its modules: its answers are given one at a time", type(model).__name__, why)
            max_requests = 1
        self.most_requests = max_requests + max_queue
        """As many may be under way and wait at a time."""

        self._room = measure_room(runtime.free_bytes(), runtime.partition.probe, _positions(model))
        config = model.generation_config if model.can_generate() else None
        own = max_new_tokens if config is None or config.max_new_tokens is None else config.max_new_tokens
        if config is not None:
            _tell_what_is_left_out(config)
        whole = config.max_length if config is not None and config.max_new_tokens is None else None
        self._limits = Limits(self._room.most_tokens, own, whole)
        self._encoder = Encoder(model, self._vocabulary, self._limits.most if overflow == "refuse" else None)
        self._engine = Engine(model, self._room, most=max_requests, queue=max_queue, exact=exact)

    # The methods for most uses.

    def chat(self, messages: Chat, /, **options: Any) -> Reply:
        """The answer to a conversation, or to a user's words.

        `options` are those of `Options` (`max_new_tokens`, `temperature`, `stop` ...), and what the chat template takes,
        such as `tools`. Raises PromptTooLongError, QueueFullError, ConfigurationError, or what the model raises.
        """
        return self._wait_for([self.request(messages, **options)])[0]

    def stream(self, messages: Chat, /, **options: Any) -> Generator[str, None, Reply]:
        """The same, piece by piece. Leaving the loop gives the place up. The generator's return value is the Reply."""
        return self._pieces(self.request(messages, **options))

    def generate(self, prompts: str | Sequence[str | Sequence[int]], **options: Any) -> list[Reply]:
        """Continue many texts (or lists of token ids) at once: one pass serves all, the replies come in their order.

        More than `max_requests` take turns; `max_queue` does not bound them.
        """
        return self._wait_for(self._requests(prompts, options), bounded=False)

    async def achat(self, messages: Chat, /, **options: Any) -> Reply:
        """`chat`, awaited. A task that is cancelled gives its place up."""
        request = await asyncio.to_thread(self.request, messages, **options)
        async with aclosing(self.events([request])) as events:
            replies = [event async for _, event in events if isinstance(event, Reply)]
        return replies[0]

    async def astream(self, messages: Chat, /, **options: Any) -> AsyncIterator[str]:
        """`stream`, awaited."""
        request = await asyncio.to_thread(self.request, messages, **options)
        async with aclosing(self.events([request])) as events:
            async for _, event in events:
                if isinstance(event, Piece) and event.text:
                    yield event.text

    async def agenerate(self, prompts: str | Sequence[str | Sequence[int]], **options: Any) -> list[Reply]:
        """`generate`, awaited. A task that is cancelled gives all places up."""
        requests = await asyncio.to_thread(self._requests, prompts, options)
        replies: dict[int, Reply] = {}
        async with aclosing(Events(self, requests, bounded=False)) as events:
            async for index, event in events:
                if isinstance(event, Reply):
                    replies[index] = event
        return [replies[index] for index in range(len(requests))]

    # What a server needs.

    def request(self, messages: Chat, /, **options: Any) -> Request:
        """The tokens of a conversation, cut where it is too long and that was asked for. Raises as `chat` does."""
        chosen, template = self._split(options)
        self._template.check(template)
        conversation = read_messages(messages)
        prompt = fit_messages(self._encoder, conversation, self._limits, chosen.max_new_tokens, self._overflow, template)
        return Request(prompt, chosen)

    def request_text(self, text: str | Sequence[int], *, special_tokens: bool = True, **options: Any) -> Request:
        """The tokens of a text that is to be continued, with those that the tokenizer puts around it."""
        chosen, unknown = self._split(options)
        if unknown:
            name, value = next(iter(unknown.items()))
            refuse_foreign(name, value)
            raise ConfigurationError(f"{name}: no such option; there are {', '.join(NAMES)}")
        ids = self._encoder.encode_text(text, special=special_tokens)
        return Request(fit_text(ids, self._limits, chosen.max_new_tokens, self._overflow), chosen)

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """Token ids of a text. Raises ConfigurationError where it has none, or ids that the model does not know."""
        self.require_process()
        return self._encoder.encode_text(text)

    def ask(self, requests: Sequence[Request], tell: Tell, *, bounded: bool = True) -> list[Ticket]:
        """Put all of them into the queue, or none: QueueFullError if it is `bounded`.

        `tell(index, event)` is called from the session's thread (or from one that cancels) and must return at once: with
        pieces, and then once with the Reply or with what went wrong.
        """
        jobs = [self._job(request, index, tell) for index, request in enumerate(requests)]
        self._engine.submit(jobs, bounded=bounded)
        return [Ticket(self._engine, job) for job in jobs]

    def events(self, requests: Sequence[Request]) -> Events:
        """Ask for them now, and hear of them in the loop that runs: QueueFullError."""
        return Events(self, requests)

    def call(self, works: Sequence[tuple[Callable[[], T], int]]) -> list[Future[T]]:
        """Run every `work()` in the session's thread, in step with the answers: what they ask of the model shares passes.

        With each comes the length in tokens of what it computes. A future that is cancelled is not begun. A work may ask the
        model, but not wait for the session, which raises ConfigurationError there. Raises QueueFullError if the queue is full
        already; together they may be more than it holds.
        """
        self.require_process()
        if self._engine.is_full:
            self._engine.refuse()
        futures: list[Future[T]] = [Promise(self) for _ in works]
        jobs = [computing_job(work, tokens, future) for (work, tokens), future in zip(works, futures, strict=True)]
        self._engine.submit(jobs, bounded=False)
        return futures

    def refuse_longer(self, ids: Sequence[int]) -> None:
        """Raise PromptTooLongError for more tokens than there is room for."""
        if len(ids) > self._limits.most:
            raise PromptTooLongError(f"{len(ids)} tokens are more than the {self._limits.most} that there is room for")

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._engine.waiting

    @property
    def running(self) -> int:
        """Answers that every pass serves."""
        return self._engine.running

    @property
    def most_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together: the model's positions, or what memory allows."""
        return self._limits.most

    @property
    def progress(self) -> PassProgress | None:
        """Where the pass is that runs now."""
        return self.model.progress

    def require_process(self) -> None:
        """Raise ModelClosedError in a process that was forked after the model was loaded: nothing would ever answer there."""
        self._engine.require_process()

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread: what waits there for an answer would wait for itself."""
        self._engine.require_other_thread()

    def close(self) -> None:
        """Cancel what is under way and end the thread; the model stays open, as it was before. Safe to call again."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, options: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
        """What is ours to decide, and what goes to the chat template."""
        self.require_process()
        if not self.model.can_generate():
            raise ConfigurationError(f"{type(self.model).__name__} makes vectors of texts, it does not generate any")
        chosen = {name: value for name, value in options.items() if name in NAMES and value is not None}
        try:
            found = Options(**chosen)
        except TypeError as error:
            raise ConfigurationError(f"an option has a value of the wrong type: {error}") from error
        for name in ("logit_bias", "stop_token_ids"):
            wrong = next((token for token in getattr(found, name) if not 0 <= token < self._vocabulary), None)
            if wrong is not None:
                raise ConfigurationError(f"{name} names token id {wrong}, the vocabulary has {self._vocabulary}")
        return found, {name: value for name, value in options.items() if name not in NAMES}

    def template_reads(self, name: str) -> bool:
        """Whether the chat template has a variable of this name."""
        return self._template.reads(name)

    def _requests(self, prompts: str | Sequence[str | Sequence[int]], options: Mapping[str, Any]) -> list[Request]:
        return [self.request_text(text, **options) for text in _each(prompts)]

    def _job(self, request: Request, index: int, tell: Tell) -> Job:
        prompt = request.prompt
        ends = ends_of(self.model, request.options, prompt.answer_tokens)
        text = AnswerText(self.model.tokenizer, request.options, ends, partial(tell, index))
        generation = Generation(self.model, prompt.ids, request.options, ends, text.take)

        def answer() -> None:
            text.begin()
            generation.run()

        def end(failure: BaseException | None) -> None:
            if failure is not None and not isinstance(failure, Cancelled):
                tell(index, own_error(failure))
                return
            if rest := text.rest():
                tell(index, Piece(rest))
            tell(index, text.reply(len(prompt.ids), prompt.cut_tokens, cancelled=failure is not None))

        return Job(answer, end, Demand(len(prompt.ids), prompt.answer_tokens), seed=request.options.seed)

    def _wait_for(self, requests: Sequence[Request], *, bounded: bool = True) -> list[Reply]:
        """All replies, in their order; the first failure is raised, and cancels the rest."""
        self.require_other_thread()
        inbox: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        replies: dict[int, Reply] = {}
        tickets = self.ask(requests, lambda index, event: inbox.put((index, event)), bounded=bounded)
        try:
            while len(replies) < len(requests):
                index, event = inbox.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Reply):
                    replies[index] = event
        finally:
            _cancel(tickets)
        return [replies[index] for index in range(len(requests))]

    def _pieces(self, request: Request) -> Generator[str, None, Reply]:
        self.require_other_thread()
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tickets = self.ask([request], lambda _, event: inbox.put(event))
        try:
            while not isinstance(event := inbox.get(), Reply):
                if isinstance(event, BaseException):
                    raise event
                if event.text:
                    yield event.text
                    self.require_process()  # the caller may have forked meanwhile
            return event
        finally:
            _cancel(tickets)


def _each(prompts: object) -> list[str | Sequence[int]]:
    """Every prompt by itself. Raises ConfigurationError for anything but a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    found = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(found, Mapping | bytes) or not isinstance(found, Iterable):
        raise ConfigurationError(f"a text or a list of prompts is needed, not a value of type {type(prompts).__name__}")
    found = list(found)
    if found and isinstance(found[0], int):
        raise ConfigurationError("this is one list of token ids, a list of prompts is needed: put it into brackets")
    return found


def _tell_what_is_left_out(config: GenerationConfig) -> None:
    """A session draws or takes the likeliest token: beams and several answers at once are for `generate`."""
    given = {name: getattr(config, name, None) for name in ("num_beams", "num_return_sequences")}
    left_out = ", ".join(f"{name}={value}" for name, value in given.items() if value not in (None, 1))
    if left_out:
        logger.warning("the checkpoint's generation config says %s: a session answers without; model.generate does it", left_out)


def keeps_state(model: SessionModel) -> str | None:
    """What a model remembers outside of its cache, so that texts must not take turns within it; None where nothing does."""
    kinds = [kind for module in model.modules() if (kind := getattr(module, "rope_type", None)) is not None]
    if any("dynamic" in (kind.values() if isinstance(kind, Mapping) else (kind,)) for kind in kinds):
        return "the longest text's rotary frequencies"
    return "its recurrent states" if model.config.model_type == "recurrent_gemma" else None


def _cancel(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


def _positions(model: SessionModel) -> int | None:
    """How many positions the model was made for, or computes right."""
    found = (stated_positions(model.config), runtime_of(model).architecture.positions)
    return min((limit for limit in found if limit), default=None)
