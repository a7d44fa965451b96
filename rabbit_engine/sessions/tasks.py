"""What a session computes besides answers: vectors and labels of many texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch

from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.sessions.forwards import Forwards, logits_of
from rabbit_engine.sessions.inputs import Fit, Text
from rabbit_engine.tasks.batches import Batch, Inputs
from rabbit_engine.tasks.classification import Classification, labeller_of
from rabbit_engine.tasks.embedding import Embedder, embedding_base, find_embedder, hidden_states
from rabbit_engine.tasks.heads import require_head

Pair = tuple[str, str]


class TaskMethods:
    """Tasks over many texts: each pass over the weights computes as many as the memory holds, and the results are in their
    order.

    Every text has a forward of its own, so that its result is, bit for bit, what transformers computes for it alone.
    `exact=False` joins texts of about the same length in padded batches, which is faster where computing takes longer than
    moving the weights: results then differ by rounding, by up to 1e-5 of their size in float32 and 2e-2 in bfloat16.
    None is as the session.

    A text of more tokens than the model, its tokenizer or the memory allow raises PromptTooLongError, unless `truncation`
    drops the rest, or `stride` splits it into windows that share that many tokens with the one before.
    """

    model: SessionModel
    _forwards: Forwards

    def embed(
        self,
        texts: Text | Sequence[Text],
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        truncation: bool = False,
        stride: int | None = None,
        exact: bool | None = None,
    ) -> torch.Tensor:
        """The vectors of texts: float32 [texts, width] on the CPU, [width] for a single text.

        The checkpoint's sentence-transformers files say how; without them, the vector is the mean of the last hidden states.
        A head is not computed: it need not be one for embeddings.

        Args:
            texts: a text or a list of them; token ids are as good.
            pooling: "mean", "cls", "lasttoken", "max", "weightedmean" or "mean_sqrt_len_tokens", instead of the checkpoint's.
            normalize: to length 1; None does as the checkpoint says.
            dimensions: only the first ones, normalized again; for models trained for it.
            prompt: the name of one of the checkpoint's prompts, or a text that goes before each; "" for none at all.
            truncation: drop what is beyond the longest text.
            stride: embed a long text in windows; its vector is their mean, weighted by their tokens.
            exact: as for all tasks.

        Raises:
            PromptTooLongError: for a text that is too long.
            ConfigurationError: for a text without tokens, or a wrong argument.
        """
        embedder = (self._embedder() or Embedder()).changed(pooling, normalize)
        fit = self._forwards.fit(most=embedder.most_tokens, truncation=truncation, stride=stride)
        many, is_one = _each(texts)
        windows = self._encode([_prompted(embedder, text, prompt) for text in many], fit)
        base = embedding_base(self.model)

        def compute(batch: Batch) -> Iterable[torch.Tensor]:
            return embedder.pool(hidden_states(base, batch), batch.mask)

        vectors = self._forwards.run([window for each in windows for window in each], compute, exact=exact)
        if not windows:
            return torch.empty(0, 0)
        found = embedder.finish(torch.stack(_means(windows, vectors)), dimensions)
        return found[0] if is_one else found

    @overload
    def classify(  # type: ignore[overload-overlap] # a text is a sequence of texts, too
        self, texts: str, *, activation: str | None = None, truncation: bool = False, exact: bool | None = None
    ) -> Classification: ...

    @overload
    def classify(
        self, texts: Sequence[Text | Pair], *, activation: str | None = None, truncation: bool = False, exact: bool | None = None
    ) -> list[Classification]: ...

    def classify(
        self,
        texts: Text | Sequence[Text | Pair],
        *,
        activation: str | None = None,
        truncation: bool = False,
        exact: bool | None = None,
    ) -> Classification | list[Classification]:
        """The labels of texts and their scores, as of transformers' text-classification pipeline.

        Args:
            texts: a text or a list of them; in a list, also pairs of texts.
            activation: "softmax", "sigmoid" or "none" of the logits. If it is None the config says: nothing for a regression,
                sigmoid for several labels at once or a single one, else softmax.
            truncation: drop what is beyond the longest text.
            exact: as for all tasks.

        Raises:
            WrongHeadError: for a model without a head for labels of texts.
            PromptTooLongError: for a text that is too long.
            ConfigurationError: for a text without tokens, a wrong argument, or labels that do not match the head.
        """
        require_head(self.model, "AutoModelForSequenceClassification")
        labeller = labeller_of(self.model.config, activation)
        many, is_one = _each(texts)
        inputs = [each[0] for each in self._encode(many, self._forwards.fit(truncation=truncation))]
        found = [labeller.read(logits) for logits in self._forwards.run(inputs, logits_of(self.model), exact=exact)]
        return found[0] if is_one else found

    def _embedder(self) -> Embedder | None:
        return find_embedder(runtime_of(self.model).checkpoint.repo.folder)

    def _encode(self, texts: Sequence[Text | Pair], fit: Fit) -> list[list[Inputs]]:
        """The windows of each text. An error names its index."""
        return [self._encode_one(index, text, fit) for index, text in enumerate(texts)]

    def _encode_one(self, index: int, text: Text | Pair, fit: Fit) -> list[Inputs]:
        try:
            return self._forwards.encoder.encode(*_parts(text), fit)
        except ConfigurationError as error:
            raise type(error)(f"text {index}: {error}") from error


def _parts(text: Text | Pair) -> tuple[Text, str | None]:
    """A text, and the one that it is paired with."""
    if isinstance(text, list | tuple) and len(text) == 2 and isinstance(text[0], str) and isinstance(text[1], str):
        return text[0], text[1]
    return text, None


def _each(texts: Any) -> tuple[list[Any], bool]:
    """The texts as a list, and whether there was one only. Raises ConfigurationError for what is neither."""
    found = texts.tolist() if hasattr(texts, "tolist") else texts
    if isinstance(found, str):
        return [found], True
    if isinstance(found, Mapping | bytes) or not isinstance(found, Iterable):
        raise ConfigurationError(f"expected a text or a list of texts, not a value of type {type(texts).__name__}")
    listed = list(found)
    one = bool(listed) and isinstance(listed[0], int)
    return ([listed], True) if one else (listed, False)


def _prompted(embedder: Embedder, text: Text, prompt: str | None) -> Text:
    return embedder.prompted(text, prompt) if isinstance(text, str) else text


def _means(windows: Sequence[Sequence[Inputs]], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of each text's vectors, weighted by the tokens of their windows."""
    found, rest = [], iter(vectors)
    for each in windows:
        own = torch.stack([next(rest) for _ in each])
        weights = torch.tensor([len(window) for window in each], dtype=own.dtype)
        found.append(own[0] if len(each) == 1 else (weights[:, None] * own).sum(dim=0) / weights.sum())
    return found
