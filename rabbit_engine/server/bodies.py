"""Turns API requests into session requests, and replies into response bodies: for the server, and for batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from rabbit_engine.server import wire as words
from rabbit_engine.server.errors import RequestError
from rabbit_engine.server.fields import unsupported
from rabbit_engine.server.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from rabbit_engine.server.wire import Wire
from rabbit_engine.sessions import Reply, Request, Session
from rabbit_engine.tasks.embedding import Embedder


class Bodies:
    """The bodies that a session's model takes and gives, under the name that clients call it."""

    def __init__(self, session: Session, name: str, embedder: Embedder | None) -> None:
        self._session, self._name, self._embedder = session, name, embedder

    def chat_requests(self, asked: ChatRequest) -> list[Request]:
        """One request for each answer. Raises for what is not supported."""
        asked.refuse_unsupported()
        template = asked.template()
        for name in ("reasoning_effort", "documents"):
            if getattr(asked, name) and not self._session.template_reads(name):
                raise unsupported(name, "the checkpoint's chat template does not read it")
        request = self._session.request(asked.conversation(), **template, **asked.options())
        return request.copies(asked.choices)

    def chat(self, asked: ChatRequest, replies: Sequence[Reply]) -> dict[str, object]:
        """A whole chat answer."""
        wire = Wire("chat.completion", self._name, self._session.model.tokenizer)
        choices = []
        for index, reply in enumerate(replies):
            text, calls = asked.read_calls(reply.text)
            choices.append(words.chat_choice(wire, index, reply, text, calls))
        return wire.body(choices, replies)

    def text_requests(self, asked: CompletionRequest) -> list[Request]:
        """One request for each completion. Raises for what is not supported."""
        asked.refuse_unsupported()
        special = asked.add_special_tokens is not False
        options = asked.options()
        found = [self._session.request_text(prompt, special_tokens=special, **options) for prompt in asked.prompts]
        return [copy for request in found for copy in request.copies(asked.choices)]

    def text(self, asked: CompletionRequest, requests: Sequence[Request], replies: Sequence[Reply]) -> dict[str, object]:
        """A whole completion."""
        wire = Wire("text_completion", self._name, self._session.model.tokenizer)
        choices = [self._text_choice(wire, asked, requests[index], index, reply) for index, reply in enumerate(replies)]
        return {**wire.body(choices, replies), "usage": words.usage_of_prompts(replies, asked.choices)}

    def _text_choice(self, wire: Wire, asked: CompletionRequest, request: Request, index: int, reply: Reply) -> dict[str, object]:
        logprobs = None if reply.logprobs is None else wire.legacy_logprobs(reply.logprobs)
        text = self.echo(asked, request) + reply.text
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": words.reason(reply)}

    def echo(self, asked: CompletionRequest, request: Request) -> str:
        """The prompt's text if the answer should begin with it, else an empty one."""
        return str(self._session.model.tokenizer.decode(request.prompt.ids, skip_special_tokens=True)) if asked.echo else ""

    def embedding_prompts(self, asked: EmbeddingRequest) -> list[list[int]]:
        """The token ids of texts. Raises if the model does not embed."""
        if self._embedder is None:
            raise RequestError(400, f"{self._name} cannot embed texts: it has no sentence-transformers files", param="model")
        found = [self._session.encode(text) for text in asked.inputs]
        for ids in found:
            self._session.refuse_longer(ids)
        return found

    def embedding_works(self, prompts: Sequence[list[int]]) -> list[tuple[Callable[[], torch.Tensor], int]]:
        """What `Session.call` takes to embed them: each work returns a vector, float32 [width]."""
        embedder, model = self._embedder, self._session.model
        assert embedder is not None  # noqa: S101 - `embedding_prompts` rejects it
        return [(partial(embedder.embed, model, ids), len(ids)) for ids in prompts]

    def embeddings(
        self, asked: EmbeddingRequest, prompts: Sequence[list[int]], vectors: Sequence[torch.Tensor]
    ) -> dict[str, object]:
        """Vectors of texts."""
        encoding = asked.encoding_format or "float"
        data = [
            {"object": "embedding", "index": index, "embedding": words.vector(_cut(found, asked.dimensions), encoding)}
            for index, found in enumerate(vectors)
        ]
        tokens = sum(map(len, prompts))
        return {"object": "list", "data": data, "model": self._name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


def _cut(vector: torch.Tensor, dimensions: int | None) -> list[float]:
    """The first dimensions, normalized again; for models trained for it (Matryoshka)."""
    if dimensions is None:
        return [float(value) for value in vector]
    if dimensions > len(vector):
        raise RequestError(400, f"dimensions is {dimensions}, the model's vectors have {len(vector)}", param="dimensions")
    return [float(value) for value in torch.nn.functional.normalize(vector[:dimensions], dim=0)]
