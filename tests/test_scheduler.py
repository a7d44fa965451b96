"""Many generations in one pass: each has the bits it has alone, and the weights come once."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rabbit_engine import errors
from rabbit_engine.config import Cut
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming import Placeholder, RandomStream, Scheduler, fiber_on, share_products
from rabbit_engine.transformers_bridge.forwards import cache_of

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
FAMILIES = (
    *("llama", "llama_tied", "qwen3", "gemma2", "gemma3n", "phi3", "gpt2", "bloom", "deepseek_v3", "mixtral", "qwen3_moe"),
    *("gpt_oss", "qwen3_next", "mamba", "jamba", "cohere2"),
)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As in the thread of a session, whose fibers share torch's switch."""
    with torch.no_grad():
        yield


def prompts(count: int, lengths: tuple[int, ...] = (7, 3, 12, 5)) -> list[torch.Tensor]:
    """Of different lengths, int64 [1, length]."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 96, (1, lengths[index % len(lengths)]), generator=generator) for index in range(count)]


def ride(
    model: Any, works: list[Callable[[], Any]], seeds: list[int | None] | None = None, *, shares: bool = False
) -> tuple[list[Any], Scheduler]:
    """Run all of them in a scheduler: what they returned, or raised."""
    scheduler = Scheduler(runtime_of(model).binding, shares=shares)
    found: list[Any] = [None] * len(works)

    def run(index: int) -> Callable[[], None]:
        def work() -> None:
            found[index] = works[index]()

        return work

    fibers = [
        scheduler.add(run(index), RandomStream(seed, model.device) if seed is not None else None)
        for index, seed in enumerate(seeds or [None] * len(works))
    ]
    while scheduler.fibers:
        scheduler.run_pass()
    return [fiber.failure or result for fiber, result in zip(fibers, found, strict=True)], scheduler


def scores(model: Any, ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Logits of every step of a greedy answer, [steps, vocabulary]."""
    options = {**GREEDY, "eos_token_id": 95, **keywords}
    found = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    return torch.cat(found.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_has_the_bits_it_has_alone(checkpoint: Any, streamed: Any, family: str) -> None:
    model = streamed(checkpoint(family))
    asked = prompts(3)
    alone = [scores(model, ids) for ids in asked]
    together, _ = ride(model, [lambda ids=ids: scores(model, ids) for ids in asked])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_pass_reads_the_weights_once_for_all(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"), prefetching=False)
    (ids,) = prompts(1)
    scores(model, ids)
    before = model.profile
    scores(model, ids)
    one = model.profile
    ride(model, [lambda: scores(model, ids)] * 5)
    five = model.profile
    assert five.bytes_read - one.bytes_read == one.bytes_read - before.bytes_read > 0
    assert five.passes - one.passes == one.passes - before.passes == 6


def test_all_prepare_their_parts_before_any_of_them_starts(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    events: list[str] = []
    told: list[tuple[int, int, bool]] = []

    def work(rows: int) -> Callable[[], None]:
        def run() -> None:
            fiber = fiber_on(runtime_of(model).binding)
            assert fiber is not None
            for _ in range(2):
                others = fiber.await_pass()
                events.append("prepare")
                told.append((others, fiber.await_start(rows), fiber.measures))
                events.append("start")
                model(torch.tensor([[5] * max(1, rows)]))
                events.append("end")

        return run

    ride(model, [work(rows) for rows in (2, 4, 0)])
    assert events == [event for event in ("prepare", "start", "end") for _ in range(3)] * 2
    assert told == [(2, 7, False), (2, 7, True), (2, 7, False)] * 2  # the last one that told its rows measures


def test_a_later_fiber_joins_the_next_pass_and_leaves_alone(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    long, short = prompts(2)
    expected = [scores(model, long, max_new_tokens=9), scores(model, short, max_new_tokens=3)]
    found: dict[str, torch.Tensor] = {}
    scheduler, passes = Scheduler(runtime_of(model).binding), model.profile.passes
    scheduler.add(lambda: found.update(long=scores(model, long, max_new_tokens=9)))
    for _ in range(4):
        scheduler.run_pass()
    scheduler.add(lambda: found.update(short=scores(model, short, max_new_tokens=3)))
    while scheduler.fibers:
        scheduler.run_pass()
    assert model.profile.passes - passes == 9
    assert torch.equal(found["long"], expected[0])
    assert torch.equal(found["short"], expected[1])


def test_a_seed_draws_as_it_does_alone_and_leaves_the_others_random_numbers_as_they_were(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    asked, sampled = prompts(3), {"do_sample": True, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 95}
    alone = []
    for seed, ids in enumerate(asked):
        torch.manual_seed(seed)
        alone.append(model.generate(ids, **sampled).tolist())
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    works = [lambda ids=ids: model.generate(ids, **sampled).tolist() for ids in asked]
    together, _ = ride(model, works, seeds=[0, 1, 2])
    assert together == alone
    assert torch.equal(torch.rand(3), expected)


def test_beams_and_batches_ride_along(checkpoint: Any, streamed: Any, padded: dict[str, torch.Tensor]) -> None:
    model = streamed(checkpoint("qwen3"))
    works = [
        lambda: model.generate(**padded, **GREEDY).tolist(),
        lambda: model.generate(prompts(1)[0], num_beams=3, **GREEDY).tolist(),
        lambda: model.generate(prompts(1)[0], prompt_lookup_num_tokens=2, **GREEDY).tolist(),
    ]
    alone = [work() for work in works]
    assert ride(model, works)[0] == alone


def test_an_unreadable_unit_fails_who_asks_for_it_and_the_next_reads_it_again(
    checkpoint: Any, streamed: Any, monkeypatch: Any
) -> None:
    model = streamed(checkpoint("llama"), prefetching=False)
    ids = prompts(1)[0]
    expected = scores(model, ids)
    ring, failures = runtime_of(model).ring, [errors.DamagedShardError("a bad sector")]
    fill = ring.fill

    def failing(chunk: Any, *rest: Any) -> None:
        if failures and rest[2].startswith("model.layers.1"):
            raise failures.pop()
        fill(chunk, *rest)

    monkeypatch.setattr(ring, "fill", failing)
    first, second, third = ride(model, [lambda: scores(model, ids)] * 3)[0]
    assert isinstance(first, errors.DamagedShardError)
    assert torch.equal(second, expected)
    assert torch.equal(third, expected)
    assert runtime_of(model).transfer.held == ()


def test_a_fiber_stopped_during_a_pass_leaves_the_others_right(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    ids, other = prompts(2)
    expected = scores(model, other)
    found: list[torch.Tensor] = []
    scheduler = Scheduler(runtime_of(model).binding)
    stopped = scheduler.add(lambda: scores(model, ids))
    scheduler.add(lambda: found.append(scores(model, other)))
    seen: list[int] = []

    def interrupt(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            stopped.stop(KeyboardInterrupt())

    model.model.layers[1].register_forward_pre_hook(interrupt)
    while scheduler.fibers:
        scheduler.run_pass()
    assert isinstance(stopped.failure, KeyboardInterrupt)
    assert torch.equal(found[0], expected)
    assert runtime_of(model).transfer.held == ()
    assert all(isinstance(p, Placeholder) for n, p in model.named_parameters() if ".layers." in n and "proj" in n)


def test_a_fiber_stopped_before_it_has_a_unit_releases_none(own_checkpoint: Any, streamed: Any) -> None:
    """Where a layer's rest is held around its matrices, others are inside of it while this one still waits for it."""
    model = streamed(own_checkpoint("gemma3"), cut=Cut(least_bytes=1000, rest_share=0.0))
    assert any(size.encloses for size in runtime_of(model).partition.sizes)
    asked = prompts(4)
    expected = [scores(model, ids) for ids in asked]
    scheduler, found = Scheduler(runtime_of(model).binding), dict[int, torch.Tensor]()
    fibers = [
        scheduler.add(lambda index=index, ids=ids: found.update({index: scores(model, ids)})) for index, ids in enumerate(asked)
    ]
    seen: list[int] = []

    def interrupt(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 1:
            fibers[1].stop(KeyboardInterrupt())

    model.model.layers[0].input_layernorm.register_forward_pre_hook(interrupt)  # the first is inside, the second is not
    while scheduler.fibers:
        scheduler.run_pass()
    assert [type(fiber.failure) for fiber in fibers] == [type(None), KeyboardInterrupt, type(None), type(None)]
    assert all(torch.equal(found[index], expected[index]) for index in (0, 2, 3))


def test_a_failed_fiber_frees_its_cache_at_once(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    caches: list[Any] = []
    scheduler = Scheduler(runtime_of(model).binding)

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        caches.append(weakref.ref(cache_of(kwargs)))

    model.model.register_forward_pre_hook(keep, with_kwargs=True)
    fiber = scheduler.add(lambda: scores(model, prompts(1)[0]))
    scheduler.run_pass()
    gc.disable()
    try:
        fiber.stop(KeyboardInterrupt())
        scheduler.run_pass()
        assert caches[-1]() is None
    finally:
        gc.enable()


def test_seeds_hold_while_another_scheduler_runs(checkpoint: Any, streamed: Any) -> None:
    sampled = {"do_sample": True, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": 95}
    models, asked = [streamed(checkpoint("llama")) for _ in range(2)], prompts(2)
    alone = []
    for seed, (model, ids) in enumerate(zip(models, asked, strict=True)):
        torch.manual_seed(seed)
        alone.append(model.generate(ids, **sampled).tolist())
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        torch.set_grad_enabled(False)
        works = [lambda: models[index].generate(asked[index], **sampled).tolist()]
        found[index] = ride(models[index], works, seeds=[index])[0][0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[0], found[1]] == alone


def test_a_model_that_is_closed_fails_them_all(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    scheduler = Scheduler(runtime_of(model).binding)
    fibers = [scheduler.add(lambda: scores(model, prompts(1)[0])) for _ in range(2)]
    scheduler.run_pass()
    model.close()
    with pytest.raises(errors.ModelClosedError):
        scheduler.run_pass()
    scheduler.stop(errors.ModelClosedError("closed"))
    assert [type(fiber.failure) for fiber in fibers] == [errors.ModelClosedError] * 2
    assert scheduler.fibers == 0


def test_another_thread_takes_its_turn(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    ids = prompts(1)[0]
    expected = model.generate(ids, **GREEDY).tolist()
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(model.generate(ids, **GREEDY).tolist()))
    scheduler = Scheduler(runtime_of(model).binding)
    scheduler.add(lambda: answers.append(model.generate(ids, **GREEDY).tolist()))
    scheduler.run_pass()
    thread.start()
    while scheduler.fibers:
        scheduler.run_pass()
    thread.join(60)
    assert answers == [expected] * 2


def test_a_second_model_within_its_work_runs_as_usual(checkpoint: Any, streamed: Any) -> None:
    target, assistant = streamed(checkpoint("llama")), streamed(checkpoint("llama"))
    ids = prompts(1)[0]
    expected = target.generate(ids, assistant_model=assistant, **GREEDY).tolist()
    works = [lambda: target.generate(ids, assistant_model=assistant, **GREEDY).tolist()] * 2
    assert ride(target, works)[0] == [expected] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_next", "mixtral", "llama_biased"])
def test_shared_products_agree_within_rounding(own_checkpoint: Any, streamed: Any, family: str) -> None:
    model = streamed(own_checkpoint(family))
    asked = prompts(4)
    alone = [scores(model, ids) for ids in asked]
    share_products(model, runtime_of(model).binding)
    together, _ = ride(model, [lambda ids=ids: scores(model, ids) for ids in asked], shares=True)
    exact, _ = ride(model, [lambda ids=ids: scores(model, ids) for ids in asked])
    assert all(torch.equal(one, other) for one, other in zip(alone, exact, strict=True))  # another scheduler does not share
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, ids in zip(alone, asked, strict=True):
        assert torch.equal(scores(model, ids), one)  # a fiber alone runs as before


def test_an_error_in_a_shared_product_is_everybodys(own_checkpoint: Any, streamed: Any) -> None:
    model = streamed(own_checkpoint("llama"))
    share_products(model, runtime_of(model).binding)
    layer = model.model.layers[0].self_attn.q_proj

    def fail(*_: Any) -> None:
        raise MemoryError("no room for the product")

    layer.register_forward_pre_hook(fail)
    failures, _ = ride(model, [lambda: scores(model, prompts(1)[0])] * 2, shares=True)
    assert [type(failure) for failure in failures] == [MemoryError] * 2


def test_progress_tells_the_layer_and_the_bytes(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(model.progress))
    scores(model, prompts(1)[0])
    assert [found.layer for found in seen[:3]] == [1, 2, 3]
    assert {found.layers for found in seen} == {3}
    assert seen[0].bytes_read < seen[2].bytes_read
    assert seen[0].expected_s == 0
    assert seen[-1].expected_s > 0
    assert "layer 3 of 3" in str(seen[-1])
    assert model.progress is None
