"""Sessions: many callers, one pass; each gets what `generate` would give it alone."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from smol import QUESTIONS, alone, encoded
from waiting import wait_until

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.demand import Demand
from rabbit_engine.quantization.kernels.openmp import can_use_team
from rabbit_engine.sessions.room import Room
from rabbit_engine.sessions.text import TextFlow


def test_many_at_once_get_what_each_gets_alone_in_the_passes_of_one(smollm_model: Any, session: Session) -> None:
    expected = [alone(smollm_model, text) for text in QUESTIONS]
    before = smollm_model.profile.passes
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, text=text: found.update({i: str(session.chat(text))}))
        for i, text in enumerate(QUESTIONS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[index] for index in range(4)] == expected
    assert smollm_model.profile.passes - before < 2 * 8


def test_stream_yields_the_pieces_of_the_text_and_returns_the_reply(session: Session) -> None:
    pieces, stream = [], session.stream(QUESTIONS[1])
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        reply = end.value
    assert len(pieces) > 3
    assert "".join(pieces) == reply.text
    assert reply.finish_reason == "length"


def test_leaving_a_stream_gives_the_place_up(session: Session) -> None:
    for _ in session.stream("Count to a hundred.", max_new_tokens=500):
        break
    wait_until(lambda: session.running == 0)


def test_generate_continues_many_texts_in_their_order(smollm_model: Any, session: Session) -> None:
    texts = ["Once upon a time", "The sky is", "2 + 2 ="]
    found = session.generate([*texts, smollm_model.tokenizer("The sky is")["input_ids"]], max_new_tokens=5)
    for text, reply in zip(texts, found, strict=False):
        ids = smollm_model.tokenizer(text, return_tensors="pt").input_ids
        assert list(reply.tokens) == smollm_model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found[3].text == found[1].text
    assert session.generate([]) == []


def test_seeded_answers_are_those_of_generate(smollm_model: Any, session: Session) -> None:
    torch.manual_seed(7)
    expected = alone(smollm_model, QUESTIONS[1], do_sample=True, temperature=0.9, top_k=50)
    texts: list[str] = []
    others = [threading.Thread(target=lambda: session.chat("Hi", temperature=1.0)) for _ in range(2)]
    for thread in others:
        thread.start()
    texts.append(str(session.chat(QUESTIONS[1], seed=7, temperature=0.9, top_k=50)))
    for thread in others:
        thread.join(60)
    assert texts == [expected]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(session: Session) -> None:
    whole = session.chat(QUESTIONS[0])
    stopped = session.chat(QUESTIONS[0], stop="of France")
    assert stopped.text == whole.text.partition("of France")[0]
    assert stopped.finish_reason == "stop"
    assert (stopped.stop, whole.stop) == ("of France", None)
    assert len(stopped.tokens) < len(whole.tokens)


def test_logprobs_are_those_of_the_logits(smollm_model: Any, session: Session) -> None:
    reply = session.chat(QUESTIONS[0], logprobs=3, max_new_tokens=4)
    ids = encoded(smollm_model, QUESTIONS[0])
    found = smollm_model.generate(
        ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=2
    )
    assert reply.logprobs is not None
    for step, logits in zip(reply.logprobs, found.logits, strict=True):
        row = torch.log_softmax(logits[0].float(), dim=-1)
        assert step.logprob == pytest.approx(float(row[step.token]), abs=1e-6)
        assert [token for token, _ in step.top] == row.topk(3).indices.tolist()


def test_penalties_and_biases_change_the_answer(smollm_model: Any, session: Session) -> None:
    paris = smollm_model.tokenizer(" Paris")["input_ids"][0]
    assert "Paris" not in session.chat(QUESTIONS[0], logit_bias={paris: -100}).text
    said = session.chat("Say la la la la la la la la.", max_new_tokens=16).tokens
    penalised = session.chat("Say la la la la la la la la.", max_new_tokens=16, frequency_penalty=2.0).tokens
    assert most_common(penalised) < most_common(said)


def most_common(tokens: tuple[int, ...]) -> int:
    return max(tokens.count(token) for token in tokens)


def test_async_callers_share_passes_too(smollm_model: Any, session: Session) -> None:
    async def all_of_them() -> tuple[list[str], str]:
        replies = await asyncio.gather(*[session.achat(text) for text in QUESTIONS])
        pieces = [piece async for piece in session.astream(QUESTIONS[0])]
        return [str(reply) for reply in replies], "".join(pieces)

    before = smollm_model.profile.passes
    texts, streamed = asyncio.run(all_of_them())
    assert texts == [alone(smollm_model, text) for text in QUESTIONS]
    assert streamed == texts[0]
    assert smollm_model.profile.passes - before < 6 * 8 + 8  # those of alone() included


def test_a_cancelled_task_gives_its_place_up(session: Session) -> None:
    async def hurried() -> None:
        async with asyncio.timeout(0.3):
            await session.achat("Count to a hundred.", max_new_tokens=500)

    with pytest.raises(TimeoutError):
        asyncio.run(hurried())
    wait_until(lambda: session.running == 0)


def test_a_cancelled_agenerate_gives_all_places_up(session: Session) -> None:
    async def hurried() -> None:
        async with asyncio.timeout(0.5):
            await session.agenerate(["Once", "Twice"], max_new_tokens=500)

    with pytest.raises(TimeoutError):
        asyncio.run(hurried())
    wait_until(lambda: session.running == 0)
    assert [reply.text for reply in asyncio.run(session.agenerate(["A", "B"], max_new_tokens=2))] == [
        reply.text for reply in session.generate(["A", "B"], max_new_tokens=2)
    ]


def test_a_callback_that_fails_at_the_end_affects_no_other_job(session: Session) -> None:
    def tell(_: int, event: Any) -> None:
        raise ZeroDivisionError("the caller's own")

    session.ask([session.request("Hi", max_new_tokens=1)], tell)
    assert str(session.chat(QUESTIONS[0])) == "The capital of France is Paris."


def test_works_for_the_model_itself_can_be_cancelled(session: Session) -> None:
    begun: list[int] = []
    futures = session.call([(lambda: begun.append(1), 3)] * 3)
    for future in futures:
        future.cancel()
    assert session.call([(lambda: 5, 3)])[0].result(60) == 5
    with pytest.raises(errors.StreamingError, match="ZeroDivisionError"):
        session.call([(lambda: 1 // 0, 3)])[0].result(60)
    assert session.chat("Hi", max_new_tokens=1).tokens


def test_one_that_waits_and_is_given_up_frees_its_place_at_once(smollm_model: Any) -> None:
    with Session(smollm_model, max_requests=1, max_queue=2) as session:
        stream = session.stream("Count to a hundred.", max_new_tokens=400)
        next(stream)
        told: list[Any] = []
        tickets = session.ask([session.request("Hi")] * 2, lambda _, event: told.append(event))
        assert session.waiting == 2
        for ticket in tickets:
            ticket.cancel()
            ticket.cancel()
        assert session.waiting == 0
        assert [event.finish_reason for event in told] == ["cancelled"] * 2
        session.ask([session.request("Hi")] * 2, lambda *_: None)
        stream.close()


def test_a_checkpoint_that_guesses_tokens_says_the_same_text(smollm_model: Any, session: Session) -> None:
    question = "Repeat: one two three one two three one two three."
    expected = session.chat(question, max_new_tokens=16)
    smollm_model.generation_config.prompt_lookup_num_tokens = 5
    try:
        found, told = session.chat(question, max_new_tokens=16), session.chat(question, max_new_tokens=16, logprobs=0)
    finally:
        smollm_model.generation_config.prompt_lookup_num_tokens = None
    assert found.tokens == expected.tokens == told.tokens
    assert len(told.logprobs or ()) == len(told.tokens)


def test_models_that_remember_in_their_modules_answer_one_at_a_time(
    own_checkpoint: Any, streamed: Any, smollm_model: Any, caplog: Any
) -> None:
    """Dynamic NTK: the longest text so far sets the rotary frequencies of all that follow, on the module."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = streamed(own_checkpoint("llama", rope_parameters=rope, max_position_embeddings=16))
    model.tokenizer = smollm_model.tokenizer
    asked = [[3 + (7 * index + length) % 90 for index in range(length)] for length in (40, 10, 24, 8)]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    alone = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in asked]
    model.config.max_position_embeddings = 64  # past those it was trained for, which is what dynamic is for
    with caplog.at_level(logging.WARNING), Session(model, max_new_tokens=6) as session:
        assert "one at a time" in caplog.text
        assert [list(reply.tokens) for reply in session.generate(asked, max_new_tokens=6, temperature=0)] == alone


def test_a_full_queue_is_an_error_that_says_when_to_retry(smollm_model: Any) -> None:
    with Session(smollm_model, max_requests=1, max_queue=1) as session:
        streams = [session.stream("Count to a hundred.", max_new_tokens=400) for _ in range(2)]
        next(streams[0])
        waiting = threading.Thread(target=lambda: next(streams[1], None))
        waiting.start()
        wait_until(lambda: session.waiting == 1)
        with pytest.raises(errors.QueueFullError) as caught:
            session.chat("Hi")
        assert caught.value.retry_after_s >= 1
        streams[0].close()
        waiting.join(60)
        streams[1].close()
        assert len(session.generate(["a", "b", "c", "d"], max_new_tokens=1)) == 4


def test_closing_ends_answers_under_way(smollm_model: Any) -> None:
    session = Session(smollm_model)
    stream = session.stream("Count to a hundred.", max_new_tokens=400)
    next(stream)
    session.close()
    session.close()
    with pytest.raises(errors.SessionClosedError):
        list(stream)
    with pytest.raises(errors.SessionClosedError):
        session.chat("Hi")
    assert [thread for thread in threading.enumerate() if thread.name == "rabbit-session"] != [None]
    assert str(smollm_model.tokenizer.decode(smollm_model.generate(encoded(smollm_model, "Hi"), max_new_tokens=1)[0, -1:])) != ""


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_model_closed_under_it_is_an_error_not_a_hang(checkpoint: Any, smollm_model: Any) -> None:
    with AutoModel.from_pretrained(checkpoint("llama_tied"), device="cpu") as model:
        model.tokenizer = smollm_model.tokenizer
        with Session(model) as session:
            model.close()
            with pytest.raises(errors.ModelClosedError):
                session.generate([[5, 6, 7]], max_new_tokens=3)


@pytest.mark.skipif(not can_use_team(), reason="torch computes with another OpenMP")
def test_a_caller_keeps_no_threads_of_torch_while_its_session_computes(session: Session, two_threads: None) -> None:
    session.call([(lambda: 5, 1)])[0].result(60)
    alone = threads_of_this_process()
    torch.ones(10**6).add_(1)
    assert threads_of_this_process() == alone + 1
    assert session.call([(threads_of_this_process, 1)])[0].result(60) == alone


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_in_the_sessions_thread_that_would_wait_for_it_is_told(session: Session) -> None:
    waits = (
        lambda: session.chat("Hi", max_new_tokens=1),
        lambda: next(session.stream("Hi", max_new_tokens=1)),
        lambda: asyncio.run(session.achat("Hi", max_new_tokens=1)),
        lambda: session.call([(lambda: 5, 1)])[0].result(),
    )
    for future in session.call([(wait, 1) for wait in waits]):
        with pytest.raises(errors.ConfigurationError, match="would wait for itself"):
            future.result(60)
    assert session.chat("Hi", max_new_tokens=1).tokens


def test_wrong_use_is_told(session: Session, smollm_model: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="no such option"):
        session.generate("Hi", temprature=1)
    with pytest.raises(errors.ConfigurationError, match="is not a number"):
        session.chat("Hi", temperature="hot")
    with pytest.raises(errors.ConfigurationError, match="no messages"):
        session.chat([])
    with pytest.raises(errors.ConfigurationError, match="no tokens"):
        session.generate([[]])
    with pytest.raises(errors.ConfigurationError, match="not in the vocabulary"):
        session.generate([[10**9]])
    with pytest.raises(errors.ConfigurationError, match="overflow"):
        Session(smollm_model, overflow="ignore")  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigurationError, match="AutoModel"):
        Session(object())


def test_a_model_without_a_template_continues_texts_only(checkpoint: Any, streamed: Any, smollm_model: Any) -> None:
    import copy

    model = streamed(checkpoint("llama"))
    model.tokenizer = copy.deepcopy(smollm_model.tokenizer)
    model.tokenizer.chat_template = None
    with Session(model) as session:
        with pytest.raises(errors.ConfigurationError, match="no chat template"):
            session.chat("Hi")
        assert len(session.generate([[5, 6]], max_new_tokens=2)[0].tokens) <= 2


def test_tokens_of_a_conversation_are_counted_also_if_they_do_not_fit(session: Session) -> None:
    short = session.count_tokens("Hi there")
    assert short == session.chat("Hi there", max_new_tokens=1).prompt_tokens
    assert session.count_tokens("Hi there" + " there" * 100_000) == short + 100_000 > session.most_tokens
    assert session.count_tokens("Hi there", add_generation_prompt=False) < short


def test_an_answer_of_more_tokens_than_fit_may_have_as_many_as_fit(session: Session) -> None:
    request = session.request("Hi")
    left = session.most_tokens - len(request.prompt.ids)
    for asked, expected in ((5, 5), (10**6, left)):
        found = session.within_room(request, asked)
        assert (found.prompt.answer_tokens, found.options.max_new_tokens) == (expected, expected)
        assert found.prompt.ids == request.prompt.ids
    assert session.answers([session.within_room(request, 3)])[0].text == session.chat("Hi", max_new_tokens=3).text


def test_as_many_at_a_time_as_their_caches_fit(smollm_model: Any) -> None:
    probe = runtime_of(smollm_model).partition.probe
    one = Room(0, probe).need([Demand(100, 100)])
    room = Room(2 * one, probe, positions=8192)
    assert room.fits([Demand(100, 100)])
    assert not room.fits([Demand(100, 100)] * 3)
    assert 200 <= room.most_tokens < 8192
    assert Room(2**62, probe, positions=77).most_tokens == 77


def test_more_requests_than_fit_wait_for_their_turn(smollm_model: Any, monkeypatch: Any) -> None:
    probe = runtime_of(smollm_model).partition.probe
    small = Room(Room(0, probe).need([Demand(8, 4)]) + 1, probe, positions=8192)
    monkeypatch.setattr("rabbit_engine.sessions.session.measure_room", lambda *_: small)
    running: list[int] = []
    with Session(smollm_model) as session:
        runtime_of(smollm_model).binding.passes.on_pass = lambda _: running.append(session.running)
        replies = session.generate(["One two three four", "Five six seven"], max_new_tokens=4)
        runtime_of(smollm_model).binding.passes.on_pass = lambda _: None
    assert len(replies) == 2
    assert set(running) == {1}


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox.",
        "naïve café — “quotes” 日本語テキスト 🙂🙃 e\u0301",
        "  two  spaces\n\n\tand tabs ",
        "مرحبا بالعالم",
        "👩‍👩‍👧‍👦 family",
    ],
)
def test_pieces_join_to_the_text_whatever_the_tokens_cut(smollm_model: Any, text: str) -> None:
    tokenizer = smollm_model.tokenizer
    tokens = tokenizer(text)["input_ids"]
    flow = TextFlow(tokenizer)
    pieces = [flow.push(token) for token in tokens]
    joined = "".join(pieces) + flow.end()
    assert joined == flow.text == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("stops", [("END",), ("END", "STOP NOW"), ("\n\n",), ("E",), ("N",)])
def test_a_stop_is_found_wherever_pieces_are_cut_and_nothing_of_it_is_shown(stops: tuple[str, ...]) -> None:
    class Letters:
        def decode(self, tokens: Any, **_: Any) -> str:
            return "".join(map(chr, tokens))

    for text in ("some text END more", "EN EN END", "a STOP NO STOP NOW", "x\n y\n\nz", "nothing here", "E", "EEND"):
        flow = TextFlow(Letters(), stops)
        shown = ""
        for letter in text:
            shown += flow.push(ord(letter))
            assert not any(stop in shown for stop in stops)
            if flow.stopped:
                break
        shown += flow.end()
        found = [text.find(stop) for stop in stops if stop in text]
        assert shown == flow.text == (text[: min(found)] if found else text)
        assert flow.stopped == bool(found)
        assert flow.stop == (min((text.find(stop), stop) for stop in stops if stop in text)[1] if found else None)
