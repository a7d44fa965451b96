"""Models over several devices of a machine, here CPUs of which each has a part of the memory: the answers of transformers."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import long_texts
import pytest
import talking
import torch
from conftest import smallest
from guessing import Guided
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from rabbit_engine import AutoModel, PrefixStore, Session, errors
from rabbit_engine.decoding import Findings, Lookup
from rabbit_engine.devices import parse_row
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.model.speculating import findings_of
from rabbit_engine.streaming import StageRunner
from rabbit_engine.transformers_bridge.mirrored import ElsewhereLayer
from rabbit_engine.transformers_bridge.tiered import TieredCache
from rabbit_engine.transformers_bridge.tiered_layers import TieredLayer

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
ASKED = {"max_new_tokens": 6, "temperature": 0}


def halves(folder: Path) -> dict[str, str]:
    """A `device_map` of two CPUs."""
    layers = AutoConfig.from_pretrained(folder).get_text_config().num_hidden_layers
    places = ["cpu:0"] * ((layers + 1) // 2) + ["cpu:1"] * (layers // 2)
    return {"": "cpu:0", **{f"model.layers.{index}": place for index, place in enumerate(places)}}


def dealt_layers(layers: int) -> dict[str, str]:
    """A `device_map` in which two CPUs take turns."""
    return {"": "cpu:0", **{f"model.layers.{index}": f"cpu:{index % 2}" for index in range(layers)}}


@pytest.fixture
def row(checkpoint: Any) -> Iterator[Callable[..., Any]]:
    """`row(family)` is its model over two CPUs, with weights that stream on the first."""
    models: list[Any] = []

    def load(family: str = "llama", **keywords: Any) -> Any:
        folder = checkpoint(family)
        (nbytes,) = smallest(folder).values()
        budgets = {"cpu:0": nbytes, "cpu:1": nbytes}
        models.append(
            AutoModel.from_pretrained(
                folder, **{"device_map": halves(folder), "max_memory": budgets, "device": "cpu", **keywords}
            )
        )
        return models[-1]

    yield load
    for model in models:
        model.close()


MODES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 8},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 5},
    "lookup of transformers": {"prompt_lookup_num_tokens": 3},
    "static": {"cache_implementation": "static"},
    "ours": {"speculate": Lookup(), "max_new_tokens": 20},
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_ways_to_generate(family: str, row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model, ids = plain(checkpoint(family)), row(family), ids.repeat(1, 2)
    for name, mode in MODES.items():
        if family == "qwen3_next" and name in ("static", "lookup of transformers"):  # transformers refuses them
            continue
        torch.manual_seed(3)
        theirs = {**GREEDY, **mode} if name != "ours" else {**GREEDY, "max_new_tokens": 20}
        expected = whole.generate(ids, **theirs)
        torch.manual_seed(3)
        assert torch.equal(model.generate(ids, **{**GREEDY, **mode}), expected), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_states_of_all_layers(family: str, row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), row(family)
    with torch.no_grad():
        for _ in range(2):  # from the second pass on, layers of a stage are one request
            assert torch.equal(model(ids).logits, whole(ids).logits)
            mine, theirs = (one(ids, output_hidden_states=True).hidden_states for one in (model, whole))
            assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True))
    asked = {**GREEDY, "output_hidden_states": True, "return_dict_in_generate": True}
    mine, theirs = (one.generate(ids, **asked).hidden_states for one in (model, whole))
    assert all(torch.equal(*both) for passes in zip(mine, theirs, strict=True) for both in zip(*passes, strict=True))


SHOWN = {"output_attentions": "attentions", "output_router_logits": "router_logits", "output_hidden_states": "hidden_states"}


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["output_attentions"]),
        ("gemma3", ["output_attentions", "output_hidden_states"]),
        ("mixtral", ["output_router_logits"]),
        ("mixtral", [*SHOWN]),
        ("qwen3_next", ["output_attentions", "output_router_logits"]),
    ],
)
def test_what_is_inside_layers(family: str, names: list[str], row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), row(family)
    for one in (whole, model):
        one.set_attn_implementation("eager")
    asked = dict.fromkeys(names, True)
    with torch.no_grad():
        for _ in range(2):  # from the second pass on, layers of a stage are one request
            mine, theirs = (one(ids, **asked) for one in (model, whole))
            assert torch.equal(mine.logits, theirs.logits)
            for name in names:
                found, expected = mine[SHOWN[name]], theirs[SHOWN[name]]
                assert len(found) == len(expected) > 0
                assert all(map(torch.equal, found, expected))
            assert torch.equal(model(ids).logits, theirs.logits)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_attentions": True}
    mine, theirs = (one.generate(ids, **asked).attentions for one in (model, whole))
    assert all(map(torch.equal, *([one for each in found for one in each] for found in (mine, theirs))))


def test_hooks_inside_layers_are_refused(row: Any, ids: Any) -> None:
    model = row("mixtral")
    expected = model(ids).logits
    handle = model.model.layers[-1].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(errors.UnsupportedOperationError, match="inside layer"):
        model(ids)
    handle.remove()
    seen: list[Any] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output))
    assert torch.equal(model(ids).logits, expected)
    assert len(seen) == 1
    handle.remove()


def test_another_attention(row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model = plain(checkpoint("llama")), row()
    found = []
    for one in (whole, model):
        for name in ("sdpa", "eager", "sdpa"):
            one.set_attn_implementation(name)
            found.append(one(ids).logits)
    assert all(map(torch.equal, found[:3], found[3:]))


@pytest.mark.parametrize("agreement", [1.0, 0.6])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("family", "way"), [("qwen3_next", "carry"), ("lfm2", "chain"), ("llama", "tree")])
def test_drafts_whose_states_are_elsewhere(
    family: str, way: str, recorded: bool, agreement: float, row: Any, checkpoint: Any, plain: Any, ids: Any
) -> None:
    """States that a wrong guess has changed are those before it again; a way that the record does not know is tried first."""
    asked = {**GREEDY, "max_new_tokens": 30}
    expected = plain(checkpoint(family)).generate(ids, **asked)
    model = row(family)
    if not recorded:
        model._findings = Findings()
    draft = Guided(expected[0].tolist(), agreement=agreement, branches=1, nodes=8)
    assert torch.equal(model.generate(ids, speculate=draft, **asked), expected)
    assert findings_of(model).used == way
    assert model.profile.passes < 30
    (stage,) = runtime_of(model).assembly.stages
    model(ids, use_cache=False)
    assert not any(stage._runner._saved.values())


CACHES: dict[str, Callable[[Any], Any]] = {
    "new": lambda _: DynamicCache(),
    "of the config": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_caches_of_the_caller(family: str, kind: str, row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), row(family)
    for filled in (False, True):
        found = []
        for one in (whole, model):
            cache = CACHES[kind](one.config.get_text_config())
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore", FutureWarning)
                if filled:
                    whole(ids[:, :5], past_key_values=cache)
                first = one.generate(ids, past_key_values=cache, **GREEDY)
                found.append(one.generate(torch.cat([first, ids[:, :3]], dim=1), past_key_values=cache, **GREEDY))
        assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_copies_of_a_cache(family: str, row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    whole, model = plain(checkpoint(family)), row(family)
    found = []
    for one in (whole, model):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            cache = one(ids).past_key_values
            copied = copy.deepcopy(cache)
            forwards = (ids[:, :2], cache), (ids[:, 4:7], copied), (ids[:, 1:2], copy.deepcopy(copied))
            found.append([one(given, past_key_values=own).logits for given, own in forwards])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_sessions(family: str, row: Any, checkpoint: Any, plain: Any) -> None:
    model, whole = row(family), plain(checkpoint(family))
    model.tokenizer = talking.make_tokenizer()
    texts = [[5 + index, *range(7, 90)] for index in range(4)]
    expected = [whole.generate(torch.tensor([text]), **GREEDY)[0, len(text) :].tolist() for text in texts]
    with Session(model) as session:
        replies = session.generate(texts, **ASKED)
        assert [list(reply.tokens) for reply in replies] == expected
        with session.fork(texts[0][:50]) as fork:
            found = fork.generate([texts[0][50:]] * 2, **ASKED)
            assert [list(one.tokens) for one in found] == [expected[0]] * 2
    with Session(model, continue_last=True) as session:
        for text in (texts[0][:70], texts[0]):
            (reply,) = session.generate([text], **ASKED)
        assert list(reply.tokens) == expected[0]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_beginnings_of_prompts_are_stored_and_read(
    family: str, row: Any, streamed: Any, checkpoint: Any, plain: Any, tmp_path: Path
) -> None:
    model, whole, one = row(family), plain(checkpoint(family)), streamed(checkpoint(family))
    first = [5, *range(7, 60)]
    texts = [first, [*first[:40], *range(30, 80)], [*first[:20], 6, 9, 8]]
    expected = [whole.generate(torch.tensor([text]), **GREEDY)[0, len(text) :].tolist() for text in texts]
    found = []
    with PrefixStore(tmp_path / "store", 10**8, block_tokens=8) as store:
        for asked, each in ([model, texts[:1]], [model, texts], [one, texts]):  # a model on one device has the same states
            asked.tokenizer = talking.make_tokenizer()
            with Session(asked, prefix_store=store) as session:
                replies = session.generate(each, **ASKED)
            assert [list(reply.tokens) for reply in replies] == expected[: len(each)]
            assert store.flush(30)
            found.append([reply.cached_tokens for reply in replies])
    assert found == [[0], [48, 40, 16], [48, 88, 16]]


@pytest.mark.parametrize("ways", ["whole", "beams", "pieces", "speculated"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_of_a_text_on_disk(
    family: str, ways: str, row: Any, streamed: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bits as on one device, whose layers in tiers are those of transformers, or attend in pieces."""
    folder, keywords = checkpoint(family), {"beams": {"num_beams": 3}, "speculated": {"speculate": Lookup()}}.get(ways, {})
    one, model = streamed(folder), row(family)
    if ways == "pieces":
        for each in (one, model):
            each.set_attn_implementation("sdpa")
    expected, cached = long_texts.answer(one, long_texts.prompt(), **keywords), []
    run = StageRunner._run
    monkeypatch.setattr(StageRunner, "_run", lambda self, asked: (run(self, asked), cached.extend(self._texts.values()))[0])
    long_texts.have_all_in_tiers(monkeypatch, pieces=ways == "pieces")
    with long_texts.made_caches(monkeypatch, tmp_path):
        if ways == "pieces":
            expected = long_texts.answer(one, long_texts.prompt())
        found = long_texts.answer(model, long_texts.prompt(), **keywords)
    assert torch.equal(found.sequences, expected.sequences)
    assert ways == "speculated" or all(map(torch.equal, found.scores, expected.scores))  # guesses share products
    assert {type(cache) for cache in cached} == {TieredCache}
    kinds = {type(layer) for cache in cached for layer in cache.layers}
    assert kinds <= {TieredLayer, ElsewhereLayer, *([DynamicSlidingWindowLayer] if family == "gemma3" else [])}
    assert max(cache.text.bytes_written for cache in cached) > 0


def test_texts_in_eight_bits(row: Any, streamed: Any, checkpoint: Any) -> None:
    one = streamed(checkpoint("llama"), cache_dtype="int8")
    model = row(cache_dtype="int8")
    ids = long_texts.prompt(700)
    expected, found = (long_texts.answer(each, ids) for each in (one, model))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.scores, expected.scores))


def test_admission_counts_what_lies_in_each_memory(row: Any, checkpoint: Any, streamed: Any) -> None:
    model, whole = runtime_of(row()), runtime_of(streamed(checkpoint("llama")))
    assert model.partition.probe.cache_token_bytes == whole.partition.probe.cache_token_bytes  # both CPUs have one memory
    assert model.free_bytes() > 0
    assert not model.computes_parts


def test_plan_profile_and_one_device(row: Any, checkpoint: Any, ids: Any) -> None:
    model = row()
    model(ids)
    text = str(model.plan)
    assert "layers 0-1 and what stands around the layers" in text
    assert "cpu:1" in text
    assert "over cpu, cpu:1" in model.plan.reason
    (stage,) = runtime_of(model).assembly.stages
    assert model.profile.loads == runtime_of(model).transfer.profile().loads + stage.model.profile.loads
    assert runtime_of(row(device_map={"": "cpu"}, max_memory={"cpu": "1GB"})).assembly.stages == ()
    filled = row(device_map="sequential", max_memory={"cpu:0": "1GB", "cpu:1": "1GB"})
    assert runtime_of(filled).assembly.stages == ()
    planned = row(device_map="auto", max_memory={"cpu:0": "1GB", "cpu:1": "1GB"})
    assert sum(len(one.layers) for one in runtime_of(planned).assembly.stages) in (1, 2)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "mixtral"])
def test_layers_with_others_between_them(family: str, row: Any, checkpoint: Any, plain: Any, ids: Any) -> None:
    """A map may deal the layers: each device has every second."""
    whole = plain(checkpoint(family))
    layers = whole.config.num_hidden_layers
    model = row(family, device_map=dealt_layers(layers))
    (stage,) = runtime_of(model).assembly.stages
    assert stage.layers == tuple(range(1, layers, 2))
    assert repr(stage).startswith(f"layer{'s' if layers > 3 else ''} 1{', 3' if layers > 3 else ''}")
    assert dict(model.plan.rows())["cpu:1"].startswith(repr(stage).partition(" on ")[0])
    for keywords in ({}, {"num_beams": 3}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **GREEDY, **keywords), whole.generate(ids, **GREEDY, **keywords)), keywords
    with torch.no_grad():
        mine, theirs = (one(ids, output_hidden_states=True).hidden_states for one in (model, whole))
    assert all(torch.equal(*both) for both in zip(mine, theirs, strict=True))


def test_sessions_over_layers_with_others_between_them(row: Any, checkpoint: Any, plain: Any) -> None:
    model, whole = row("gemma3", device_map=dealt_layers(7)), plain(checkpoint("gemma3"))
    model.tokenizer = talking.make_tokenizer()
    texts = [[5 + index, *range(7, 30)] for index in range(4)]
    with Session(model, prefix_store=None) as session:
        replies = session.generate(texts, **ASKED)
    for text, reply in zip(texts, replies, strict=True):
        assert list(reply.tokens) == whole.generate(torch.tensor([text]), **GREEDY)[0, len(text) :].tolist()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"model.layers.0": 0, "model.layers.1": 1}, "names no device for model.layers.2"),
        ({"": 0, "model.layers.1": 1, "model.layers.1.mlp": 0}, "a layer stays whole"),
        ({"": 0, "model.layers.1": 1, "model.blocks": 1}, "no such module"),
        ({"": 0, "model.layers.2": "disk"}, "disk"),
    ],
)
def test_maps_that_are_wrong(places: dict[str, Any], message: str, row: Any) -> None:
    named = {module: f"cpu:{place}" if isinstance(place, int) else place for module, place in places.items()}
    with pytest.raises(errors.ConfigurationError, match=message):
        row(device_map=named)


def test_a_dropped_model_ends_its_threads(checkpoint: Any, ids: Any) -> None:
    (nbytes,) = smallest(checkpoint("llama")).values()
    budgets = {"cpu:0": nbytes, "cpu:1": nbytes}
    before = threading.active_count()
    model = AutoModel.from_pretrained(
        checkpoint("llama"), device="cpu", device_map=halves(checkpoint("llama")), max_memory=budgets
    )
    model(ids)
    assert any(thread.name == "rabbit-stage-cpu:1" for thread in threading.enumerate())
    del model
    gc.collect()
    assert threading.active_count() <= before


def test_which_devices_are_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    names = lambda *given: [one.name for one in found.devices] if (found := parse_row(*given, planned=True)) else None  # noqa: E731
    both = {0: "8GiB", 1: "6GiB", "cpu": "24GiB"}
    assert names("cuda", None, both) == names("cuda:0", "auto", both) == names("cuda", "balanced", both) == ["cuda:0", "cuda:1"]
    assert names("cuda:1", "auto", both) == ["cuda:1", "cuda:0"]
    assert names("cuda:0", None, both) is names("cuda", None, {0: "8GiB"}) is names("cpu", None, both) is None
    assert names("cuda", {"": 0}, both) is names("cuda", 0, both) is None
    assert names("cuda", {"": 1, "model.layers.0": "cuda:0"}, None) == ["cuda:1", "cuda:0"]
    with pytest.raises(errors.ConfigurationError, match="one kind"):
        names("cuda", {"": 0, "model.layers.0": "cpu"}, None)
    assert names("meta:0", None, both) is None
    with pytest.raises(errors.ConfigurationError, match=r"device_map\['head'\]='moon' is not a device"):
        names("cuda", {"": 0, "head": "moon"}, None)
    with pytest.raises(errors.DeviceUnavailableError):
        parse_row("cuda", None, both)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(checkpoint: Any, plain: Any, ids: Any) -> None:
    """Greedy tokens, with texts at once, and from a stream of the caller's."""
    folder = checkpoint("llama")
    whole = plain(folder).cuda()
    places = {module: place.replace("cpu", "cuda") for module, place in halves(folder).items()}
    with AutoModel.from_pretrained(folder, device_map=places) as model:
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream), torch.no_grad():
                stream.wait_stream(torch.cuda.default_stream())
                for _ in range(3):
                    assert torch.equal(model(ids).logits, whole(ids.cuda()).logits)
                assert torch.equal(model.generate(ids, **GREEDY), whole.generate(ids.cuda(), **GREEDY))
        with Session(model) as session:
            found = session.generate([ids[0].tolist()] * 4, **ASKED)
            expected = whole.generate(ids.cuda(), **GREEDY)[0, ids.shape[1] :].tolist()
            assert [list(one.tokens) for one in found] == [expected] * 4
