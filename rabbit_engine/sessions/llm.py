"""`LLM`: a model with the methods of vLLM's class, for scripts written for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model import AutoModel, StreamedModel
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.sessions.answer import Reply
from rabbit_engine.sessions.constraints import CompiledConstraint
from rabbit_engine.sessions.params import read_params
from rabbit_engine.sessions.sampling import TokenLogprob
from rabbit_engine.sessions.session import Session
from rabbit_engine.sessions.underway import Request
from rabbit_engine.tasks.classification import labeller_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log probability of a token; `rank` counts from 1 among the alternatives that were asked for, None outside them."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `finish_reason` is "stop" or "length"; the logprobs are None unless `logprobs` was given."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt with its answers; of a chat, `prompt` is what the template made of it."""

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of a text."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """The scores of a text by the index of their label, and the best `label`."""

    probs: list[float]
    label: str


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """The similarity or relevance of two texts."""

    score: float


@dataclass(frozen=True, slots=True)
class TaskOutput(Generic[T]):
    """What was computed of a text."""

    request_id: str
    outputs: T
    finished: bool = True


class LLM:
    """A model that answers lists of prompts, each pass over the weights for as many as memory holds.

    The methods and their results are those of vLLM's class of this name, as far as scripts use them; the answers are those of
    `Session`. Close it, or use it in a `with` block.

    Args:
        model: a loaded model, which stays open, or what `AutoModel.from_pretrained` takes, with its keywords as `loading`.
        max_requests: texts under way at once; memory may allow fewer.
        exact: as of `Session`.
    """

    def __init__(self, model: str | Path | SessionModel, *, max_requests: int = 256, exact: bool = True, **loading: Any) -> None:
        self._own: StreamedModel | None = None
        if isinstance(model, str | Path):
            self._own = AutoModel.from_pretrained(model, **loading)
            given: SessionModel = self._own
        elif loading:
            raise ConfigurationError(f"the model is loaded: {next(iter(loading))} has no effect")
        else:
            given = model
        try:
            self.session = Session(given, max_requests=max_requests, exact=exact)
        except BaseException:
            self._close_own()
            raise
        self._count = 0

    @property
    def model(self) -> SessionModel:
        """The streamed model."""
        return self.session.model

    def get_tokenizer(self) -> Any:
        """The tokenizer of the checkpoint."""
        return self.model.tokenizer

    def generate(self, prompts: Any, sampling_params: object = None) -> list[RequestOutput]:
        """Continue prompts: a text, `{"prompt": text}` or `{"prompt_token_ids": ids}`, or a list of them.

        `sampling_params` are `SamplingParams`, vLLM's own, `Options`, or a list with one for each prompt; None leaves all
        choices to the checkpoint. Raises as `Session.generate` does.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        requests = [
            (self.session.request_text(_text_of(prompt), **options), count)
            for prompt, (options, count) in zip(many, _params_of(sampling_params, len(many)), strict=True)
        ]
        return self._answer(requests)

    def chat(self, messages: Any, sampling_params: object = None, **template: Any) -> list[RequestOutput]:
        """Answer a conversation, or a list of them; `template` are variables of the chat template, such as `tools`."""
        is_one = bool(messages) and not isinstance(messages[0], list | tuple)
        many = [messages] if is_one else list(messages)
        requests = [
            (self.session.request(conversation, **template, **options), count)
            for conversation, (options, count) in zip(many, _params_of(sampling_params, len(many)), strict=True)
        ]
        return self._answer(requests)

    def embed(self, prompts: Any, **options: Any) -> list[TaskOutput[EmbeddingOutput]]:
        """The vectors of texts; `options` are those of `Session.embed`."""
        vectors = self.session.embed(_texts_of(prompts), **options)
        return [TaskOutput(self._next_id(), EmbeddingOutput(vector)) for vector in vectors.tolist()]

    def classify(self, prompts: Any, **options: Any) -> list[TaskOutput[ClassificationOutput]]:
        """The labels of texts; `options` are those of `Session.classify`."""
        labels = labeller_of(self.model.config).labels
        found = []
        for each in self.session.classify(_texts_of(prompts), **options):
            scores = {pair.label: pair.score for pair in each.scores}
            probs = [scores[label] for label in labels]
            found.append(TaskOutput(self._next_id(), ClassificationOutput(probs, each.label)))
        return found

    def score(self, text_1: str | Sequence[str], text_2: str | Sequence[str], **options: Any) -> list[TaskOutput[ScoringOutput]]:
        """How relevant each of `text_2` is to `text_1`, or to the one at its place; `options` are those of `Session.rerank`."""
        queries, documents = ([texts] if isinstance(texts, str) else list(texts) for texts in (text_1, text_2))
        if len(queries) == 1:
            scores = [each.score for each in self.session.rerank(queries[0], documents, **options)]
        elif len(queries) == len(documents):
            pairs = zip(queries, documents, strict=True)
            scores = [self.session.rerank(query, [document], **options)[0].score for query, document in pairs]
        else:
            raise ConfigurationError(f"{len(queries)} texts and {len(documents)}: give one and any number, or as many of both")
        return [TaskOutput(self._next_id(), ScoringOutput(score)) for score in scores]

    def close(self) -> None:
        """End the session, and close the model unless it was passed in. Idempotent."""
        self.session.close()
        self._close_own()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_own(self) -> None:
        if self._own is not None:
            self._own.close()

    def _answer(self, asked: Sequence[tuple[Request, int]]) -> list[RequestOutput]:
        replies = iter(self.session.answers([copy for request, count in asked for copy in request.copies(count)]))
        return [self._output(request, [next(replies) for _ in range(count)]) for request, count in asked]

    def _output(self, request: Request, replies: Sequence[Reply]) -> RequestOutput:
        ids = list(request.prompt.ids)
        outputs = [self._completion(index, reply, request.constraint) for index, reply in enumerate(replies)]
        return RequestOutput(self._next_id(), str(self.model.tokenizer.decode(ids)), ids, outputs)

    def _completion(self, index: int, reply: Reply, constraint: CompiledConstraint | None) -> CompletionOutput:
        found = reply.logprobs
        total = None if found is None else sum(each.logprob for each in found)
        tables = None if found is None else [self._table(each) for each in found]
        text = reply.text if constraint is None else reply.answer  # which scripts parse
        return CompletionOutput(index, text, list(reply.tokens), reply.finish_reason, total, tables)

    def _table(self, found: TokenLogprob) -> dict[int, Logprob]:
        ranks = {token: rank for rank, (token, _) in enumerate(found.top, 1)}
        values = {found.token: found.logprob, **dict(found.top)}
        decode = self.model.tokenizer.decode
        return {token: Logprob(value, ranks.get(token), str(decode([token]))) for token, value in values.items()}

    def _next_id(self) -> str:
        self._count += 1
        return str(self._count - 1)


def _params_of(params: object, count: int) -> list[tuple[dict[str, Any], int]]:
    """The options and the number of answers of each prompt. Raises ConfigurationError for another number of them."""
    if not isinstance(params, list | tuple):
        return [read_params(params)] * count
    if len(params) != count:
        raise ConfigurationError(f"{len(params)} sampling parameters for {count} prompts")
    return [read_params(each) for each in params]


def _text_of(prompt: Any) -> Any:
    if not isinstance(prompt, Mapping):
        return prompt
    found = prompt.get("prompt_token_ids") or prompt.get("prompt")
    if found is None:
        raise ConfigurationError(f"a prompt needs prompt or prompt_token_ids, and has {', '.join(map(str, prompt)) or 'nothing'}")
    return found


def _texts_of(prompts: Any) -> list[Any]:
    many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    return [_text_of(prompt) for prompt in many]
