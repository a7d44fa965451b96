"""Weights come and go: however a pass ends, none stays, and no unloaded weight can be used."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import smallest
from forking import outcome_in_a_child
from safetensors.torch import load_file

from rabbit_engine import AutoModel, errors
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming import EmbeddingRows, Placeholder

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def loaded(model: Any) -> list[str]:
    """Streamed weights that are there now."""
    return [
        name
        for name, p in model.named_parameters()
        if ".layers." in name and "lora" not in name and not isinstance(p, Placeholder)
    ]


def real_bytes(model: Any) -> int:
    """Bytes of the model's parameters that are there now, each counted once."""
    there = {p.data_ptr(): p.nbytes for p in model.parameters() if not isinstance(p, Placeholder)}
    return sum(there.values())


def tensors_at(address: int) -> list[torch.Tensor]:
    """The tensors that start there."""
    return [found for found in gc.get_objects() if type(found) is torch.Tensor and found.data_ptr() == address]


def test_peak_weight_memory_is_two_layers_and_the_residents(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"), split="always")
    peak: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: peak.append(real_bytes(model)))
    model.generate(ids, **GREEDY)
    layer_bytes = sum(t.numel() * 4 for name, t in load_file(shard(model, 0)).items() if not name.startswith("__pad__"))
    assert len(peak) == 3 * 8
    assert max(peak) <= model.plan.resident_bytes + 2 * (layer_bytes + 9 * 4096)
    assert model.plan.device_bytes < model.plan.weights_bytes
    assert real_bytes(model) <= model.plan.resident_bytes + 4096


def shard(model: Any, layer: int) -> Path:
    return runtime_of(model).checkpoint.folder / f"model.layers.{layer}.safetensors"


def test_shards_are_ordinary_aligned_safetensors_in_the_models_names(checkpoint: Any, plain: Any, streamed: Any) -> None:
    state = plain(checkpoint("mixtral")).state_dict()
    model = streamed(checkpoint("mixtral"), split="always")
    tensors = {n: t for n, t in load_file(shard(model, 1)).items() if not n.startswith("__pad__")}
    assert set(tensors) == {name for name in state if name.startswith("model.layers.1.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    raw = shard(model, 1).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    assert size % 4096 == 0
    assert all(raw.find(t.numpy().tobytes()) % 4096 == 0 for t in tensors.values())


def test_weight_used_while_not_loaded_raises_its_name(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    layer = model.model.layers[1]
    with pytest.raises(errors.WeightNotLoadedError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight"):
        torch.nn.functional.linear(torch.ones(1, 32), layer.self_attn.q_proj.weight)
    with pytest.raises(errors.WeightNotLoadedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        layer.mlp.up_proj(torch.ones(1, 32))
    for use in (
        lambda w: w + 1,
        lambda w: w.sum().item(),
        lambda w: w.clone(),
        lambda w: w.tolist(),
        lambda w: w[0],
        lambda w: w.numpy(),
    ):
        with pytest.raises((errors.WeightNotLoadedError, RuntimeError)):
            use(layer.mlp.up_proj.weight)


def test_placeholder_tells_the_truth_about_its_weight(checkpoint: Any, plain: Any, streamed: Any) -> None:
    model, whole = streamed(checkpoint("qwen3")), plain(checkpoint("qwen3"))
    for (name, found), (_, weight) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (found.shape, found.dtype, found.device, found.requires_grad) == (weight.shape, weight.dtype, weight.device, False)
        assert isinstance(found, torch.nn.Parameter), name
    assert "model.layers.0.input_layernorm.weight: [32] torch.float32 on cpu, not loaded" in repr(
        model.model.layers[0].input_layernorm.weight
    )
    assert (model.device, model.dtype) == (whole.device, whole.dtype)


def test_embedding_reads_only_rows_and_checks_ids(checkpoint: Any, plain: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, EmbeddingRows)
    ids = torch.tensor([[5, 5, 95, 0]])
    assert torch.equal(embedding(ids), plain(checkpoint("llama")).get_input_embeddings()(ids))
    with pytest.raises(IndexError, match="96 rows"):
        embedding(torch.tensor([[96]]))
    with pytest.raises(IndexError):
        embedding(torch.tensor([[-1]]))
    with torch.no_grad():
        assert torch.equal(embedding.weight[-1], embedding(torch.tensor(95)))
    with pytest.raises(errors.WeightNotLoadedError, match="embed_tokens"):
        embedding.weight.sum()


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["layer", "inside"])
def test_after_an_exception_in_a_layer_nothing_stays(
    error: Any, place: str, checkpoint: Any, plain: Any, streamed: Any, ids: Any
) -> None:
    model = streamed(checkpoint("llama"))
    module = model.model.layers[1] if place == "layer" else model.model.layers[1].mlp.down_proj

    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model.generate(ids, **GREEDY)
    assert loaded(model) == []
    assert runtime_of(model).transfer.held == ()
    handle.remove()
    assert torch.equal(model.generate(ids, **GREEDY), plain(checkpoint("llama")).generate(ids, **GREEDY))


def test_ctrl_c_at_any_moment_leaves_nothing_loaded(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    expected = plain(checkpoint("llama")).generate(ids, **GREEDY)
    interrupted = 0
    for step in range(40):
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)  # first: else the alarm may be the test's time limit
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + step * 0.0006)
                model.generate(ids, **GREEDY)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert loaded(model) == []
        assert runtime_of(model).transfer.held == ()
    assert interrupted > 5
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_read_that_fails_names_the_file_and_is_tried_again(own_checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(own_checkpoint("llama"), prefetching=False, split="always")
    expected = model.generate(ids, **GREEDY)
    path = shard(model, 1)
    times, whole = path.stat(), path.read_bytes()
    for part, words in ((whole[:-5000], "is truncated"), (whole, "was replaced while in use")):
        path.write_bytes(part)
        if part != whole:
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(errors.DamagedShardError, match=rf"model\.layers\.1\.safetensors {words}"):
            model.generate(ids, **GREEDY)
        assert loaded(model) == []
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_without_prefetching_only_requested_units_are_read(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"), prefetching=False)
    model.generate(ids, **GREEDY)
    assert (model.profile.passes, model.profile.loads) == (8, 8 * 4)
    assert model.profile.bytes_read == 8 * model.plan.pass_bytes


def test_two_threads_are_served_in_turn(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    prompts = [ids, ids.flip(1), ids[:, :7]]
    whole = plain(checkpoint("llama"))
    expected = [whole.generate(prompt, **GREEDY) for prompt in prompts]
    got: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: got.update({i: model.generate(p, **GREEDY)})) for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(got[i], expected[i]) for i in range(3))


def test_a_layer_called_outside_a_pass_is_right(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model, whole = streamed(checkpoint("llama")), plain(checkpoint("llama"))
    with torch.no_grad():
        hidden = whole.get_input_embeddings()(ids)
        cos_sin = whole.model.rotary_emb(hidden, torch.arange(12)[None])
        expected = whole(ids).logits
        alone = whole.model.layers[1](hidden, position_embeddings=cos_sin)
    wrong: list[str] = []

    def work(layer: bool) -> None:
        with torch.no_grad():
            for _ in range(30):
                got = model.model.layers[1](hidden, position_embeddings=cos_sin) if layer else model(ids).logits
                if not torch.equal(got, alone if layer else expected):
                    wrong.append(str(layer))

    threads = [threading.Thread(target=work, args=(index > 0,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_forked_process_is_told_to_load_its_own_model(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    model(ids)
    assert outcome_in_a_child(lambda: model(ids)) == "ModelClosedError"


def test_a_process_forked_during_a_pass_gets_an_error_too(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            model(ids)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            assert outcome_in_a_child(lambda: model(ids)) == "ModelClosedError"
    finally:
        stop.set()
        worker.join(60)


def test_a_load_that_fails_late_leaves_no_thread(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rabbit_engine.model import assembly

    def fail(*_: Any) -> None:
        raise Boom

    monkeypatch.setattr(assembly, "guard", fail)
    before = set(threading.enumerate())
    with pytest.raises(Boom):
        AutoModel.from_pretrained(checkpoint("llama"), device="cpu", max_memory=smallest(checkpoint("llama")))
    assert set(threading.enumerate()) == before


def test_loading_in_inference_mode(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    expected = plain(checkpoint("llama")).generate(ids, **GREEDY)
    with torch.inference_mode():
        model = streamed(checkpoint("llama"))
        assert not runtime_of(model).ring.view(0, 1).is_inference()
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_placeholder_is_not_pickled(checkpoint: Any, streamed: Any, tmp_path: Path) -> None:
    model = streamed(checkpoint("llama"))
    with pytest.raises(errors.CannotPickleError, match=r"model\.layers\.0"):
        torch.save({k: v for k, v in model.state_dict().items() if "layers.0" in k}, tmp_path / "state.pt")


def test_an_early_exit_out_of_order_is_right(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    model, whole = streamed(checkpoint("llama")), plain(checkpoint("llama"))
    with torch.no_grad():
        for part in (lambda m: m.model(ids).last_hidden_state, lambda m: m.model.layers[2].mlp.up_proj.weight.shape):
            assert str(part(model)) == str(part(whole))
        hidden = whole.get_input_embeddings()(ids)
        cos_sin = whole.model.rotary_emb(hidden, torch.arange(12)[None])
        for index in (2, 0, 2, 1):
            got = model.model.layers[index](hidden, position_embeddings=cos_sin)
            assert torch.equal(got, whole.model.layers[index](hidden, position_embeddings=cos_sin))
        assert torch.equal(model(ids).logits, whole(ids).logits)


def test_close_ends_threads_and_frees_weights(checkpoint: Any, ids: torch.Tensor) -> None:
    before = set(threading.enumerate())
    budget = smallest(checkpoint("llama"))
    with AutoModel.from_pretrained(checkpoint("llama"), device="cpu", max_memory=budget) as model:
        model.generate(ids, **GREEDY)
        assert any(thread.name == "rabbit-reader" for thread in threading.enumerate())
        place = runtime_of(model).ring.view(0, 1).data_ptr()
        assert tensors_at(place)
    assert set(threading.enumerate()) == before
    gc.collect()
    assert not tensors_at(place)
    assert real_bytes(model) == 0
    model.close()
    with pytest.raises(errors.ModelClosedError):
        model.generate(ids, **GREEDY)


def test_a_forgotten_model_is_collected_with_its_thread(checkpoint: Any, ids: torch.Tensor) -> None:
    before = set(threading.enumerate())
    model = AutoModel.from_pretrained(checkpoint("llama"), device="cpu", max_memory=smallest(checkpoint("llama")))
    model.generate(ids, **GREEDY)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert set(threading.enumerate()) == before


REFUSED = [
    (lambda m: m.half(), errors.CannotMoveError),
    (lambda m: m.to("meta"), errors.CannotMoveError),
    (lambda m: m.to(torch.bfloat16), errors.CannotMoveError),
    (lambda m: m.bfloat16(), errors.CannotMoveError),
    (lambda m: m.double(), errors.CannotMoveError),
    (lambda m: m.cuda(), errors.CannotMoveError),
    (lambda m: m.to_empty(device="cpu"), errors.CannotMoveError),
    (lambda m: m.type(torch.float16), errors.CannotMoveError),
    (copy.deepcopy, errors.CannotCopyError),
    (copy.copy, errors.CannotCopyError),
    (pickle.dumps, errors.CannotPickleError),
    (lambda m: m.save_pretrained("/nowhere"), errors.CannotSaveError),
    (lambda m: m.push_to_hub("someone/something"), errors.CannotSaveError),
    (lambda m: m.load_state_dict({}), errors.CannotLoadStateError),
]


@pytest.mark.parametrize(("operation", "error"), REFUSED)
def test_refused_operations_say_so_and_break_nothing(
    operation: Any, error: Any, checkpoint: Any, streamed: Any, ids: torch.Tensor
) -> None:
    model = streamed(checkpoint("llama"))
    expected = model.generate(ids, **GREEDY)
    with pytest.raises(error):
        operation(model)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


@pytest.mark.parametrize(
    "move", [lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.float(), lambda m: m.to(device="cpu", dtype=torch.float32)]
)
def test_moving_to_its_own_device_is_allowed(move: Any, checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"))
    assert move(model) is model


def test_gradients_through_streamed_layers_are_refused(checkpoint: Any, streamed: Any, ids: torch.Tensor) -> None:
    model = streamed(checkpoint("llama"))
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    with pytest.raises(errors.CannotTrainError, match=r"model\.layers\.0"):
        model(inputs_embeds=embeds)
    with torch.no_grad():
        model(inputs_embeds=embeds)
    assert not model(ids).logits.requires_grad


def test_inputs_go_where_the_model_is(checkpoint: Any, streamed: Any) -> None:
    from rabbit_engine.streaming import move

    cache = object()
    moved = move({"a": torch.ones(1), "b": (torch.ones(1), [torch.ones(1)]), "c": cache}, torch.device("meta"))
    assert moved["a"].is_meta
    assert moved["b"][0].is_meta
    assert moved["b"][1][0].is_meta
    assert moved["c"] is cache


def test_state_dict_has_the_names_and_no_weights(checkpoint: Any, plain: Any, streamed: Any) -> None:
    state = streamed(checkpoint("llama")).state_dict()
    assert list(state) == list(plain(checkpoint("llama")).state_dict())
    with pytest.raises(errors.WeightNotLoadedError):
        state["model.layers.0.mlp.up_proj.weight"].sum()


def test_continuous_batching_over_a_streamed_model(checkpoint: Any, plain: Any, streamed: Any, ids: torch.Tensor) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # its default fills the memory that is free

    prompts = [ids[0].tolist(), ids[0, :5].tolist(), ids[0].flip(0).tolist()]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False)
    results = []
    for load in (plain, streamed):
        model = load(checkpoint("llama"))
        outputs = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
        )
        results.append(sorted(tuple(output.generated_tokens) for output in outputs.values()))
    assert results[0] == results[1]
    assert len(results[1]) == 3
