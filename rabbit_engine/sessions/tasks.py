"""What a session computes besides answers: vectors, labels, ranks, entities and likelihoods of many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, overload

import torch

from rabbit_engine.errors import ConfigurationError, PromptTooLongError
from rabbit_engine.model.protocols import SessionModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.sessions.embeddings import EmbeddingWork, embedding_work
from rabbit_engine.sessions.forwards import Compute, Forwards, last_logits_of, logits_of
from rabbit_engine.sessions.inputs import Fit, Text
from rabbit_engine.sessions.works import Work
from rabbit_engine.tasks.batches import Batch, Inputs
from rabbit_engine.tasks.classification import Classification, labeller_of
from rabbit_engine.tasks.embedding import Embedder
from rabbit_engine.tasks.heads import CAUSAL, SEQUENCES, base_of, has_head, require_head
from rabbit_engine.tasks.reranking import (
    INSTRUCTION,
    Relevance,
    activate,
    cross_encoder_activation,
    judged_text,
    yes_or_no,
)
from rabbit_engine.tasks.scoring import Score, continuation_inputs, score_tokens, split_spaces
from rabbit_engine.tasks.sentence_files import find_embedder
from rabbit_engine.tasks.tagging import Entity, entities_of, require_strategy
from rabbit_engine.transformers_bridge.entities import EntityReader

T = TypeVar("T")

Pair = tuple[str, str]


class TaskMethods:
    """Tasks over many texts: each pass over the weights computes as many as the memory holds, and the results are in their
    order.

    Every text has a forward of its own, so that its result is, bit for bit, what transformers computes for it alone.
    `exact=False` joins texts of about the same length in padded batches, which is faster where computing takes longer than
    moving the weights: results then differ by rounding, by up to 1e-5 of their size in float32 and 5e-2 in bfloat16.
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
        many, is_one = _each(texts, pairs=False)
        embedder = (self.embedder or Embedder()).changed(pooling, normalize)
        fit = self._forwards.fit(most=embedder.most_tokens, truncation=truncation, stride=stride)
        windows = self._prompted(many, embedder, prompt, fit)
        found = embedding_work(self.model, self._forwards, embedder, windows, dimensions).run(exact=exact)
        return found[0] if is_one else found

    @cached_property
    def embedder(self) -> Embedder | None:
        """How the checkpoint's sentence-transformers files embed texts; None without such files. Raises as `find_embedder`."""
        return find_embedder(runtime_of(self.model).checkpoint.repo.folder)

    def embedding(self, texts: Sequence[Text], dimensions: int | None = None, *, truncation: bool = False) -> EmbeddingWork:
        """Encode texts for a caller that does not wait for their vectors as `embed` does. Raises as `embed`."""
        embedder = self.embedder or Embedder()
        windows = self._prompted(texts, embedder, None, self._forwards.fit(most=embedder.most_tokens, truncation=truncation))
        return embedding_work(self.model, self._forwards, embedder, windows, dimensions)

    def _prompted(self, texts: Sequence[Text], embedder: Embedder, named: str | None, fit: Fit) -> list[list[Inputs]]:
        """The windows of each text after its prompt; token ids have none."""
        prompt = embedder.prompt(named)
        windows = self._encode([prompt + embedder.spelled(text) if isinstance(text, str) else text for text in texts], fit)
        if embedder.counts_prompt or not prompt:
            return windows
        skipped = self._forwards.encoder.prompt_tokens(prompt)
        if fit.stride is not None and skipped + fit.stride >= fit.most:
            raise ConfigurationError(
                f"stride={fit.stride}: windows have {fit.most} tokens, and a prompt of {skipped}, which pooling leaves out, must "
                "end before the second one"
            )
        return [
            [replace(each[0], skipped=skipped), *each[1:]] if isinstance(text, str) else each
            for text, each in zip(texts, windows, strict=True)
        ]

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
        many, is_one = _each(texts)
        found = self.classifying(many, activation=activation, truncation=truncation).run(exact=exact)
        return found[0] if is_one else found

    def classifying(
        self, texts: Sequence[Text | Pair], *, activation: str | None = None, truncation: bool = False
    ) -> Work[torch.Tensor, list[Classification]]:
        """Encode texts for a caller that does not wait for their labels as `classify` does. Raises as `classify`."""
        require_head(self.model, SEQUENCES)
        labeller = labeller_of(self.model.config, activation)
        inputs = [each[0] for each in self._encode(texts, self._forwards.fit(truncation=truncation))]
        return Work(self._forwards, inputs, logits_of(self.model), lambda found: [labeller.read(logits) for logits in found])

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top: int | None = None,
        instruction: str | None = None,
        activation: str | None = None,
        truncation: bool = False,
        exact: bool | None = None,
    ) -> list[Relevance]:
        """How relevant each document is to a query, in the order of the documents.

        A cross-encoder has a head of one label for pairs of texts; its score is as sentence-transformers' `CrossEncoder` gives
        it. Of a causal model, the score is the probability of "yes" rather than "no" after the template of Qwen3-Reranker's
        model card; only models trained for it give a useful one.

        Args:
            query: what is looked for.
            documents: the texts to judge.
            top: only that many, the best first.
            instruction: for a causal model, what makes a document relevant; None is the model card's.
            activation: "sigmoid" or "none" instead of the checkpoint's.
            truncation: drop what is beyond the longest pair.
            exact: as for all tasks.

        Raises:
            WrongHeadError: for a model that does neither.
            PromptTooLongError: for a document that is too long.
            ConfigurationError: for a wrong argument.
        """
        if top is not None and top < 1:
            raise ConfigurationError(f"top={top}: expected at least 1")
        pairs = [(query, document) for document in documents]
        work = self.ranking(pairs, instruction=instruction, activation=activation, truncation=truncation)
        found = work.run(exact=exact)
        return found if top is None else sorted(found, key=lambda each: -each.logit)[:top]

    def ranking(
        self,
        pairs: Sequence[Pair],
        *,
        instruction: str | None = None,
        activation: str | None = None,
        truncation: bool = False,
    ) -> Work[float, list[Relevance]]:
        """Encode pairs of a query and a document for a caller that does not wait for them as `rerank` does; each has a query of
        its own. Raises as `rerank`."""
        if not has_head(self.model, SEQUENCES):
            require_head(self.model, SEQUENCES, CAUSAL)
            inputs, compute = self._judged(pairs, instruction or INSTRUCTION, truncation)
        elif instruction is not None:
            raise ConfigurationError("a cross-encoder takes no instruction")
        else:
            activation = activation or cross_encoder_activation(self.model.config)
            inputs, compute = self._paired(pairs, truncation)
        chosen = activation or "sigmoid"
        activate(0.0, chosen)  # an unknown one is refused before anything is computed

        def finish(logits: list[float]) -> list[Relevance]:
            return [Relevance(index, activate(logit, chosen), logit) for index, logit in enumerate(logits)]

        return Work(self._forwards, inputs, compute, finish)

    @overload
    def tag(  # type: ignore[overload-overlap] # a text is a sequence of texts, too
        self,
        texts: str,
        *,
        aggregation: str = "simple",
        ignore: Sequence[str] = ("O",),
        truncation: bool = False,
        stride: int | None = None,
        exact: bool | None = None,
    ) -> list[Entity]: ...

    @overload
    def tag(
        self,
        texts: Sequence[str],
        *,
        aggregation: str = "simple",
        ignore: Sequence[str] = ("O",),
        truncation: bool = False,
        stride: int | None = None,
        exact: bool | None = None,
    ) -> list[list[Entity]]: ...

    def tag(
        self,
        texts: str | Sequence[str],
        *,
        aggregation: str = "simple",
        ignore: Sequence[str] = ("O",),
        truncation: bool = False,
        stride: int | None = None,
        exact: bool | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """The entities of texts, with their places in characters, as of transformers' token-classification pipeline.

        Args:
            texts: a text or a list of them.
            aggregation: "none" for every token on its own; "simple" joins neighbours of one label; "first", "average" and "max"
                first make the tokens of a word agree.
            ignore: labels to leave out.
            truncation: drop what is beyond the longest text.
            stride: tag a long text in windows; of entities that overlap, the longest stays, or the surer of equal ones.
            exact: as for all tasks.

        Raises:
            WrongHeadError: for a model without a head for labels of tokens.
            PromptTooLongError: for a text that is too long.
            ConfigurationError: for a text without tokens, or a wrong argument.
        """
        require_head(self.model, "AutoModelForTokenClassification")
        require_strategy(aggregation, windows=stride is not None)
        many, is_one = _each(texts)
        fit, encoder = self._forwards.fit(truncation=truncation, stride=stride), self._forwards.encoder
        tokenizer: Any = self.model.tokenizer
        wanted = {"return_special_tokens_mask": True, "return_offsets_mapping": getattr(tokenizer, "is_fast", False)}
        windows = [self._named(index, encoder.find, _text(text), None, fit, **wanted) for index, text in enumerate(many)]
        inputs = [self._named(index, encoder.inputs, window) for index, each in enumerate(windows) for window in each]
        logits = iter(self._forwards.run(inputs, logits_of(self.model), exact=exact))
        reader = EntityReader(base_of(self.model), tokenizer, aggregation, ignore)
        pairs = [[(window, next(logits)[: len(window["input_ids"])]) for window in each] for each in windows]
        found = [entities_of(reader.read(text, each)) for text, each in zip(many, pairs, strict=True)]
        return found[0] if is_one else found

    @overload
    def score(  # type: ignore[overload-overlap] # a text is a sequence of texts, too
        self, texts: str | Pair, *, special_tokens: bool = True, truncation: bool = False, exact: bool | None = None
    ) -> Score: ...

    @overload
    def score(
        self,
        texts: Sequence[Text | Pair | tuple[Sequence[int], Sequence[int]]],
        *,
        special_tokens: bool = True,
        truncation: bool = False,
        exact: bool | None = None,
    ) -> list[Score]: ...

    def score(
        self, texts: Any, *, special_tokens: bool = True, truncation: bool = False, exact: bool | None = None
    ) -> Score | list[Score]:
        """The log-likelihoods of texts, or of continuations given their contexts, under a causal model.

        As lm-evaluation-harness computes them, in float32: spaces at the end of a context count as the continuation's, and an
        empty context is the tokenizer's first special token. The head computes only the scored positions.

        Args:
            texts: a text, a pair `(context, continuation)`, or a list of either; also of token ids. Of a text, every token but
                its first is scored.
            special_tokens: begin with those that the tokenizer adds; lm-evaluation-harness leaves them out by default.
            truncation: drop the beginning of what is too long.
            exact: as for all tasks.

        Raises:
            WrongHeadError: for a model without a head for the next token.
            PromptTooLongError: for a text that is too long.
            ConfigurationError: for a text or continuation without a token to score.
        """
        many, is_one = _each(texts)
        found = self.scoring(many, special_tokens=special_tokens, truncation=truncation).run(exact=exact)
        return found[0] if is_one else found

    def scoring(
        self, texts: Sequence[Any], *, special_tokens: bool = True, truncation: bool = False, alternatives: int | None = None
    ) -> Work[Score, list[Score]]:
        """Encode texts for a caller that does not wait for their scores as `score` does; `alternatives` as of `score_tokens`.
        Raises as `score`."""
        require_head(self.model, CAUSAL, "AutoModelForImageTextToText")
        fit = self._forwards.fit(logits=1, truncation=truncation)
        inputs = [self._named(index, self._scored, text, special_tokens, fit) for index, text in enumerate(texts)]
        last_logits = last_logits_of(self.model)

        def compute(batch: Batch) -> Iterable[Score]:
            each = zip(last_logits(batch), batch.texts, strict=True)
            return [score_tokens(rows, text.targets, alternatives) for rows, text in each]

        return Work(self._forwards, inputs, compute, lambda found: found)

    def _scored(self, text: Any, special: bool, fit: Fit) -> Inputs:
        context, continuation = self._context(text, special)
        ids = [*context, *continuation]
        self._forwards.encoder.inputs({"input_ids": ids})
        if len(ids) - 1 > fit.most and not fit.truncation:
            raise PromptTooLongError(f"{len(ids) - 1} tokens are more than the {fit.most} that fit: give truncation=True")
        inputs = continuation_inputs(context, continuation, fit.most)
        self._forwards.require_room(inputs)
        return inputs

    def _context(self, text: Any, special: bool) -> tuple[list[int], list[int]]:
        """The tokens that are not scored, and those that are."""
        encoder = self._forwards.encoder
        if not _is_pair(text):
            ids = encoder.ids(text, special=special)
            return ids[:1], ids[1:]
        if not isinstance(text[0], str):
            return encoder.ids(text[0], special=special), encoder.ids(text[1], special=special)
        context, continuation = split_spaces(*text)
        begun = encoder.ids(context, special=special)
        rest = encoder.ids(context + continuation, special=special)[len(begun) :]
        first = [getattr(self.model.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
        return begun or [token for token in first if token is not None][:1], rest

    def _paired(self, pairs: Sequence[Pair], truncation: bool) -> tuple[list[Inputs], Compute[float]]:
        texts = [(_text(query), _text(document)) for query, document in pairs]
        logits = logits_of(self.model)

        def compute(batch: Batch) -> Iterable[float]:
            return [float(own[0]) for own in logits(batch)]

        return [each[0] for each in self._encode(texts, self._forwards.fit(truncation=truncation))], compute

    def _judged(self, pairs: Sequence[Pair], instruction: str, truncation: bool) -> tuple[list[Inputs], Compute[float]]:
        judge, encoder = yes_or_no(self.model.tokenizer), self._forwards.encoder
        fit = self._forwards.fit(logits=1, truncation=truncation)
        around = Fit(max(0, fit.most - judge.own_tokens), truncation)
        inputs = []
        for index, (query, document) in enumerate(pairs):
            text = judged_text(instruction, _text(query), _text(document))
            (found,) = self._named(index, encoder.find, text, None, around, add_special_tokens=False)
            inputs.append(judge.prompt(found["input_ids"]))
        last_logits = last_logits_of(self.model)

        def compute(batch: Batch) -> Iterable[float]:
            return [judge.logit(rows[0]) for rows in last_logits(batch)]

        return inputs, compute

    def _encode(self, texts: Sequence[Text | Pair], fit: Fit) -> list[list[Inputs]]:
        """The windows of each text."""
        return [self._named(index, self._forwards.encoder.encode, *_parts(text), fit) for index, text in enumerate(texts)]

    def _named(self, index: int, call: Callable[..., T], *given: Any, **keywords: Any) -> T:
        """Call it; an error names the index of the text."""
        try:
            return call(*given, **keywords)
        except ConfigurationError as error:
            raise type(error)(f"text {index}: {error}") from error


def _is_pair(text: object) -> bool:
    """Whether it is two texts, or lists of token ids."""
    return isinstance(text, list | tuple) and len(text) == 2 and not any(isinstance(part, int) for part in text)


def _parts(text: Any) -> tuple[Text, str | None]:
    """A text, and the one that it is paired with."""
    return (text[0], text[1]) if _is_pair(text) and isinstance(text[0], str) else (text, None)


def _text(text: object) -> str:
    """The text. Raises ConfigurationError for anything else."""
    if not isinstance(text, str):
        raise ConfigurationError(f"expected a text, not a value of type {type(text).__name__}")
    return text


def _each(texts: Any, *, pairs: bool = True) -> tuple[list[Any], bool]:
    """The texts as a list, and whether there was one only: with `pairs`, a tuple of two is a pair.

    Raises ConfigurationError for what is neither.
    """
    found = texts.tolist() if hasattr(texts, "tolist") else texts
    if isinstance(found, str) or (pairs and isinstance(found, tuple) and _is_pair(found)):
        return [found], True
    if isinstance(found, Mapping | bytes) or not isinstance(found, Iterable):
        raise ConfigurationError(f"expected a text or a list of texts, not a value of type {type(texts).__name__}")
    listed = list(found)
    one = bool(listed) and isinstance(listed[0], int)
    return ([listed], True) if one else (listed, False)
