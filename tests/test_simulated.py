"""Models on an accelerator that copies as late as possible: transformers' answer, and no bytes are used before their wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from simulated import SimulatedAccelerator, Watch, load_simulated
from test_packed_checkpoints import MAKERS
from test_quantised import quantised

from rabbit_engine import Session
from rabbit_engine.config import Cut, StreamConfig
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.planning.budget import FreeMemory, budget_for
from rabbit_engine.quantization.kernels import torch_operations
from rabbit_engine.streaming import STAGING_BYTES, LinearBlocks, RandomStream, Scheduler
from rabbit_engine.streaming.transfer.measure import copy_rate
from rabbit_engine.streaming.transfer.ring import READERS

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FINE = Cut(least_bytes=1000, most_bytes=2500, rest_share=0.5)
ROW_BLOCK_BOUND = 2e-6


@pytest.fixture
def simulated() -> Iterator[Callable[..., Any]]:
    """`simulated(folder, ...)` loads on a new device, `model.simulated`, that sees this thread's kernels."""
    devices: list[SimulatedAccelerator] = []
    with contextlib.ExitStack() as stack, torch.no_grad():

        def load(folder: Any, **keywords: Any) -> Any:
            devices.append(SimulatedAccelerator(seed=len(devices)))
            model = load_simulated(folder, devices[-1], **keywords)
            stack.callback(model.close)
            stack.enter_context(Watch(devices[-1]))
            model.simulated = devices[-1]
            return model

        yield load
    assert [race for device in devices for race in device.races] == []
    assert [device.pending for device in devices] == [0] * len(devices)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral", "qwen3_next", "gpt_oss"])
@pytest.mark.parametrize(("beyond", "in_host"), [(0.0, 0), (0.0, 60_000), (0.2, 10**9)])
def test_any_mix_of_tiers_gives_transformers_answer(
    family: str, beyond: float, in_host: int, checkpoint: Any, plain: Any, simulated: Any, ids: Any, padded: Any
) -> None:
    whole, model = plain(checkpoint(family)), simulated(checkpoint(family), beyond=beyond, in_host=in_host)
    assert model.plan.link_bytes > 0
    assert (model.plan.host_bytes > 0) == (in_host > 0)
    for inputs in ({"input_ids": ids}, padded):
        assert torch.equal(model(**inputs).logits, whole(**inputs).logits)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    assert model.simulated.copies > len(model.plan.resident)


@pytest.mark.parametrize(("family", "in_host"), [("llama_tied", 0), ("gpt2", 20_000)])
def test_modules_and_blocks_of_the_head_are_waited_for(
    family: str, in_host: int, checkpoint: Any, plain: Any, simulated: Any, ids: Any
) -> None:
    whole, model = plain(checkpoint(family)), simulated(checkpoint(family), cut=FINE, in_host=in_host)
    assert isinstance(model.lm_head.weight, LinearBlocks)
    for _ in range(3):
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=ROW_BLOCK_BOUND)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


@pytest.mark.parametrize(("family", "in_host"), [("llama", 0), ("deepseek_v3", 60_000), ("gpt_oss", 60_000)])
def test_encoded_weights_are_decoded_once_they_are_there(
    family: str, in_host: int, simulated: Any, ids: Any, tmp_path: Path
) -> None:
    folder, whole = quantised(family, tmp_path / "model")
    model = simulated(folder, in_host=in_host)
    assert model.plan.scratch_bytes > 0
    assert model.plan.link_bytes > 0
    for _ in range(2):
        assert torch.equal(model(ids).logits, whole(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


@pytest.mark.parametrize("kind", MAKERS)
def test_packed_weights_are_decoded_once_they_are_there(
    kind: str, simulated: Any, streamed: Any, ids: Any, tmp_path: Path
) -> None:
    folder = MAKERS[kind](tmp_path / kind)
    whole, model = streamed(folder), simulated(folder, in_host=20_000)
    assert model.plan.link_bytes > 0
    with torch_operations():  # the device does not see what compiled kernels write
        for _ in range(2):
            assert torch.equal(model(ids).logits, whole(ids).logits)
        assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_weights_decoded_at_load_are_there_for_any_stream(family: str, ids: Any, tmp_path: Path) -> None:
    """Each is read to where the one before it was decoded from."""
    folder, whole = quantised(family, tmp_path / "model")
    device = SimulatedAccelerator()
    with torch.no_grad(), Watch(device), load_simulated(folder, device, beyond=9) as model:
        assert not model.plan.streamed
        assert any(unit.decoded for unit in model.plan.units)
        with device.in_stream():
            assert torch.equal(model(ids).logits, whole(ids).logits)
    assert device.races == []


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (1, 3 + 4 * index), generator=generator) for index in range(count)]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_many_texts_in_one_pass_have_the_tokens_they_have_alone(family: str, checkpoint: Any, plain: Any, simulated: Any) -> None:
    whole, model = plain(checkpoint(family)), simulated(checkpoint(family), in_host=40_000)
    scheduler, found = Scheduler(runtime_of(model).binding), dict[int, Any]()

    def work(index: int, ids: torch.Tensor) -> Callable[[], None]:
        return lambda: found.update({index: model.generate(ids, **GREEDY).tolist()})

    for index, ids in enumerate(prompts(3)):
        scheduler.add(work(index, ids), RandomStream(index, model.device))
    while scheduler.fibers:
        scheduler.run_pass()
    assert found == {index: whole.generate(ids, **GREEDY).tolist() for index, ids in enumerate(prompts(3))}


def test_a_session_in_its_own_thread_is_watched_too(plain: Any, simulated: Any, tmp_path: Path) -> None:
    folder = talking.save(tmp_path)
    whole, model = plain(folder), simulated(folder, in_host=40_000)
    watch, asked = Watch(model.simulated), [ids[0].tolist() for ids in prompts(3)]
    with Session(model) as session:
        session.call([(watch.__enter__, 1)])[0].result()
        found = [list(reply.tokens) for reply in session.generate(asked, max_new_tokens=4, temperature=0)]
        session.call([(lambda: watch.__exit__(None, None, None), 1)])[0].result()
    greedy = {**GREEDY, "max_new_tokens": 4, "eos_token_id": model.generation_config.eos_token_id}
    assert found == [whole.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in asked]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_pass_that_ends_anywhere_leaves_no_bytes_in_use(
    family: str, error: type[BaseException], checkpoint: Any, plain: Any, simulated: Any, ids: Any
) -> None:
    """A kernel of the pass that was left may still run when the next one's weights are copied."""
    whole, model = plain(checkpoint(family)), simulated(checkpoint(family), beyond=0.1, in_host=30_000)
    expected, remaining = whole(ids).logits, [0]

    def count(*_: Any) -> None:
        remaining[0] -= 1
        if not remaining[0]:
            raise error

    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in linears]
    ended = 0
    for left in range(1, 3 * len(linears), 2):
        remaining[0] = left
        with contextlib.suppress(error):
            model(ids)
            model(ids)
            continue
        ended += 1
        assert runtime_of(model).transfer.held == ()
    assert ended >= len(linears) // 2
    for hook in hooks:
        hook.remove()
    assert torch.equal(model(ids).logits, expected)


def test_kernels_in_another_stream_are_waited_for(checkpoint: Any, plain: Any, simulated: Any, ids: Any) -> None:
    """As within `torch.cuda.stream`, or in a thread with its own stream."""
    whole, model = plain(checkpoint("llama")), simulated(checkpoint("llama"), in_host=40_000)
    expected = whole(ids).logits
    for _ in range(3):
        with model.simulated.in_stream():
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("beyond", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gpt_oss"])
def test_decoded_weights_are_waited_for_in_another_stream(family: str, beyond: float, ids: Any, tmp_path: Path) -> None:
    """Decoded in one stream, used and overwritten in another."""
    folder, whole = quantised(family, tmp_path / "model")
    device = SimulatedAccelerator()
    with torch.no_grad(), Watch(device), load_simulated(folder, device, in_host=40_000, beyond=beyond) as model:
        expected = whole(ids).logits
        for _ in range(4):
            with device.in_stream():
                assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model(ids).logits, expected)
    assert device.races == []


def test_a_new_thread_after_another_is_right(checkpoint: Any, plain: Any, simulated: Any) -> None:
    whole, model, found = plain(checkpoint("llama")), simulated(checkpoint("llama")), dict[int, Any]()

    def work(index: int, ids: torch.Tensor) -> None:
        with torch.no_grad(), Watch(model.simulated), model.simulated.in_stream():
            found[index] = model.generate(ids, **GREEDY).tolist()

    threads = [threading.Thread(target=work, args=each) for each in enumerate(prompts(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {index: whole.generate(ids, **GREEDY).tolist() for index, ids in enumerate(prompts(3))}


def test_the_link_is_measured_with_waits_around_every_copy() -> None:
    device = SimulatedAccelerator()
    assert copy_rate(device, 2**16) > 0
    assert (device.races, device.pending) == ([], 0)
    assert device.copies == 3


def test_every_device_with_streams_sets_aside_as_much_for_its_ring(checkpoint: Any, streamed: Any) -> None:
    partition, free = (
        runtime_of(streamed(checkpoint("llama"))).partition,
        FreeMemory(device_bytes=10**9, host_bytes=10**9, pinned_bytes=10**8),
    )
    cuda, xpu, mps = (
        budget_for(partition, StreamConfig(device=torch.device(name), device_budget_bytes=10**9), free)
        for name in ("cuda:0", "xpu:0", "mps")
    )
    assert cuda == xpu
    assert (cuda.host_bytes, cuda.host_staging_bytes) == (10**8, 2 * READERS * STAGING_BYTES)
    assert mps.host_staging_bytes == READERS * STAGING_BYTES
