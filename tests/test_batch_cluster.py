"""A batch over a cluster: one answer for each line, as without one, whoever is killed; one Ray for the file."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import families
import psutil
import pytest
from ray_token import use_ray_token
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from rabbit_engine import batch, errors
from rabbit_engine.batches import BatchJob, BatchProgress, Choices, Order, Workers
from rabbit_engine.batches.cluster import crew, run
from rabbit_engine.batches.cluster.blocks import lines_of, read_table, table_of, table_of_lines
from rabbit_engine.batches.cluster.order import Failure, LineAnswer
from rabbit_engine.batches.cluster.probe import probe
from rabbit_engine.batches.cluster.worker import LineWorker
from rabbit_engine.batches.inputs import InputLine
from rabbit_engine.batches.window import Answered
from rabbit_engine.model.runtime import runtime_of

LINES, TOKENS = 24, 60
BROKEN = '{"custom_id": "cut'
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows 96 words."""
    folder = families.save("llama", tmp_path_factory.mktemp("talker"))
    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of which one is broken."""
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    asked = [{"custom_id": f"c{n}", "prompt": f"w{n + 3} w5 w7", "max_tokens": TOKENS - n % 4} for n in range(LINES - 1)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in asked) + f"{BROKEN}\n")
    return path


@pytest.fixture(scope="module")
def expected(talker: Path, source: Path) -> Rows:
    """The answers of the command without a cluster."""
    target = source.with_name("local.jsonl")
    batch(talker, source, target, device="cpu")
    return rows(target)


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A Ray of this machine alone."""
    use_ray_token()
    import ray

    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def rows(path: Path) -> Rows:
    """The lines of an output file by their ids, without what differs from run to run."""
    found: Rows = {}
    for text in path.read_text().splitlines():
        row = json.loads(text)
        del row["response"]["request_id"]
        for name in ("id", "created"):
            row["response"]["body"].pop(name, None)
        assert row["id"] not in found, "a line is answered twice"
        found[row["id"]] = row
    return found


def worker_processes() -> list[psutil.Process]:
    """The processes of workers, of this Ray alone."""
    return [process for process in psutil.Process().children(recursive=True) if "LineWorker" in " ".join(cmdline(process))]


def cmdline(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ()


def test_a_worker_killed_amid_a_batch_loses_and_repeats_nothing(
    talker: Path, source: Path, expected: Rows, ray: ModuleType, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(progress: BatchProgress) -> None:
        if progress.done and not killed:
            (process,) = worker_processes()
            process.kill()
            killed.append(progress.done)

    report = batch(
        talker, source, tmp_path / "out.jsonl", device="cpu", max_requests=2, cluster="auto", workers=1, on_progress=kill
    )
    assert rows(tmp_path / "out.jsonl") == expected
    assert (report.lines, report.failed, report.tokens) == (LINES, 1, sum(TOKENS - n % 4 for n in range(LINES - 1)))
    assert 0 < killed[0] < LINES


def test_a_driver_that_is_killed_goes_on_at_the_next_start(
    talker: Path, source: Path, expected: Rows, ray: ModuleType, tmp_path: Path, rabbit: Any
) -> None:
    target, address = tmp_path / "out.jsonl", ray.get_runtime_context().gcs_address
    options = ["batch", talker, source, target, "--device", "cpu", "--max-requests", "2", "--prefix-store", "off"]
    command = [sys.executable, "-m", "rabbit_engine", *map(str, options), "--cluster", address]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (target.exists() and target.stat().st_size) and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    first.wait()
    answered = target.read_bytes().count(b"\n")
    assert 0 < answered < LINES
    done = rabbit(*options, "--cluster", "auto", "--workers", "1")
    assert done.code == 0, done.err
    assert f"answers {answered} lines already" in done.err
    assert f"{LINES - 1} of {LINES} lines answered, 1 failed ({answered} lines were done before)" in done.err
    assert rows(target) == expected


def test_without_ray_the_error_says_what_to_install(
    talker: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(errors.MissingExtraError, match=r"a cluster needs a package that is not installed.*pip install"):
        batch(talker, source, tmp_path / "out.jsonl", device="cpu", cluster="auto")


def test_options_that_cannot_be_are_refused_before_anything_is_loaded(
    talker: Path, source: Path, tmp_path: Path, rabbit: Any
) -> None:
    target = tmp_path / "out.jsonl"
    with pytest.raises(errors.ConfigurationError, match="workers=2 is for a cluster"):
        batch(talker, source, target, workers=2)
    with pytest.raises(errors.ConfigurationError, match="workers=0 is not an integer from 1"):
        batch(talker, source, target, cluster="auto", workers=0)
    loaded = SimpleNamespace(config=SimpleNamespace(name_or_path="a"))
    with pytest.raises(errors.ConfigurationError, match="load the model themselves: give its name"):
        batch(loaded, source, target, cluster="auto")  # type: ignore[arg-type]
    done = rabbit("batch", talker, source, target, "--workers", "2")
    assert (done.code, "--cluster" in done.err) == (2, True)


class Pipeline:
    """Counts as the actor does; blocks were begun before `begun` times."""

    def __init__(self, begun: int = 0) -> None:
        self.begin = SimpleNamespace(remote=lambda first, count: begun + 1)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker asks of Ray, in this process."""
    ray = SimpleNamespace(get=lambda value: value, util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7"))
    for name in ("worker", "probe"):
        monkeypatch.setattr(f"rabbit_engine.batches.cluster.{name}.require_ray", lambda: ray)


def order_of(model: Path | str, **loading: Any) -> Order:
    return Order.of(model, Choices(), {"device": "cpu", **loading})


def test_what_ends_a_workers_part_is_a_row(talker: Path, no_ray: None) -> None:
    block, claim = table_of_lines([InputLine(3, b'{"prompt": "w3", "max_tokens": 1}'), InputLine(4, b"[")]), crew.Claim(9, 0, 1)
    worker = LineWorker(order_of("/nowhere/model"), claim, Pipeline())
    (failure,) = read_table(worker(block))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.machine) == ("CheckpointNotFoundError", "10.0.0.7")
    worker = LineWorker(order_of(talker), claim, Pipeline())
    answers = {answer.number: answer for answer in read_table(worker(block)) if isinstance(answer, LineAnswer)}
    assert {number: (answer.error is None, answer.tokens) for number, answer in answers.items()} == {3: (True, 1), 4: (False, 0)}
    assert [answers[line.number].checksum for line in lines_of(block)] == [line.checksum for line in lines_of(block)]
    worker._pipeline = Pipeline(begun=50)
    (failure,) = read_table(worker(block))
    assert isinstance(failure, Failure)
    error = crew.error_of(failure)
    assert (type(error), "10.0.0.7: a worker died 50 times while it answered lines 3 to 4" in str(error)) == (
        errors.ClusterError,
        True,
    )
    assert "10.0.0.7: MemoryError: full" in str(crew.error_of(Failure("MemoryError", "full", "10.0.0.7")))
    worker._session.close()


def test_a_worker_that_cannot_open_a_session_keeps_no_model(talker: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def refuse(model: Any, *_: Any) -> None:
        opened.append(model)
        raise errors.BudgetError("no room for texts")

    monkeypatch.setattr("rabbit_engine.batches.cluster.worker.open_session", refuse)
    worker = LineWorker(order_of(talker), crew.Claim(9, 0, 1), Pipeline())
    assert [runtime_of(model).transfer.closed for model in opened] == [True]
    (failure,) = read_table(worker(table_of_lines([InputLine(1, b"{}")])))
    assert failure == Failure("BudgetError", "no room for texts", "10.0.0.7")


class Counting:
    """A window whose other texts get a token whenever one looks."""

    looked = 0

    @property
    def tokens(self) -> int:
        self.looked += 1
        return self.looked

    def cancel(self) -> None:
        pass


def test_a_worker_counts_tokens_that_come_as_it_counts(talker: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    window, lines = Counting(), [InputLine(number, b"{}") for number in range(3)]
    monkeypatch.setattr("rabbit_engine.batches.cluster.worker.open_window", lambda *_: window)
    monkeypatch.setattr("rabbit_engine.batches.cluster.worker.answer", lambda _, given: (Answered(one, "c", {}) for one in given))
    worker = LineWorker(order_of("/nowhere/model"), crew.Claim(9, 0, 1), Pipeline())
    worker._problem, worker._session = None, None  # type: ignore[assignment]
    answers = read_table(worker(table_of_lines(lines)))
    assert sum(answer.tokens for answer in answers if isinstance(answer, LineAnswer)) == window.looked


def test_a_worker_with_other_versions_than_the_driver_refuses_every_line(talker: Path, no_ray: None) -> None:
    order = order_of(talker)
    same_build = {**order.versions, "torch": order.versions["torch"].partition("+")[0] + "+cu999"}
    replace(order, versions=same_build).require_versions()
    worker = LineWorker(replace(order, versions={**order.versions, "torch": "1.0"}), crew.Claim(9, 0, 1), Pipeline())
    (failure,) = read_table(worker(table_of_lines([InputLine(1, b"{}")])))
    assert isinstance(failure, Failure)
    with pytest.raises(errors.MachinesDifferError, match=r"10\.0\.0\.7: it has torch .*, the driver 1\.0: install that"):
        raise crew.error_of(failure)


def test_a_machine_says_which_files_it_has_and_what_it_lacks(talker: Path, no_ray: None, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(talker, tmp_path / talker.name))
    digest = probe(order_of(talker))
    assert isinstance(digest, str)
    assert digest == probe(order_of(copy))
    weights = next(copy.glob("*.safetensors"))
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2] + bytes(byte ^ 1 for byte in raw[len(raw) // 2 :]))
    assert digest != probe(order_of(copy)), "trained further: sizes and headers are the same"
    failure = probe(order_of(talker, max_memory={"cpu": 1000}))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.machine) == ("BudgetError", "10.0.0.7")


def machine(name: str, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {"CPU": 4.0, **resources}}


def test_one_worker_goes_to_each_machine_that_can_run_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [machine("a"), machine("b", CPU=2.0), machine("head", CPU=0.0), {**machine("gone"), "Alive": False}]
    ray: Any = SimpleNamespace(nodes=lambda: nodes)
    monkeypatch.setattr(
        crew, "_able", lambda ray, order, candidates, gpus: ([node for node in candidates if node["NodeID"] != "c"], None)
    )
    found = crew.find_crew(ray, order_of("m"), None)
    assert found == crew.Crew(2, crew.Claim(2, 0, 1), ("head",))
    assert found.label == {"ray.io/node-id": "!in(head)"}
    nodes += [machine("c"), machine("gpu", GPU=2.0)]
    assert crew.find_crew(ray, order_of("m"), None).without == ("head", "c")
    assert crew.find_crew(ray, order_of("m", max_memory={"cpu": "1GB"}), 4).claim == crew.Claim(1, 0, 2)
    with caplog.at_level(logging.WARNING):
        found = crew.find_crew(ray, order_of("m", device=None), None)
    assert (found.workers, found.claim) == (1, crew.Claim(4, 1, 1))
    assert caplog.messages == ['3 machines have no GPU and are left out: give device="cpu" to use all']
    nodes[:] = [machine("head", CPU=0.0)]
    with pytest.raises(errors.ClusterError, match="no machine of the cluster has CPUs"):
        crew.find_crew(ray, order_of("m"), None)


def test_a_machine_that_cannot_run_the_model_is_left_out_unless_none_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: dict[str, str | Failure] = {
        "a": "same",
        "b": Failure("BudgetError", "too little", "b"),
        "c": "same",
    }
    monkeypatch.setattr(crew, "_asked", lambda ray, order, nodes, gpus: [(node, said[node["NodeID"]]) for node in nodes])
    monkeypatch.setattr(crew, "own_model", lambda ray, order: None)
    ray: Any = SimpleNamespace(nodes=lambda: [machine(name) for name in said])
    found = crew.find_crew(ray, order_of("m"), None)
    assert (found.workers, found.without, caplog.messages) == (2, ("b",), ["b is left out: too little"])
    with pytest.raises(errors.ConfigurationError, match="workers=3, and 2 machines can run the model: give max_memory"):
        crew.find_crew(ray, order_of("m"), 3)
    assert crew.find_crew(ray, order_of("m"), 3, fewer=True).workers == 2
    said["c"] = "other"
    with pytest.raises(errors.MachinesDifferError, match="c has other files of the model than a"):
        crew.find_crew(ray, order_of("m"), None)
    said |= {name: Failure("CheckpointNotFoundError", "/nowhere", name) for name in said}
    with pytest.raises(errors.CheckpointNotFoundError, match="a: /nowhere"):
        crew.find_crew(ray, order_of("m"), None)


def test_blocks_are_small_enough_for_all_workers_and_many_enough_to_fill_a_session() -> None:
    for lines, workers, most, size, blocks in (
        (1, 4, 256, 1, 1),
        (10, 4, 256, 1, 10),
        (64, 2, 256, 8, 8),
        (10**6, 4, 256, 16, 16),
        (100, 1, 3, 3, 1),
    ):
        shares = run._shares(lines, workers, most)
        assert (shares.lines, shares.blocks) == (size, blocks), lines
    assert [len(block) for block in run._blocks((InputLine(n, b"") for n in range(5)), 2)] == [2, 2, 1]


def test_a_machine_is_given_up_once_nothing_is_left_but_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    now, alive, places = 0.0, [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": True}], {0: "a", 1: "b"}
    ray: Any = SimpleNamespace(
        nodes=lambda: alive, util=SimpleNamespace(placement_group_table=lambda _: {"bundles_to_node_id": places})
    )
    monkeypatch.setattr(run.time, "monotonic", lambda: now)
    watch = run._LostMachines(ray, None, run.Shares(4, 2))

    def looks(until: float, left: int, *, answered: bool = False) -> str | None:
        nonlocal now
        found = None
        while now < until and found is None:
            now += 1
            found = watch.lost(left, answered=answered)
        return found

    assert looks(100, 8) is None
    alive[1]["Alive"] = False
    assert looks(200, 9) is None, "others have lines"
    assert looks(300, 8, answered=True) is None, "others answer"
    places[1] = "a"
    assert looks(400, 8) is None, "its worker is on another machine"
    places[1] = "b"
    assert looks(420, 8) is None, "it may come back"
    assert looks(500, 8) == "1 machines are gone"


def test_an_order_names_paths_whole_and_travels(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(talker.parent)
    order = Order.of(
        talker.name, Choices(task="chat"), {"layer_shards_saving_path": Path("shards"), "max_memory": {"cpu": "1GB"}}
    )
    assert (order.model, order.label) == (str(talker), talker.name)
    assert order.loading["layer_shards_saving_path"] == talker.parent / "shards"
    assert pickle.loads(pickle.dumps(order)) == order
    assert Order.of("owner/name", Choices(), {}).model == "owner/name"
    assert Workers("auto").count is None


def test_rows_are_answers_and_failures() -> None:
    answer, failure = LineAnswer(1, 2**64 - 1, "é\n", "{}", None, 3), Failure("OSError", "x", "m")
    assert list(read_table(table_of([answer], failure))) == [answer, failure]


def test_a_line_that_two_workers_answered_is_written_once(source: Path, tmp_path: Path) -> None:
    with BatchJob("m", source, tmp_path / "out.jsonl", Choices(), {}) as job:
        first, second, *_ = job.lines()
        for line, text in ((first, "a"), (second, "b"), (first, "c")):
            job.write(line, "x", {"body": {}, "request_id": text}, None)
        assert job.left == LINES - 2
        assert first not in job.lines()
    assert [json.loads(text)["response"]["request_id"] for text in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        "a",
        "b",
    ]


def test_lines_are_handed_out_again_until_no_worker_answers_any(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = [9, 4, 4, 4, 4, 4, 4]
    job: Any = SimpleNamespace(left=9)

    def attempt(*_: object, is_first: bool) -> str:
        job.left = left.pop(0)
        return "1 machines are gone"

    def no_crew(*_: object, is_first: bool) -> str:
        raise run._NoCrewError("b is away") from errors.ClusterError("b is away")

    monkeypatch.setattr(run, "connect", lambda _: None)
    monkeypatch.setattr(run, "_attempt", attempt)
    with pytest.raises(errors.ClusterError, match="4 lines are left, and no worker answers: 1 machines are gone"):
        run.answer_on_cluster(Workers("auto"), order_of("m"), job, lambda *_: None)
    assert left == []
    assert "1 machines are gone: 9 lines are handed out again" in caplog.messages
    monkeypatch.setattr(run, "_SETTLE_S", 0)
    attempts = iter([attempt, no_crew, no_crew, attempt])
    monkeypatch.setattr(run, "_attempt", lambda *given, **named: next(attempts)(*given, **named))
    left[:], job.left = [3, 0], 9
    run.answer_on_cluster(Workers("auto"), order_of("m"), job, lambda *_: None)
    assert job.left == 0
    monkeypatch.setattr(run, "_attempt", no_crew)
    job.left = 9
    with pytest.raises(errors.ClusterError, match="b is away"):
        run.answer_on_cluster(Workers("auto"), order_of("m"), job, lambda *_: None)
