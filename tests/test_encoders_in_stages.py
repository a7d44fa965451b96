"""Models with an encoder and a decoder whose decoder's layers run elsewhere: the answers of transformers."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_cluster_stage
import torch
import transformers
from conftest import aligned, smallest
from test_tasks import BART, IDS, SOUND, T5, save
from transformers import DynamicCache, EncoderDecoderCache

from rabbit_engine import AutoModel
from rabbit_engine.model.runtime import runtime_of
from rabbit_engine.streaming.stages import remote

over_workers = test_cluster_stage.over_workers  # a fixture

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

CLASSES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, torch.Tensor]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "model.decoder.layers", {"input_ids": IDS}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, "decoder.block", {"input_ids": IDS}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SOUND,
        "model.decoder.layers",
        {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1))},
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda kind: save(*CLASSES[kind][:3], tmp_path_factory.mktemp(kind)))


@pytest.fixture
def both(saved: Any) -> Iterator[Callable[[str], tuple[Any, Any]]]:
    """`both(kind)`: transformers' model, and ours with the decoder's layers 1 and 2 on another device."""
    models: list[Any] = []

    def load(kind: str) -> tuple[Any, Any]:
        (nbytes,), layers = smallest(saved(kind)).values(), CLASSES[kind][3]
        places = {"": "cpu:0", f"{layers}.1": "cpu:1", f"{layers}.2": "cpu:1"}
        budgets = {"cpu:0": nbytes, "cpu:1": nbytes}
        models.append(AutoModel.from_pretrained(saved(kind), device="cpu", device_map=places, max_memory=budgets))
        assert [list(stage.layers) for stage in runtime_of(models[-1]).assembly.stages] == [[1, 2]]
        return aligned(getattr(transformers, CLASSES[kind][0]).from_pretrained(saved(kind))), models[-1]

    yield load
    for model in models:
        model.close()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("kind", CLASSES)
def test_ways_to_generate(kind: str, both: Any) -> None:
    whole, model = both(kind)
    for name, way in WAYS.items():
        found = []
        for one in (whole, model):
            torch.manual_seed(3)
            found.append(one.generate(**CLASSES[kind][4], **{**GREEDY, **way}))
        assert torch.equal(*found), name


def test_attentions_of_decoder_and_encoder(both: Any) -> None:
    whole, model = both("bart")
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions", "decoder_hidden_states")
    found = []
    for one in (whole, model):
        one.set_attn_implementation("eager")
        with torch.no_grad():
            for _ in range(2):
                output = one(input_ids=IDS, decoder_input_ids=IDS[:, :5], output_attentions=True, output_hidden_states=True)
        found.append([states for name in names for states in output[name]])
    assert len(found[0]) == len(found[1]) == 13
    assert all(map(torch.equal, *found))


def test_copies_of_a_cache_and_one_that_is_used_again(both: Any) -> None:
    whole, model = both("bart")
    found: list[list[torch.Tensor]] = []
    for one in (whole, model):
        made = EncoderDecoderCache(DynamicCache(), DynamicCache())
        run = functools.partial(one, past_key_values=made, use_cache=True)
        with torch.no_grad():
            found.append([run(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits])
            copied = copy.deepcopy(made)
            found[-1].append(run(input_ids=IDS, decoder_input_ids=IDS[:, 6:7]).logits)
            found[-1].append(one(input_ids=IDS, decoder_input_ids=IDS[:, 4:7], past_key_values=copied).logits)
            made.batch_select_indices(torch.tensor([1]))
            found[-1].append(run(input_ids=IDS[1:], decoder_input_ids=IDS[1:, 7:8]).logits)
            copied.crop(-2)
            found[-1].append(one(input_ids=IDS, decoder_input_ids=IDS[:, 8:9], past_key_values=copied).logits)
    assert all(map(torch.equal, *found))


def test_an_encoders_states_are_sent_twice(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both("bart")
    (stage,) = runtime_of(model).assembly.stages
    submit, sizes = stage.submit, list[int]()
    stage.submit = lambda request: (sizes.append(len(pickle.dumps(request))), submit(request))[1]
    ids = IDS.repeat(1, 20)
    asked = {**GREEDY, "max_new_tokens": 12}
    expected = model.generate(ids, **asked)
    plainly = sizes[:]
    sizes.clear()
    monkeypatch.setattr(remote, "KEPT_BYTES", 2 * 200 * 32)
    assert torch.equal(model.generate(ids, **asked), expected)
    states = ids.numel() * 32 * 4
    assert all(size > states for size in plainly)
    assert len([size for size in sizes if size > states]) == 2
    gc.collect()
    model(input_ids=IDS, decoder_input_ids=IDS[:, :2], use_cache=False)  # comes after what is to be forgotten
    assert stage.texts == 0
    assert stage._runner._saved == {}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_workers_that_end_amid_a_text(
    kind: str, when: str, over_workers: test_cluster_stage.Staged, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "KEPT_BYTES", 1000)
    whole = aligned(getattr(transformers, CLASSES[kind][0]).from_pretrained(saved(kind)))
    model, here = over_workers(saved(kind))
    here.ends = lambda number: when if number in (5, 9, 16, 40) else ""
    for way in ({}, {"num_beams": 3}):
        assert torch.equal(model.generate(IDS, **GREEDY, **way), whole.generate(IDS, **GREEDY, **way))
    assert here.started >= 5
