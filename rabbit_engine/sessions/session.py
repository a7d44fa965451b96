"""`Session`: many conversations with one model; each pass over the weights serves all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

from transformers import GenerationConfig

from rabbit_engine.architectures import stated_positions
from rabbit_engine.errors import ConfigurationError, PromptTooLongError
from rabbit_engine.model.long_prompts import why_whole
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.speculating import Speculate, parse_speculate
from rabbit_engine.model.tiered_caches import ways_of
from rabbit_engine.planning.demand import Demand
from rabbit_engine.prefixes import PrefixStore
from rabbit_engine.sessions.answer import AnswerText, Piece
from rabbit_engine.sessions.asking import AnswerMethods, Chat
from rabbit_engine.sessions.beginnings import Beginning
from rabbit_engine.sessions.constrained import compiled_for
from rabbit_engine.sessions.encoding import Encoder, require_text_generation
from rabbit_engine.sessions.engine import Cancelled, Engine, Job
from rabbit_engine.sessions.foreign import refuse_foreign
from rabbit_engine.sessions.forks import Fork, Prefix
from rabbit_engine.sessions.forwards import Forwards
from rabbit_engine.sessions.futures import Promise, computing_job, own_error
from rabbit_engine.sessions.generation import Generation, ends_of, one_by_one
from rabbit_engine.sessions.held import HeldPrefix, hold_prefix
from rabbit_engine.sessions.images import ImageProcessor
from rabbit_engine.sessions.known_prefixes import known_prefixes
from rabbit_engine.sessions.last_text import LastText, continues
from rabbit_engine.sessions.messages import has_images, read_messages
from rabbit_engine.sessions.options import NAMES, Options
from rabbit_engine.sessions.prompts import Limits, Overflow, Prompt, fit_messages, fit_text
from rabbit_engine.sessions.room import measure_room
from rabbit_engine.sessions.tasks import TaskMethods
from rabbit_engine.sessions.template import TemplateVariables
from rabbit_engine.sessions.thinking import thinking_before_form, thinking_of
from rabbit_engine.sessions.underway import Events, Request, Tell, Ticket
from rabbit_engine.streaming import PassProgress
from rabbit_engine.transformers_bridge.generation import settings_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Session(AnswerMethods, TaskMethods):
    """Answers requests for a loaded model: one thread runs it, and any number of threads and coroutines may call.

    Each pass over the weights serves every answer under way, and a new request joins the next pass. `max_requests` and the
    memory free for caches limit how many run at once. Each gets exactly, bit for bit, what `model.generate` would give it
    alone, with any options, on every model that generates. Close the session, or use it in a `with` block: one that is only
    dropped keeps its thread and its model.

    Args:
        model: as `AutoModel.from_pretrained` returned it; closing the session does not close it.
        max_requests: answers under way at once.
        max_queue: requests that may wait; more raise QueueFullError.
        max_new_tokens: the length of an answer if neither the request nor the checkpoint sets it.
        overflow: what to do with a prompt that is too long: "refuse" raises PromptTooLongError, "truncate" drops the oldest
            messages (never the system's) or the beginning of a text, and reports how much in `Reply.cut_tokens`.
        speculate: "auto" or a draft: guess several tokens for each pass to verify; None does what the model was loaded with.
        prefix_store: keeps what was computed for the beginnings of prompts, also for later sessions; with None nothing of them
            is written to disk. Prompts are then computed in parts of its blocks, where the model can, with the results of
            `model.generate(ids, prefill_chunk_size=256)`.
        continue_last: keep what was computed of the text that ended last, for a prompt that begins with its tokens, as the next
            turn of a chat does: only what is new is computed. Results are then those of `model.generate` with the cache of that
            text, which differ by rounding from those of the whole prompt. The prefix store then keeps such states, too, apart
            from those of other sessions, and prompts are computed whole.
        exact: False lets the texts of a pass share matrix products: faster if computing takes longer than moving the weights,
            but results then differ from `model.generate` by rounding.

    The model, its tokenizer and its generation config are unchanged; `close` also restores the model's layers. In a process
    forked from this one, using the session raises ModelClosedError and closing it does nothing.

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
        speculate: Speculate = None,
        exact: bool = True,
        prefix_store: PrefixStore | None = None,
        continue_last: bool = False,
    ) -> None:
        runtime = runtime_of(model)
        if overflow not in ("refuse", "truncate"):
            raise ConfigurationError(f'overflow={overflow!r}: expected "refuse" or "truncate"')
        if not all(isinstance(count, int) for count in (max_requests, max_queue, max_new_tokens)):
            raise ConfigurationError("max_requests, max_queue and max_new_tokens must be integers")
        if max_requests < 1 or max_queue < 0 or max_new_tokens < 1:
            raise ConfigurationError("max_requests and max_new_tokens must be at least 1, max_queue at least 0")
        runtime.transfer.require_open()
        self.model = model
        self._speculate = parse_speculate(speculate)
        self._template = TemplateVariables(model)
        self._images = ImageProcessor(model)
        self._overflow = overflow
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        state = keeps_state(model)
        if max_requests > 1 and state:
            logger.warning("%s keeps %s in its modules: its answers are generated one at a time", type(model).__name__, state)
            max_requests = 1
        self.most_requests = max_requests + max_queue
        """The number of requests that may be under way or waiting."""

        apart = bool(model.config.is_encoder_decoder)
        is_plain = not self._why_whole()
        ways = ways_of(runtime, parts=runtime.computes_parts and is_plain, tiers=is_plain)
        self._room = measure_room(runtime.free_bytes(), runtime.partition.probe, _positions(model), apart, ways)
        config = model.generation_config if model.can_generate() else None
        own = max_new_tokens if config is None or config.max_new_tokens is None else config.max_new_tokens
        if config is not None:
            _tell_what_is_left_out(config)
        whole = config.max_length if config is not None and config.max_new_tokens is None else None
        self._limits = Limits(self._room.most_tokens, own, whole, apart)
        self._encoder = Encoder(model, self._vocabulary, self._limits.most if overflow == "refuse" else None)
        self._stores = ways.parts and not runtime.plan.experts.layers  # small parts would read the same experts many times
        self._last = LastText(model) if continue_last and continues(model) else None
        self._prefixes = None if prefix_store is None else known_prefixes(model, prefix_store, exact=self._last is None)
        self._engine = Engine(
            model, self._room, most=max_requests, queue=max_queue, exact=exact, alone=state is not None, free_last=self._free_last
        )
        self._forwards = Forwards(model, self._room, self._engine, self._vocabulary, exact=exact)

    def fork(self, prefix: Prefix, /, **template: object) -> Fork:
        """Compute a prefix once, for many continuations: a text or token ids that `Fork.generate` continues, or a list of
        messages that `Fork.chat` continues. `template` are variables of the chat template, such as `tools`.

        It waits until the prefix is computed. Close the fork, or use it in a `with` block: it keeps what was computed in memory.
        Raises PromptTooLongError, QueueFullError, ConfigurationError for a model whose texts cannot be forked, or what the model
        raises.
        """
        if state := keeps_state(self.model):
            raise ConfigurationError(f"{type(self.model).__name__} keeps {state} in its modules: a prefix cannot be shared")
        hold = partial(hold_prefix, self.model, self._engine, self._prefixes, self._demand)
        return Fork(self, self._encoder, hold, prefix, template)

    # What a server needs.

    def request(self, messages: Chat, /, **options: object) -> Request:
        """Encode a conversation, truncated if it is too long and truncation is on. Raises as `chat` does."""
        chosen, template = self._split(options)
        self._template.check(template)
        conversation = read_messages(messages, with_images=self.takes_images)
        if has_images(conversation):  # which no truncation keeps whole
            ids, inputs = self._images.encode(conversation, template)
            prompt = Prompt(ids, self._limits.answer_tokens(len(ids), chosen.max_new_tokens), inputs=inputs)
        else:
            prompt = fit_messages(self._encoder, conversation, self._limits, chosen.max_new_tokens, self._overflow, template)
        if chosen.constraint is None:
            return Request(prompt, chosen, thinking=thinking_of(self.model.tokenizer, prompt.ids))
        thinking = thinking_before_form(self.model.tokenizer, prompt.ids, continues=bool(template.get("continue_final_message")))
        return Request(prompt, chosen, compiled_for(self.model, chosen, thinking), thinking)

    def request_text(self, text: str | Sequence[int], *, special_tokens: bool = True, **options: object) -> Request:
        """Encode a text to continue, with the tokenizer's special tokens unless `special_tokens` is False."""
        chosen, unknown = self._split(options)
        if unknown:
            name, value = next(iter(unknown.items()))
            refuse_foreign(name, value)
            raise ConfigurationError(f"{name}: no such option; the options are {', '.join(NAMES)}")
        constraint = compiled_for(self.model, chosen)
        ids = self._encoder.encode_text(text, special=special_tokens)
        return Request(fit_text(ids, self._limits, chosen.max_new_tokens, self._overflow), chosen, constraint)

    def within_room(self, request: Request, tokens: int) -> Request:
        """The request with an answer of up to `tokens` tokens, or of as many as fit after its prompt."""
        most = min(tokens, self._limits.room_for_answer(len(request.prompt.ids)))
        prompt, options = replace(request.prompt, answer_tokens=most), replace(request.options, max_new_tokens=most)
        return replace(request, prompt=prompt, options=options)

    def count_tokens(self, messages: Chat, /, **template: object) -> int:
        """The tokens of a conversation's prompt, also if it is too long to be answered. `template` are variables of the chat
        template. Raises ConfigurationError."""
        _, template = self._split(template)
        self._template.check(template)
        conversation = read_messages(messages, with_images=self.takes_images)
        if has_images(conversation):
            return len(self._images.encode(conversation, template)[0])
        return len(self._encoder.encode_messages(conversation, template, bounded=False))

    def encode(self, text: str | Sequence[int]) -> list[int]:
        """Token ids of a text. Raises ConfigurationError if it has none, or ids outside the vocabulary."""
        self.require_process()
        return self._encoder.encode_text(text)

    def ask(self, requests: Sequence[Request], tell: Tell, *, bounded: bool = True) -> list[Ticket]:
        """Queue all requests, or none. Raises QueueFullError if `bounded` and there is no room.

        `tell(index, event)` is called from the session's thread (or from one that cancels) and must return at once: with
        pieces, then once with the Reply or the exception.
        """
        jobs = [self._job(request, index, tell) for index, request in enumerate(requests)]
        self._engine.submit(jobs, bounded=bounded)
        return [Ticket(self._engine, job) for job in jobs]

    def events(self, requests: Sequence[Request]) -> Events:
        """Queue the requests and return their events for the running event loop. Raises QueueFullError."""
        return Events(self, requests)

    def call(self, works: Sequence[tuple[Callable[[], T], int]]) -> list[Future[T]]:
        """Run every `work()` in the session's thread, in step with the answers: its calls of the model share their passes.

        Each comes with the number of tokens it computes. A cancelled future is not started. A work may call the model, but not
        wait for the session: that raises ConfigurationError. Raises QueueFullError if the queue is already full; the works
        may be more than it holds.
        """
        self.require_process()
        if self._engine.is_full:
            self._engine.refuse()
        futures: list[Future[T]] = [Promise(self) for _ in works]
        jobs = [computing_job(work, Demand(tokens, 0), future) for (work, tokens), future in zip(works, futures, strict=True)]
        self._engine.submit(jobs, bounded=False)
        return futures

    @property
    def waiting(self) -> int:
        """The number of requests that have not started."""
        return self._engine.waiting

    @property
    def running(self) -> int:
        """The number of answers under way."""
        return self._engine.running

    @property
    def start_s(self) -> float:
        """Estimated seconds until a new request would start, from the passes so far and the requests before it."""
        return self._engine.start_s

    @property
    def most_tokens(self) -> int:
        """The most tokens of a prompt and its answer, or of each if an encoder reads the prompt: the model's positions, or what
        memory allows."""
        return self._limits.most

    @property
    def truncates(self) -> bool:
        """Whether a prompt that is too long loses its beginning, instead of being refused."""
        return self._overflow == "truncate"

    @property
    def takes_images(self) -> bool:
        """Whether messages may have images."""
        return self._images.takes_images

    @property
    def progress(self) -> PassProgress | None:
        """The progress of the current pass."""
        return self.model.progress

    def require_process(self) -> None:
        """Raise ModelClosedError in a process forked after the model was loaded: nothing would ever answer there."""
        self._engine.require_process()

    def require_other_thread(self) -> None:
        """Raise ConfigurationError in the session's own thread: waiting there for an answer would never end."""
        self._engine.require_other_thread()

    def close(self) -> None:
        """Cancel what is under way and end the thread. The model stays open, as it was before. Idempotent."""
        self._engine.close()
        self._free_last()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, options: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
        """Split options into those of the session and those of the chat template."""
        self.require_process()
        require_text_generation(self.model)
        chosen = {name: value for name, value in options.items() if name in NAMES and value is not None}
        try:
            found = Options(**chosen)
        except TypeError as error:
            raise ConfigurationError(f"an option has a value of the wrong type: {error}") from error
        for name in ("logit_bias", "stop_token_ids"):
            wrong = next((token for token in getattr(found, name) if not 0 <= token < self._vocabulary), None)
            if wrong is not None:
                raise ConfigurationError(f"{name} contains token id {wrong}, but the vocabulary has {self._vocabulary}")
        return found, {name: value for name, value in options.items() if name not in NAMES}

    def template_reads(self, name: str) -> bool:
        """Whether the chat template has a variable of this name."""
        return self._template.reads(name)

    def _job(self, request: Request, index: int, tell: Tell) -> Job:
        prompt = request.prompt
        ends = ends_of(self.model, request.options, prompt.answer_tokens)
        text = AnswerText(self.model.tokenizer, request.options, ends, partial(tell, index))
        demand = self._demand(prompt, request.held)
        is_whole = not prompt.inputs and request.held is None
        beginning = Beginning(self._prefixes, prompt.ids) if self._prefixes is not None and is_whole else None
        generation = Generation(
            self.model,
            prompt,
            request.options,
            ends,
            text.take,
            self._speculate,
            request.constraint,
            demand=demand,
            beginning=beginning,
            held=request.held,
            last=self._last if is_whole else None,
        )

        def answer() -> None:
            text.begin()
            generation.run()

        def end(failure: BaseException | None) -> None:
            if failure is not None and not isinstance(failure, Cancelled):
                tell(index, own_error(failure))
                return
            if rest := text.rest():
                tell(index, Piece(rest))
            reply = text.reply(
                len(prompt.ids),
                prompt.cut_tokens,
                cancelled=failure is not None,
                complete=generation.is_complete,
                thinking=request.thinking,
            )
            tell(index, replace(reply, cached_tokens=generation.cached_tokens))

        return Job(answer, end, demand, seed=request.options.seed, beginning=beginning, continues=is_whole)

    def _demand(self, prompt: Prompt, held: HeldPrefix | None = None) -> Demand:
        """That of a prompt, in parts if it does not fit whole or if parts are stored. Raises PromptTooLongError for one with
        images that does not fit, or one that does not fit beside what forks hold."""
        room = self._room.beside(self._engine.held_bytes)
        if held is not None:
            return room.demand_after(held.demand, len(held.ids), len(prompt.ids), prompt.answer_tokens)
        if not prompt.inputs:
            found = room.demand(len(prompt.ids), prompt.answer_tokens)
            room.require_beside_forks(found)
            if found.chunk is not None and (setting := self._why_whole()):
                raise PromptTooLongError(
                    f"{len(prompt.ids)} tokens and {prompt.answer_tokens} of the answer fit in memory only in parts, but the "
                    f"model's generation config has {setting}: unset it, shorten the prompt, or request a shorter answer"
                )
            in_blocks = self._stores and self._last is None  # blocks of continued texts depend on how they grew anyway
            known = self._prefixes if in_blocks and self._prefixes is not None and self._prefixes.are_used else None
            stored = known is not None and found.prompt > known.block_tokens
            return replace(found, chunk=known.block_tokens) if stored and known is not None else found
        whole = Demand(len(prompt.ids), prompt.answer_tokens)
        if room.ways.parts and not room.fits([whole]):
            raise PromptTooLongError(
                f"{len(prompt.ids)} tokens with images and {prompt.answer_tokens} of the answer do not fit in memory at once: "
                "send fewer or smaller images, request a shorter answer, or load the model with a larger max_seq_len"
            )
        return whole

    def _free_last(self) -> None:
        if self._last is not None:
            self._last.drop()

    def _why_whole(self) -> str:
        """The setting of the model's generation config with which no prompt is computed in parts."""
        if not self.model.can_generate():
            return ""
        own = self.model.generation_config
        return why_whole(settings_of(one_by_one(own), None, own))


def _tell_what_is_left_out(config: GenerationConfig) -> None:
    """Warn that a session samples or takes the likeliest token: beams and several answers per prompt need `generate`."""
    given = {name: getattr(config, name, None) for name in ("num_beams", "num_return_sequences")}
    left_out = ", ".join(f"{name}={value}" for name, value in given.items() if value not in (None, 1))
    if left_out:
        logger.warning("the checkpoint's generation config sets %s: a session ignores it; call model.generate for it", left_out)


def keeps_state(model: SessionModel) -> str | None:
    """What a model remembers outside its cache, so that texts must not alternate within it; None if nothing."""
    kinds = [kind for module in model.modules() if (kind := getattr(module, "rope_type", None)) is not None]
    if any("dynamic" in (kind.values() if isinstance(kind, Mapping) else (kind,)) for kind in kinds):
        return "the longest text's rotary frequencies"
    return "its recurrent states" if model.config.model_type == "recurrent_gemma" else None


def _positions(model: SessionModel) -> int | None:
    """The number of positions the model was trained for, or computes correctly."""
    found = (stated_positions(model.config), runtime_of(model).architecture.positions)
    return min((limit for limit in found if limit), default=None)
