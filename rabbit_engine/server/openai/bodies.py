"""Turns API requests into session requests, and replies into response bodies: for the server, and for batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rabbit_engine.server.flow import AnswerFlow, AnswerForm, form_of
from rabbit_engine.server.openai import wire as words
from rabbit_engine.server.openai.constraints import forced_call
from rabbit_engine.server.openai.fields import unsupported
from rabbit_engine.server.openai.schema import ChatRequest, CompletionRequest
from rabbit_engine.server.openai.wire import Wire
from rabbit_engine.sessions import Reply, Request, Session, TokenLogprob
from rabbit_engine.sessions.works import Work
from rabbit_engine.tasks.scoring import Score

PromptWork = Work[Score, list[Score]]


class Bodies:
    """The bodies that a session's model takes and gives, under the name that clients call it."""

    def __init__(self, session: Session, name: str) -> None:
        self._session, self._name = session, name

    def chat_requests(self, asked: ChatRequest) -> list[Request]:
        """One request for each answer. Raises for what is not supported."""
        asked.refuse_unsupported()
        template = asked.template()
        for name in ("reasoning_effort", "documents"):
            if getattr(asked, name) and not self._session.template_reads(name):
                raise unsupported(name, "the checkpoint's chat template does not read it")
        forced = forced_call(
            self._session, asked.tool_choice, asked.offered_tools, asked.form, parallel=asked.parallel_tool_calls is not False
        )
        with forced.errors():
            request = self._session.request(asked.messages, **template, **asked.options(), **forced.options)
        return request.copies(asked.choices)

    def form(self, asked: ChatRequest, request: Request) -> AnswerForm:
        """How to read the answers to a request."""
        return form_of(self._session, request, asked.tool_names, asked.most_calls)

    def chat(self, asked: ChatRequest, requests: Sequence[Request], replies: Sequence[Reply]) -> dict[str, object]:
        """A whole chat answer."""
        wire = Wire("chat.completion", self._name, self._session.model.tokenizer)
        read = [AnswerFlow.read(self.form(asked, request), reply) for request, reply in zip(requests, replies, strict=True)]
        choices = [
            words.chat_choice(wire, index, reply, answer) for index, (reply, answer) in enumerate(zip(replies, read, strict=True))
        ]
        return wire.body(choices, replies)

    def text_requests(self, asked: CompletionRequest) -> list[Request]:
        """One request for each completion. Raises for what is not supported."""
        asked.refuse_unsupported()
        special = asked.add_special_tokens is not False
        form = asked.form
        options = {**asked.options(), **form.options, "special_tokens": special}
        with form.errors():
            found = [self._session.request_text(prompt, **options) for prompt in asked.prompts]
        return [copy for request in found for copy in request.copies(asked.choices)]

    def prompt_work(self, asked: CompletionRequest, requests: Sequence[Request]) -> PromptWork | None:
        """The log probabilities of the prompts' tokens, if the request wants them. Raises as `Session.score`."""
        if asked.prompt_alternatives is None:
            return None
        prompts = [list(request.prompt.ids) for request in requests[:: asked.choices]]
        scored = [ids for ids in prompts if len(ids) > 1]
        return self._session.scoring(scored, special_tokens=False, alternatives=asked.prompt_alternatives)

    def text(
        self, asked: CompletionRequest, requests: Sequence[Request], replies: Sequence[Reply], scores: Sequence[Score] = ()
    ) -> dict[str, object]:
        """A whole completion; `scores` are those of `prompt_work`."""
        wire = Wire("text_completion", self._name, self._session.model.tokenizer)
        own = _each_score(asked, requests, scores)
        choices = [
            self._text_choice(wire, asked, requests[index], index, reply, own[index]) for index, reply in enumerate(replies)
        ]
        return {**wire.body(choices, replies), "usage": words.usage_of_prompts(replies, asked.choices)}

    def _text_choice(
        self, wire: Wire, asked: CompletionRequest, request: Request, index: int, reply: Reply, score: Score | None
    ) -> dict[str, object]:
        logprobs = None if reply.logprobs is None else wire.legacy_logprobs(reply.logprobs)
        prompt = _scored_tokens(request, score)
        if asked.echo and asked.logprobs is not None:
            logprobs = wire.echoed_logprobs(prompt, reply.logprobs or (), asked.logprobs)
        text = self.echo(asked, request) + reply.text
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": words.reason(reply)}
        if asked.prompt_logprobs is not None:
            ranks = () if score is None else score.ranks
            choice["prompt_logprobs"] = wire.prompt_logprobs(prompt, ranks, asked.prompt_logprobs)
        return choice

    def echoes(
        self, wire: Wire, asked: CompletionRequest, requests: Sequence[Request], scores: Sequence[Score]
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """For each answer, the echo that begins it and its log probabilities."""
        for request, score in zip(requests, _each_score(asked, requests, scores), strict=True):
            is_told = asked.echo and asked.logprobs is not None
            found = wire.echoed_logprobs(_scored_tokens(request, score), (), asked.logprobs or 0) if is_told else None
            yield self.echo(asked, request), found

    def echo(self, asked: CompletionRequest, request: Request) -> str:
        """The prompt's text if the answer should begin with it, else an empty one."""
        return str(self._session.model.tokenizer.decode(request.prompt.ids, skip_special_tokens=True)) if asked.echo else ""


def without_answer(request: Request) -> Reply:
    """The reply to a request for no tokens."""
    return Reply("", (), "length", len(request.prompt.ids), cut_tokens=request.prompt.cut_tokens)


def _each_score(asked: CompletionRequest, requests: Sequence[Request], scores: Sequence[Score]) -> list[Score | None]:
    """The score of each request's prompt; several answers share one, and prompts of one token have none."""
    rest = iter(scores)
    own = [next(rest) if scores and len(request.prompt.ids) > 1 else None for request in requests[:: asked.choices]]
    return [own[index // asked.choices] for index in range(len(requests))]


def _scored_tokens(request: Request, score: Score | None) -> list[TokenLogprob]:
    """The tokens of a prompt with their log probabilities; the first has none, and is 0 here."""
    first, *rest = (int(token) for token in request.prompt.ids)
    found = [TokenLogprob(first, 0.0)]
    if score is not None:
        told = zip(rest, score.token_logprobs, score.tops, strict=True)
        found += [TokenLogprob(token, logprob, top) for token, logprob, top in told]
    return found
