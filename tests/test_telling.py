"""What users see: the plan before anything is downloaded, the profile, the trace, the picture, the machine's limits."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm.auto
from conftest import smallest
from fake_hub import FakeHub
from guessing import Guided
from rich.console import Console

from rabbit_engine import AutoModel, DraftModel, SelfDraft, errors
from rabbit_engine.config import SourceConfig, SplitConfig, StreamConfig
from rabbit_engine.diagnostics.benchmark import DECODE, DISK, RING, as_markdown, link, residency, shares
from rabbit_engine.diagnostics.plotting import plot_trace
from rabbit_engine.diagnostics.speculation import compare
from rabbit_engine.model import forecast_with_draft, read_settings
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.forecast import forecast
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.plan import Plan
from rabbit_engine.planning.tiers import Budget, UnitSize
from rabbit_engine.streaming import Profile, Span, Trace, busy_share, write_chrome_trace
from rabbit_engine.utils import platform
from rabbit_engine.utils.bar import Bar
from rabbit_engine.utils.sizes import format_bytes
from rabbit_engine.utils.speeds import Speeds

REPO = "someone/tiny-llama"
CPU = torch.device("cpu")
SPEEDS = Speeds(disk=1e9, source="given")


def stream(budget: int | None, device: torch.device = CPU, host: int | None = None) -> StreamConfig:
    return StreamConfig(device=device, device_budget_bytes=budget, host_budget_bytes=host, speeds=SPEEDS)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral", "gemma3"])
@pytest.mark.parametrize("split", ["auto", "always"])
def test_a_forecast_equals_the_plan_of_loading(family: str, split: str, own_checkpoint: Any, streamed: Any) -> None:
    folder = own_checkpoint(family)
    first = forecast(folder, SourceConfig(), SplitConfig(mode=split), stream(None))
    assert not (folder / "rabbit_shards").exists()
    assert ("split first" in str(first)) == (split == "always")
    model = streamed(folder, split=split)
    again = forecast(folder, SourceConfig(), SplitConfig(mode=split), stream(model.plan.budget.device_bytes))
    assert (again.resident, again.streamed, again.pass_bytes) == (model.plan.resident, model.plan.streamed, model.plan.pass_bytes)
    assert again.experts == model.plan.experts
    assert model.plan.weights_bytes == first.weights_bytes


@pytest.fixture
def hub(checkpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with FakeHub(repos={REPO: checkpoint("llama")}).as_the_hub(monkeypatch) as hub:
        yield hub


def test_a_repos_plan_needs_its_headers_alone(hub: FakeHub, checkpoint: Any, tmp_path: Path) -> None:
    local = forecast(checkpoint("llama"), SourceConfig(), SplitConfig(), stream(None))
    hub.head_only = True
    remote = forecast(REPO, SourceConfig(cache_dir=tmp_path), SplitConfig(), stream(100_000))
    assert remote.weights_bytes == pytest.approx(local.weights_bytes, rel=0.5)  # tiny units: what aligns them to pages is a third
    assert remote.streamed
    assert "streamed from the original files, after a download of" in str(remote)
    weights = [size for name, size in hub.served if name.endswith(".safetensors")]
    assert weights
    assert sum(weights) < remote.weights_bytes
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(errors.HubUnreachableError):
        forecast(REPO, SourceConfig(cache_dir=tmp_path, local_files_only=True), SplitConfig(), stream(250_000))


def test_a_missing_gpu_can_be_planned_for(checkpoint: Any, rabbit: Any) -> None:
    done = rabbit("plan", checkpoint("llama"), "--device", "cuda:0", "--max-memory", "0=115kB,cpu=110MB", "--disk-rate", "5GB")
    assert done.code == 0, done.err
    assert "in host memory" in done.out
    assert "over the link" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "foo", "--max-memory", "1GiB"), "--device foo is not a device torch knows"),
        (("--device", "cuda:7", "--max-memory", "cpu=24GiB"), "--device cuda:7 is not available"),
        (("--device", "meta", "--max-memory", "1GiB"), "error: --device meta"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(arguments: tuple[str, ...], words: str, checkpoint: Any, rabbit: Any) -> None:
    done = rabbit("plan", checkpoint("llama"), *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err.splitlines()[-1]


def test_the_profile_counts_by_unit(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"), profiling_mode=True)
    for _ in range(3):
        model(ids)
    runtime_of(model).transfer.wait_until_idle()
    profile = model.profile
    assert profile.passes == 3
    for name in model.plan.streamed:
        unit = profile.units[name]
        assert unit.loads == 3
        assert unit.bytes_read >= 3 * 4096
        assert unit.read_s > 0 < unit.compute_s
    assert sum(unit.bytes_read for unit in profile.units.values()) == profile.bytes_read
    assert 0 < profile.read_s <= sum(unit.read_s for unit in profile.units.values()) + 0.05  # what overlaps counts once
    assert profile.rows()[0][1].startswith("3, ")
    assert str(profile).splitlines()[0] == f"passes  {profile.rows()[0][1]}"
    lanes = {span.lane.split()[0] for span in runtime_of(model).trace.spans()}
    assert lanes >= {"disk", "compute", "wait"}


@pytest.fixture
def small_plan() -> Plan:
    units = [UnitSize(f"layers.{index}<b>", "streamed", 1_000_000) for index in range(40)]
    return place(units, "cpu", Budget(device_bytes=10_000_000), SPEEDS, notes=["[red]a & b"])


def test_a_plan_and_a_profile_are_one_line_in_a_debugger(small_plan: Plan) -> None:
    assert repr(small_plan) == "<Plan on cpu: 40.00 MB of weights, 10.00 MB held, 35.00 MB a pass from disk>"
    profile = Profile(passes=3, bytes_read=2_000_000_000, read_s=4.0, wait_s=1.5, pass_s=6.0)
    assert repr(profile) == "<Profile: 3 passes, read 2.00 GB at 500.00 MB/s, waited 1.5 s of 6 s>"


def test_a_notebook_gets_every_row_escaped(small_plan: Plan) -> None:
    html = small_plan._repr_html_()
    assert html.count("<tr>") == len(small_plan.rows())
    assert '<td style="text-align: left">[red]a &amp; b</td>' in html
    assert "<b>" not in html
    assert Profile(passes=3)._repr_html_().startswith('<table><tr><th style="text-align: left">passes</th>')


def test_rich_prints_every_row_as_it_is(small_plan: Plan) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(small_plan)
    printed = console.export_text()
    assert all(name in printed and value in printed for name, value in small_plan.rows())


def test_bars_are_those_of_the_notebook_in_a_notebook() -> None:
    assert issubclass(Bar, tqdm.auto.tqdm)
    assert Bar.monitor_interval == 0


def test_busy_share_counts_overlapping_spans_once() -> None:
    spans = [Span("disk 0", "a", 0, 2), Span("disk 1", "b", 1, 3), Span("disk 0", "c", 5, 6), Span("compute", "d", 6, 10)]
    assert busy_share(spans, "disk") == pytest.approx(0.4)
    assert busy_share(spans, "compute") == pytest.approx(0.4)
    assert busy_share(spans, "copy") == busy_share([], "disk") == 0


def test_a_trace_is_in_the_trace_event_format(tmp_path: Path) -> None:
    trace = Trace(on=True)
    with trace.span("disk 0", "layer", 4096):
        pass
    trace.add("compute", "layer", 1.0, 2.5)
    trace.add("draft", "lookup", 2.5, 2.6)
    write_chrome_trace(trace.spans(), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"disk 0", "compute", "draft"}
    spans = {event["name"]: event for event in events if event["ph"] == "X" and event["cat"] == "compute"}
    assert spans["layer"]["dur"] == pytest.approx(1.5e6)
    plot_trace(trace.spans(), tmp_path / "t.png", "title")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_is_off_records_nothing() -> None:
    trace = Trace()
    with trace.span("disk 0", "layer"):
        pass
    trace.add("disk 0", "layer", 0.0, 1.0)
    assert trace.spans() == []


@pytest.mark.parametrize("draft", [None, "qwen3"])
def test_the_plan_of_a_model_with_a_draft_is_what_loading_does(draft: Any, own_checkpoint: Any, rabbit: Any) -> None:
    folder = own_checkpoint("llama")
    named = None if draft is None else str(own_checkpoint(draft))
    settings = read_settings({"device": "cpu", "max_memory": {"cpu": 1_500_000}}, planned=True)
    guesses = SelfDraft("8bit") if named is None else DraftModel(named, compression="8bit")
    planned = forecast_with_draft(folder, settings, guesses)
    with AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": 1_500_000}, speculate=guesses) as model:
        assert 0 < planned.draft_bytes == model.plan.draft_bytes
        assert planned.pass_bytes == model.plan.pass_bytes
    done = rabbit("plan", folder, "--device", "cpu", "-m", "1500kB", "--draft", named or "self", "--draft-compression", "8bit")
    assert f"{format_bytes(planned.draft_bytes)} of 1.50 MB on cpu, in memory before any weight" in done.out
    assert "raise --max-memory" in rabbit("plan", folder, "--device", "cpu", "-m", "1kB", "--draft", named or "self").err


def test_a_plan_with_speculation_says_what_lookup_gains(own_checkpoint: Any, streamed: Any, rabbit: Any) -> None:
    folder = own_checkpoint("llama")
    needed = streamed(folder).plan.budget.device_bytes
    asked = ("plan", folder, "--device", "cpu", "--disk-rate", "1MB/s", "--speculate")
    told = rabbit(*asked, "-m", f"cpu={needed}").out
    plain, least, most = (float(found) for found in re.search(_SECONDS, told).group(3, 1, 2))  # type: ignore[union-attr]
    assert plain / 1.3 == pytest.approx(least, rel=0.02)
    assert plain / 4.6 == pytest.approx(most, rel=0.02)
    assert "with lookup: no guess pays: nothing moves" in rabbit(*asked, "-m", "10MB").out


_SECONDS = r"with lookup: about ([\d.]+) s to ([\d.]+) s a token instead of ([\d.]+) s"


def test_bench_measures_the_link_and_residency(checkpoint: Any, streamed: Any) -> None:
    needed = int(streamed(checkpoint("qwen3")).plan.budget.device_bytes)
    records, spans, plan = link(checkpoint("qwen3"), rounds=2, steps=1, device="cpu", max_memory={"cpu": needed})
    assert [record.lane for record in records] == [DISK, RING, DECODE]
    assert all(record.bytes_moved == plan.pass_bytes > 0 and len(record.rounds_s) == 2 for record in records)
    assert set(shares(spans)) == {"disk", "copy", "compute", "wait"}
    assert as_markdown(records).count("\n| ") == 4 - 1
    grown = residency(checkpoint("qwen3"), [needed, needed + 40_000, 10**9], steps=2)
    read = [record.bytes_moved for record in grown]
    assert read == [record.conditions["plan_pass_bytes"] for record in grown]
    assert read[0] > read[1] > read[2] == 0


def test_bench_of_a_model_whose_cache_cannot_go_back(checkpoint: Any, streamed: Any) -> None:
    needed = int(streamed(checkpoint("qwen3_next")).plan.budget.device_bytes)
    records, _, _ = link(checkpoint("qwen3_next"), rounds=1, steps=2, device="cpu", max_memory={"cpu": needed})
    assert [record.lane for record in records] == [DISK, DECODE]  # experts do not pass through the ring


def test_bench_compares_decoding_with_speculation_and_without(checkpoint: Any, plain: Any) -> None:
    ids = torch.arange(5, 20)[None]
    expected = plain(checkpoint("llama"), dtype=torch.float32).generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()
    keywords = {"device": "cpu", "dtype": "float32", "max_memory": smallest(checkpoint("llama"), dtype="float32")}
    found = compare(checkpoint("llama"), Guided(expected), lambda _: {"input_ids": ids}, rounds=2, tokens=16, **keywords)
    usual, guided = found.records
    assert [usual.lane, guided.lane] == ["decoding", "decoding with guided"]
    assert found.same_tokens is None
    assert found.profile.tokens_a_pass > 1.5
    assert 0 < guided.bytes_moved < usual.bytes_moved
    assert len(guided.rounds_s) == 2
    assert "draft" in shares(found.spans)


def test_bench_writes_a_trace_and_a_picture(checkpoint: Any, streamed: Any, tmp_path: Path, rabbit: Any) -> None:
    needed = streamed(checkpoint("llama")).plan.budget.device_bytes
    done = rabbit(
        "bench", checkpoint("llama"), "--rounds", 1, "--tokens", 2, "--device", "cpu", "--max-memory", f"cpu={needed}",
        "--trace", tmp_path / "t.json", "--plot", tmp_path / "t.png", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "of the disk's own rate in this run" in done.out
    assert json.loads(done.out.splitlines()[-1])["lane"] == DECODE
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("files", "room"),
    [
        pytest.param(
            {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\nfile 400\nfile_mapped 100\nshmem 50\n"},
            1000 - 700 + 400 - 100 - 50,
            id="v2",
        ),
        pytest.param(
            {
                "memory.limit_in_bytes": "1000",
                "memory.usage_in_bytes": "900",
                "memory.stat": "cache 1\ntotal_cache 500\ntotal_mapped_file 200\ntotal_shmem 0\n",
            },
            1000 - 900 + 500 - 200,
            id="v1",
        ),
        pytest.param({"memory.max": "max", "memory.current": "700", "memory.stat": "file 4\n"}, None, id="no limit"),
        pytest.param({}, None, id="no cgroup"),
    ],
)
def test_free_memory_is_limited_by_the_cgroup(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = [platform.cgroup_room(tmp_path, *names) for names in platform.CGROUP_FILES]
    assert [value for value in found if value is not None] == ([] if room is None else [room])
