"""What a text takes on top of the weights is known before it is computed, and refused where it is not there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from safetensors.torch import save_file

from rabbit_engine import errors
from rabbit_engine.model.admission import demand_of
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, cache_bytes, most_prompt, need_bytes, work_bytes
from rabbit_engine.planning.known_probes import probe_of
from rabbit_engine.planning.operations import RememberedResults, described
from rabbit_engine.planning.probe import Curve, Probe, fit_curve, run_probe
from rabbit_engine.sessions.room import Room, measure_room
from rabbit_engine.storage.directio import HUGE_PAGE, claim_memory
from rabbit_engine.storage.tensorfiles import read_header, same_bytes
from rabbit_engine.streaming import Trace, claim_ring
from rabbit_engine.streaming.transfer.unit import Extent
from rabbit_engine.transformers_bridge.generation import settings_of
from rabbit_engine.utils import heap

PROBE = Probe(cache_token_bytes=100, layers=Curve(10, 1000, 2), head=Curve(50, 0, 0), vocabulary=10)


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def on_meta(family: str, **changes: Any) -> Any:
    """A family's model without values."""
    return families.build(family, **changes).to("meta")


def test_a_curve_goes_through_both_prompts() -> None:
    assert fit_curve((10, 10 * 7 + 100 * 3), (100, 100 * 7 + 10_000 * 3)) == Curve(0, 7, 3)
    assert fit_curve((10, 500), (100, 1400)) == Curve(360, 14, 0)
    assert fit_curve((16, 0), (64, 0)) == Curve()


@pytest.mark.parametrize("vocabulary", [96, 50_000])
def test_a_token_costs_the_same_whatever_the_vocabulary(vocabulary: int) -> None:
    probe = run_probe(on_meta("llama", vocab_size=vocabulary))
    assert probe.layers == run_probe(on_meta("llama")).layers
    assert probe.vocabulary == vocabulary
    # the widest moment of an MLP of 48 beside states of 32, in float32: residual, states, gate, its activation, up
    assert 4 * (2 * 32 + 2 * 48) <= probe.layers.token <= 4 * (4 * 32 + 4 * 48)


def test_scores_are_counted_if_the_kernel_holds_them() -> None:
    heads, softmax = 4, 4 * 2  # float32 scores, and what the softmax makes of them
    fused = run_probe(on_meta("llama", max_position_embeddings=2048))
    eager = run_probe(on_meta("llama", max_position_embeddings=2048, attn_implementation="eager"))
    latent = run_probe(on_meta("deepseek_v3", max_position_embeddings=2048))  # keys and values of two widths
    assert fused.layers.square == 0
    assert eager.layers.square >= heads * softmax
    assert latent.layers.square >= heads * softmax


def test_models_that_are_alike_are_probed_once_in_a_process() -> None:
    probe = probe_of(on_meta("llama"))
    assert probe == run_probe(on_meta("llama"))
    assert probe_of(on_meta("llama")) is probe
    others = [on_meta("llama", dtype=torch.bfloat16), on_meta("llama", vocab_size=512), on_meta("llama_tied"), on_meta("qwen2")]
    others += [on_meta("llama", attn_implementation="eager")]
    assert all(probe_of(other) == run_probe(other) for other in others)
    assert probe_of(on_meta("llama"), "cuda") is not probe
    replaced = on_meta("llama")
    replaced.model.layers[0].mlp.forward = lambda states: states
    assert probe_of(replaced) == run_probe(replaced) != probe


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "deepseek_v3", "gpt2"])
def test_operations_that_are_remembered_give_the_same_probe(family: str) -> None:
    class Forgotten(RememberedResults):
        def run(self, *operation: Any) -> Any:
            return RememberedResults().run(*operation)

    model = on_meta(family, dtype=torch.bfloat16)
    found = run_probe(model)
    assert run_probe(model, results=Forgotten()) == found
    assert found.alone


def test_equal_operands_of_different_types_are_distinguished() -> None:
    values = [described((2, value), []) for value in (1, True, 1.0)]
    assert len(set(values)) == 3
    rows, columns = torch.ones(2, 3), torch.ones(3, 2).T
    found: list[torch.Tensor] = []
    assert described([rows], found) != described([columns], found)
    assert [id(tensor) for tensor in found] == [id(rows), id(columns)]


def test_a_need_is_caches_at_their_longest_and_a_pass_over_the_prompt() -> None:
    assert cache_bytes(PROBE, Demand(30, 10)) == 40 * 100
    assert work_bytes(PROBE, Demand(30, 10)) == 10 + 30 * 1000 + 900 * 2 + 40 * 10
    assert work_bytes(PROBE, Demand(30, 10, is_computed=True)) == 10 + 1000 + 2 + 400
    assert work_bytes(PROBE, Demand(30, 10, chunk=1)) == 10 + 1000 + 2 + 400 + 29 * (2 + 4)
    assert work_bytes(PROBE, Demand(30, 10, padded=True)) - work_bytes(PROBE, Demand(30, 10)) == 4 * 900
    assert need_bytes(PROBE, Demand(30, 10, sequences=3)) == 3 * need_bytes(PROBE, Demand(30, 10))


def test_texts_whose_prompts_are_computed_leave_room_for_the_next() -> None:
    one = need_bytes(PROBE, Demand(100, 10))
    room = Room(2 * one, PROBE)
    assert room.fits([Demand(100, 10)] * 2)
    assert not room.fits([Demand(100, 10)] * 3)
    assert room.fits([Demand(100, 10, is_computed=True)] * 8 + [Demand(100, 10)])


def test_the_longest_prompt_that_fits_is_found() -> None:
    assert most_prompt(lambda tokens: tokens <= 77, 1000) == 77
    assert most_prompt(lambda tokens: tokens <= 77, 70) == 70
    assert most_prompt(lambda _: False, 1000) == 0
    assert measure_room(1000, PROBE, None).nbytes == 900


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        ({"max_new_tokens": 5}, {}, Demand(9, 5, 2)),
        ({"max_length": 30}, {}, Demand(9, 21, 2)),
        ({}, {"max_new_tokens": 7}, Demand(9, 7, 2)),
        ({}, {}, Demand(9, 20, 2)),
        ({}, {"max_length": 20}, Demand(9, 11, 2)),
        ({"num_beams": 3, "max_new_tokens": 1}, {"num_return_sequences": 2}, Demand(9, 1, 6)),
        ({"max_new_tokens": 1, "prefill_chunk_size": 4}, {}, Demand(9, 1, 2, chunk=4)),
        ({"max_new_tokens": 1, "attention_mask": torch.tensor([[1] * 9, [0] + [1] * 8])}, {}, Demand(9, 1, 2, padded=True)),
    ],
)
def test_the_demand_of_a_generate_call_is_counted(given: dict[str, Any], config: dict[str, Any], expected: Demand) -> None:
    own = SimpleNamespace(num_beams=1, max_new_tokens=config.get("max_new_tokens"))
    asked = settings_of(given, SimpleNamespace(**config), own)
    assert demand_of(torch.ones(2, 9, dtype=torch.long), given, asked) == expected


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_computed(
    checkpoint: Any, streamed: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(checkpoint("llama"))
    probe = runtime_of(model).partition.probe
    free = need_bytes(probe, Demand(7, 4)) + KEPT_FREE_BYTES
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: free)
    with pytest.raises(errors.PromptTooLongError, match=r"a prompt of 7 tokens: .* max_seq_len=16, which"):
        model.generate(ids, max_new_tokens=4)
    assert model.profile.passes == 0
    assert model.generate(ids[:, :7], max_new_tokens=4, do_sample=False).shape == (1, 11)


def test_memory_that_a_ring_has_not_written_is_not_free() -> None:
    ring = claim_ring(torch.device("cpu"), 4 * HUGE_PAGE, Trace())
    try:
        assert ring.untouched_bytes == 4 * HUGE_PAGE
        ring.copy(torch.ones(10, dtype=torch.uint8), HUGE_PAGE - 5, None, "across two")
        assert ring.untouched_bytes == 2 * HUGE_PAGE
    finally:
        ring.close()
    assert ring.untouched_bytes == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_claimed_memory_takes_no_more_than_requested() -> None:
    nbytes, before = 2 * HUGE_PAGE + 4096, resident()
    memory = claim_memory(nbytes).fill_(1)
    assert resident() - before < nbytes + 2**18  # not the third huge page
    del memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_staging_takes_the_bytes_that_the_plan_counts(tmp_path: Path) -> None:
    """A buffer for the largest read has huge pages that smaller reads would touch whole."""
    path, chunk_bytes = tmp_path / "weights", HUGE_PAGE + HUGE_PAGE // 4
    path.write_bytes(bytes(range(256)) * (chunk_bytes // 256 + 1))
    ring = claim_ring(torch.device("cpu"), 4 * HUGE_PAGE, Trace())
    before = resident()
    try:
        for start in range(6):
            chunk = Extent(path, 16 + start, chunk_bytes, 0)
            ring.fill(chunk, 0, None, "misaligned", 0)
            assert ring.view(0, 4).tolist() == [16 + start, 17 + start, 18 + start, 19 + start]
        assert resident() - before < 2 * HUGE_PAGE + 6 * chunk.read_bytes + 2**20
    finally:
        ring.close()


def test_equal_copies_of_a_tie_are_compared_in_small_pieces(tmp_path: Path) -> None:
    """A model whose smallest budget is 3 MB compares them while it loads."""
    save_file({name: torch.ones(2**22 + 1, dtype=torch.uint8) for name in "ab"}, tmp_path / "two.safetensors")
    first, second = read_header(tmp_path / "two.safetensors").tensors
    tracemalloc.start()
    try:
        assert same_bytes(first, second)
        assert tracemalloc.get_traced_memory()[1] < 2**21 + 2**18
    finally:
        tracemalloc.stop()


def test_a_head_that_stays_is_staged_within_the_plan(own_checkpoint: Any, streamed: Any) -> None:
    """Its blocks may be aligned where the whole is not; buffers for it are in the budget all the same."""
    model = streamed(own_checkpoint("llama", vocab_size=1000), max_memory={"cpu": "10MB"})
    plan = model.plan
    staged = [chunk.read_bytes for unit in runtime_of(model).partition.units.values() for chunk in unit.staged_chunks()]
    assert plan.staging_bytes >= 6 * max(staged, default=0)
    assert plan.device_bytes + plan.staging_bytes <= 10**7


GROWTH = """
import torch
from pathlib import Path
from rabbit_engine.utils.heap import give_large_blocks_back
from rabbit_engine.utils.kernels import keep_few_kernels

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
keep_few_kernels()
give_large_blocks_back()
freed = torch.ones(2**23, dtype=torch.uint8)
del freed  # after which glibc keeps blocks of its size, if it is not told otherwise
before = resident()
kept, freed = [], []
for _ in range(40):  # in turns, as caches and activations come: what is kept lies between what is freed
    freed.append(torch.ones(2**19, dtype=torch.uint8))
    kept.append(torch.ones(2**10, dtype=torch.uint8))
freed.clear()
print(resident() - before)

weight = torch.ones(256, 256, dtype=torch.bfloat16)
product = lambda rows: torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), weight)
with torch.no_grad():
    for rows in range(100, 160): product(rows)
    before = resident()
    for rows in range(160, 260): product(rows)
print(resident() - before)
"""


@pytest.mark.skipif(not heap.glibc(), reason="glibc's own")
def test_neither_freed_tensors_nor_prompts_of_ever_new_lengths_grow_the_process() -> None:
    """In a separate process: memory freed by another test would serve these blocks too."""
    own = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True)
    of_tensors, of_kernels = map(int, done.stdout.split())
    assert of_tensors < 4 * 2**20  # left to glibc: 20 MB
    assert of_kernels < 20 * 2**20  # all kernels kept: 60 MB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the threads of a process are counted in /proc")
def test_readers_start_no_threads_of_torch(tmp_path: Path) -> None:
    """Those of the thread that runs the model wait far longer for each other once a process has more of them than processors."""
    threads, nbytes = torch.get_num_threads(), 2**20
    path = tmp_path / "misaligned"
    path.write_bytes(bytes(nbytes + 8))
    chunk = Extent(path, offset=8, nbytes=nbytes, place=0)
    counted: list[int] = []

    def read() -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        ring.fill(chunk, 0, None, "misaligned", 0)
        counted.append(len(list(Path("/proc/self/task").iterdir())) - before)

    torch.set_num_threads(2)
    try:
        ring = claim_ring(torch.device("cpu"), nbytes, Trace())
        reader = threading.Thread(target=read)
        reader.start()
        reader.join()
        ring.close()
    finally:
        torch.set_num_threads(threads)
    assert counted == [0]
