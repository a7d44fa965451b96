"""The log of a stage's requests: its file does not grow under constant traffic, whatever is copied and forgotten."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import pytest

from rabbit_engine.cluster.request_log import EXTENT_BYTES, RequestLog


def content(log: RequestLog, text: str) -> list[bytes]:
    found = log.requests(text)
    assert found is not None
    return list(found)


def some(drawn: random.Random, most: int = 3 * EXTENT_BYTES) -> bytes:
    return drawn.randbytes(drawn.choice([0, 1, drawn.randrange(5000), drawn.randrange(most), EXTENT_BYTES]))


def test_constant_traffic_does_not_grow_the_file(tmp_path: Path) -> None:
    """One text at least is under way all the time."""
    log, drawn = RequestLog(tmp_path), random.Random(0)
    sizes = []
    for number in range(200):
        for _ in range(4):
            log.add(f"{number}", some(drawn))
        if number >= 3:
            log.forget(f"{number - 3}")
        sizes.append(log.nbytes)
    assert max(sizes) <= 4 * 13 * EXTENT_BYTES  # four texts of at most twelve extents and a part
    for number in range(197, 200):
        log.forget(f"{number}")
    assert log.nbytes == 0


def test_small_requests_share_extents(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for number in range(40):
        log.add("text", bytes([number]) * 3000)
    assert log.nbytes == 2 * EXTENT_BYTES
    assert content(log, "text") == [bytes([number]) * 3000 for number in range(40)]


def test_texts_copies_and_forgetting_in_any_order(tmp_path: Path) -> None:
    log, drawn = RequestLog(tmp_path), random.Random(1)
    expected: dict[str, list[bytes]] = {"0": []}
    for number in range(1, 400):
        text = drawn.choice(list(expected))
        match drawn.randrange(8):
            case 0:
                log.copy(text, f"{number}")
                expected[f"{number}"] = list(expected[text])
            case 1 if len(expected) > 1:
                log.forget(text)
                del expected[text]
            case _:
                request = some(drawn)
                log.add(text, request)
                expected[text].append(request)
        checked = drawn.choice(list(expected))
        assert content(log, checked) == expected[checked]
    for text, requests in expected.items():
        assert content(log, text) == requests
        log.forget(text)
    assert log.nbytes == 0


def test_a_copy_outlives_its_original(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.add("original", b"shared")
    log.copy("original", "copy")
    log.forget("original")
    log.add("other", b"x" * 4 * EXTENT_BYTES)
    log.add("copy", b"own")
    assert content(log, "copy") == [b"shared", b"own"]


def test_a_text_that_is_forgotten_while_it_is_read(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    for text in ("read", "other"):
        log.add(text, b"first")
        log.add(text, b"second")
    requests = log.requests("read")
    assert requests is not None
    assert next(requests) == b"first"
    log.forget("read")
    with pytest.raises(KeyError, match="forgotten"):
        next(requests)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
def test_a_file_that_can_grow_no_more_ends_the_log_of_one_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    log = RequestLog(tmp_path)
    log.add("small", b"kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * EXTENT_BYTES // 2, before[1]))
    try:
        log.add("large", b"x" * 2 * EXTENT_BYTES)
        log.add("large", b"y")
        log.copy("large", "copy")
        log.add("small", b"too")
        log.add("next", b"z")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.requests("large") is None
    assert log.requests("copy") is None
    assert content(log, "small") == [b"kept", b"too"]
    assert content(log, "next") == [b"z"]  # in an extent that the large text gave back
    assert caplog.text.count("the requests of a text cannot be written") == 1


def test_threads(tmp_path: Path) -> None:
    log, failures = RequestLog(tmp_path), []

    def texts(seed: int) -> None:
        drawn = random.Random(seed)
        for number in range(15):
            name, requests = f"{seed}-{number}", [some(drawn) for _ in range(5)]
            for request in requests[:-1]:
                log.add(name, request)
            log.copy(name, f"{name}c")
            log.add(name, requests[-1])
            if content(log, name) != requests or content(log, f"{name}c") != requests[:-1]:
                failures.append(name)
            log.forget(name)
            log.forget(f"{name}c")

    threads = [threading.Thread(target=texts, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert log.nbytes == 0


def test_a_text_is_forgotten_amid_bookkeeping(tmp_path: Path) -> None:
    """Finalizers forget texts, in whatever thread a garbage collection runs."""
    log = RequestLog(tmp_path)
    log.add("text", b"x")

    def forget() -> None:
        with log._lock:
            log.forget("text")

    thread = threading.Thread(target=forget, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


def test_nothing_is_kept_after_the_end(tmp_path: Path) -> None:
    log = RequestLog(tmp_path)
    log.add("text", b"x")
    log.close()
    log.add("text", b"y")
    assert log.nbytes == 0
