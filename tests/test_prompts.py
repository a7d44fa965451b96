"""Prompts that are none, and prompts that cannot fit: refused by name, and before they are tokenised."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import talking
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.sessions.encoding import Encoder, read_token_lengths
from rabbit_engine.sessions.prompts import Limits, fit_messages, fit_text
from rabbit_engine.tokenization.ranks import byte_characters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = talking.TEMPLATE.replace("[{{ m['role'][0] }}]", "").replace(";[a]", "")
    return talking.save(tmp_path_factory.mktemp("talking"), template, added=("<|new|>",))


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        yield session


@pytest.mark.parametrize(
    "prompt",
    [
        *("", [], "a<|new|>", [96], [-1], [5, 10**30], [1.0], [1.5], [True], [5, False], [None], ["a"], [[5]], [5, "a"], None),
        *({"input_ids": [5]}, 5, b"abc", torch.tensor([1.5]), torch.tensor([[5, 6]]), torch.tensor([True]), "half \ud800"),
        *(numpy.array([1.5]), torch.tensor(5)),
    ],
    ids=repr,
)
def test_an_invalid_prompt_is_a_configuration_error(session: Session, prompt: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        session.generate([prompt], max_new_tokens=2)


@pytest.mark.parametrize("prompts", [None, 5, [5, 6], {"a": 1}, b"abc", torch.tensor([5, 6]), Ellipsis], ids=repr)
def test_anything_but_a_list_of_prompts_is_a_configuration_error(session: Session, prompts: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        session.generate(prompts, max_new_tokens=2)


@pytest.mark.parametrize(
    "messages",
    ["", "<|new|>", "half \ud800", [], [{"role": "user", "content": ""}], [{"role": "user", "content": []}], None, [5]],
    ids=repr,
)
def test_a_chat_without_prompt_tokens_is_a_configuration_error(session: Session, messages: Any) -> None:
    with pytest.raises(errors.ConfigurationError):
        session.chat(messages, max_new_tokens=2)


@pytest.mark.parametrize("template", ["{{ messages.nothing.there }}", "{{ raise_exception('no') }}", "{% if %}", "{{ 1 / 0 }}"])
def test_a_template_that_raises_is_a_configuration_error(session: Session, template: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(session.model.tokenizer, "chat_template", template)
    with pytest.raises(errors.ConfigurationError, match="template"):
        session.chat("abc", max_new_tokens=2)


@pytest.mark.parametrize(
    "ids", [(5, 6, 7), torch.tensor([5, 6, 7]), numpy.array([5, 6, 7]), list(numpy.array([5, 6, 7])), range(5, 8)]
)
def test_ids_are_accepted_in_any_container(session: Session, ids: Any) -> None:
    expected = session.generate([[5, 6, 7]], max_new_tokens=3)[0].tokens
    assert session.generate([ids], max_new_tokens=3)[0].tokens == expected


class Counting:
    """A tokenizer of which every text is counted that it takes."""

    def __init__(self, tokenizer: Any) -> None:
        self._own, self.taken = tokenizer, 0
        self.chat_template = tokenizer.chat_template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, text: str, **keywords: Any) -> Any:
        self.taken += len(text)
        return self._own(text, **keywords)


class Owner:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


def byte_level(*tokens: str, normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these tokens in addition to those of the bytes."""
    vocabulary = {sign: index for index, sign in enumerate(byte_characters())}
    merges: list[tuple[str, str]] = []
    for token in tokens:
        for end in range(2, len(token) + 1):
            vocabulary.setdefault(token[:end], len(vocabulary))
            merges.append((token[: end - 1], token[end - 1]))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_text_is_refused_by_its_length_before_any_of_it_is_tokenised() -> None:
    counting = Counting(byte_level("abcd"))
    encoder = Encoder(Owner(counting), 10_000, most=100)
    with pytest.raises(errors.PromptTooLongError, match="at least 101 tokens, but only 100 fit"):
        encoder.encode_text("abcd" * 101)
    assert counting.taken == 0
    assert len(encoder.encode_text("abcd" * 100)) == 100


def test_a_text_is_refused_by_its_beginning_where_tokens_could_be_long() -> None:
    counting = Counting(byte_level("ab" * 50))
    with pytest.raises(errors.PromptTooLongError):
        Encoder(Owner(counting), 10_000, most=100).encode_text("x" * 9_000)
    assert 0 < counting.taken <= 100 * 4


def test_a_conversation_is_refused_by_the_length_of_its_rendered_template() -> None:
    tokenizer = byte_level("abcd")
    tokenizer.chat_template = "{{ messages[0].content[:40] }}"
    encoder = Encoder(Owner(tokenizer), 10_000, most=10)
    assert len(encoder.encode_messages([{"role": "user", "content": "abcd" * 10_000}], {})) == 10
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(errors.PromptTooLongError):
        encoder.encode_messages([{"role": "user", "content": "abcd" * 10_000}], {})


def test_tokens_of_unbounded_length_give_no_lower_bound() -> None:
    words = Tokenizer(models.WordLevel({"w": 0}, unk_token="w"))
    swallowing = byte_level("abcd")
    from tokenizers import AddedToken

    swallowing.add_tokens([AddedToken("<x>", rstrip=True)])
    lowered = byte_level("abcd", normalizer=normalizers.StripAccents())
    for tokenizer in (PreTrainedTokenizerFast(tokenizer_object=words), swallowing, lowered, object()):
        assert read_token_lengths(tokenizer).fewest_tokens("y" * 10**6) == 0
    one = Encoder(Owner(PreTrainedTokenizerFast(tokenizer_object=words)), 10, most=100)
    assert one.encode_text("y" * 100_000) == [0]  # one unknown word: it fits


@pytest.mark.parametrize("text", ["abcd" * 300, "e\u0301" * 500, "日本語" * 300, "\x04" * 900, " " * 700, "a b " * 300])
def test_the_lower_bound_never_exceeds_the_number_of_tokens(text: str) -> None:
    for tokenizer in (byte_level("abcd"), byte_level("abcd", normalizer=normalizers.NFC())):
        assert read_token_lengths(tokenizer).fewest_tokens(text) <= len(tokenizer(text)["input_ids"])


def test_two_texts_are_tokenised_at_the_same_time(session: Session) -> None:
    """Only the setting up of the tokenizer is one thread's: a long text holds no other up."""
    together = threading.Barrier(2, timeout=5)

    class Meeting(Counting):
        def __call__(self, text: str, **keywords: Any) -> Any:
            together.wait()
            return super().__call__(text, **keywords)

    encoder = Encoder(Owner(Meeting(session.model.tokenizer)), 10**6, most=None)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(encoder.encode_text, ("a", "bb"))
    assert (len(first), len(second)) == (1, 2)


def test_too_long_is_refused_or_cut_as_asked_never_silently(smollm_model: Any, caplog: Any) -> None:
    encoder, limits, tokenizer = Encoder(smollm_model, 49152, None), Limits(120, 16), smollm_model.tokenizer
    messages = [{"role": "system", "content": "Be brief."}]
    for index in range(12):
        messages += [{"role": "user", "content": f"Question {index}?"}, {"role": "assistant", "content": f"Answer {index}."}]
    messages.append({"role": "user", "content": "And the last?"})
    with pytest.raises(errors.PromptTooLongError, match="more than the 120"):
        fit_messages(encoder, messages, limits, None, "refuse")
    with caplog.at_level(logging.WARNING):
        cut = fit_messages(encoder, messages, limits, 20, "truncate")
    text = tokenizer.decode(cut.ids)
    assert "Be brief." in text
    assert "And the last?" in text
    assert "Question 0?" not in text
    assert "Question 11?" in text
    assert len(cut.ids) + 20 <= 120
    assert f"{cut.cut_tokens} of" in caplog.text
    assert cut.answer_tokens == 20


def test_one_message_that_is_too_long_keeps_its_end(smollm_model: Any) -> None:
    words = " ".join(f"word{index}" for index in range(200))
    cut = fit_messages(Encoder(smollm_model, 49152, None), [{"role": "user", "content": words}], Limits(100, 16), 10, "truncate")
    assert "word199" in smollm_model.tokenizer.decode(cut.ids)
    assert len(cut.ids) <= 90
    text = fit_text(smollm_model.tokenizer(words)["input_ids"], Limits(100, 16), 10, "truncate")
    assert len(text.ids) == 90
    assert text.cut_tokens > 100


@pytest.mark.parametrize("asked", [None, 8])
def test_an_answer_never_passes_the_limit(asked: int | None) -> None:
    limits = Limits(100, 64)
    assert limits.answer_tokens(95, None) == 5
    assert limits.answer_tokens(20, 8) == 8
    with pytest.raises(errors.PromptTooLongError):
        limits.answer_tokens(100 if asked is None else 93, asked)
