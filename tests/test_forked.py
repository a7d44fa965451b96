"""Children that are forked from a process with a session: an error at once where they use it, and nothing where they end it."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from forking import outcome_in_a_child

from rabbit_engine import AutoModel, Session, errors
from rabbit_engine.streaming import RandomStream
from rabbit_engine.streaming.transfer.reader import shared_reader

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"))


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model) as session:
        session.generate([[5, 6]], max_new_tokens=1)
        yield session


def locks_of(*owners: Any) -> list[Any]:
    """The locks in the attributes of `owners`, of the objects of ours that they hold, and so on."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = list(owners)
    while left:
        owner = left.pop()
        if isinstance(owner, LOCKS):
            found[id(owner)] = owner
        elif id(owner) not in seen and (isinstance(owner, type) or type(owner).__module__.startswith("rabbit_engine.")):
            seen.add(id(owner))
            left += vars(owner).values() if hasattr(owner, "__dict__") else ()
    return list(found.values())


def in_a_loop(coroutine: Callable[[], Any]) -> None:
    import asyncio

    asyncio.run(coroutine())


USES: dict[str, Callable[[Session], Any]] = {
    "generate": lambda session: session.generate([[5, 6]], max_new_tokens=1),
    "chat": lambda session: session.chat("abc", max_new_tokens=1),
    "stream": lambda session: list(session.stream("abc", max_new_tokens=1)),
    "achat": lambda session: in_a_loop(lambda: session.achat("abc", max_new_tokens=1)),
    "agenerate": lambda session: in_a_loop(lambda: session.agenerate(["abc"], max_new_tokens=1)),
    "encode": lambda session: session.encode("abc"),
    "call": lambda session: session.call([(lambda: 1, 1)])[0].result(),
    "another session": lambda session: Session(session.model),
    "the model": lambda session: session.model.generate(torch.tensor([[5]]), max_new_tokens=1),
}


@pytest.mark.parametrize("use", USES)
def test_a_forked_child_that_uses_a_session_gets_an_error_at_once(session: Session, use: str) -> None:
    assert outcome_in_a_child(lambda: USES[use](session)) == "ModelClosedError"


@pytest.mark.parametrize("use", ["generate", "chat", "encode"])
def test_a_forked_child_gets_an_error_even_if_every_lock_was_held(session: Session, use: str) -> None:
    locks, held, go_on = locks_of(session, shared_reader(), RandomStream), threading.Event(), threading.Event()
    assert len(locks) >= 5

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go_on.wait(30)

    def use_and_end() -> None:
        try:
            USES[use](session)
        finally:
            session.close()
            session.model.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        assert outcome_in_a_child(use_and_end) == "ModelClosedError"
    finally:
        go_on.set()
        thread.join()


def test_a_forked_child_that_continues_a_stream_gets_an_error(session: Session) -> None:
    stream = session.stream("abc", max_new_tokens=60, temperature=0)
    next(stream)
    assert outcome_in_a_child(lambda: list(stream)) == "ModelClosedError"
    assert outcome_in_a_child(stream.close) == "nothing"
    stream.close()


def test_children_forked_amid_passes_end_session_and_model_at_once(session: Session) -> None:
    def end_in_every_way() -> None:
        with session.model, session:
            pass
        session.close()
        gc.collect()

    stream = session.stream("abc", max_new_tokens=100, temperature=0)
    next(stream)
    assert [outcome_in_a_child(end_in_every_way) for _ in range(3)] == ["nothing"] * 3
    stream.close()
    assert session.generate([[5, 6]], max_new_tokens=1)  # the parent's continues


def test_a_forked_child_that_waits_for_a_future_of_its_parent_gets_an_error(session: Session) -> None:
    go_on = threading.Event()
    first, second = session.call([(lambda: go_on.wait(30), 1), (lambda: 5, 1)])
    try:
        assert outcome_in_a_child(second.result) == outcome_in_a_child(second.exception) == "ModelClosedError"
    finally:
        go_on.set()
    assert (first.result(), second.result()) == (True, 5)
    assert outcome_in_a_child(second.result) == "nothing"


def test_a_child_leaves_by_sys_exit_as_it_would_without_a_session(session: Session) -> None:
    assert outcome_in_a_child(lambda: sys.exit(3)) == "SystemExit"


def test_a_child_that_loads_its_own_model_draws_although_others_drew_at_the_fork(session: Session, folder: Path) -> None:
    expected = session.generate(["abc"], seed=4, max_new_tokens=5)[0].tokens

    def draw() -> None:
        with AutoModel.from_pretrained(folder, device="cpu") as model, Session(model, exact=False) as own:
            assert own.generate(["abc"], seed=4, max_new_tokens=5)[0].tokens == expected

    [turn] = locks_of(RandomStream)
    with turn:
        assert outcome_in_a_child(draw) == "nothing"


def test_the_service_says_why_it_cannot_answer(session: Session) -> None:
    from fastapi.testclient import TestClient

    from rabbit_engine.server import app

    def ask() -> None:
        with TestClient(app.create_app(session, "mine"), base_url="http://localhost") as client:
            answer = client.post("/v1/completions", json={"model": "mine", "prompt": "abc", "max_tokens": 1})
            assert answer.status_code == 503
            assert "forked" in answer.json()["error"]["message"]
            assert client.get("/health").status_code == 503

    assert outcome_in_a_child(ask) == "nothing"


class Asking(torch.utils.data.Dataset[int]):
    def __init__(self, session: Session) -> None:
        self._session = session

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return len(self._session.generate([[5, 6]], max_new_tokens=1)[0].tokens)


def test_a_data_loaders_worker_gets_an_error(session: Session) -> None:
    loader = torch.utils.data.DataLoader(Asking(session), num_workers=1, multiprocessing_context="fork", timeout=20)
    with pytest.raises(errors.ModelClosedError, match="forked"):
        list(loader)
