"""Models of several stacks: what a pass runs and needs is known of each, and each is streamed as finely as the layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_tasks import BART, IDS, PIXELS, SIZES, SOUND, T5, TEXT, differing, own, save
from tiny import words

from rabbit_engine import Session
from rabbit_engine.config import Cut
from rabbit_engine.errors import BudgetError, CannotGenerateError, PromptTooLongError
from rabbit_engine.model.admission import demand_of
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, need_bytes
from rabbit_engine.planning.partition import partition_model
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.probe import Curve, Probe, run_probe
from rabbit_engine.planning.tiers import Budget
from rabbit_engine.planning.weights import unread_entries
from rabbit_engine.sessions.prompts import Limits
from rabbit_engine.transformers_bridge.generation import settings_of

KEYS_AND_VALUES = 3 * 2 * 32 * 4
"""Bytes of a token in three layers of BART, in float32."""
FINE = Cut(least_bytes=1)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SOUND),
}


def on_meta(cls: str, config: str, sizes: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()


def probe(cls: str, config: str, sizes: dict[str, Any]) -> Probe:
    return run_probe(on_meta(cls, config, sizes))


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
def test_a_decoder_keeps_keys_and_values_of_its_own_tokens_and_of_the_encoders(name: str) -> None:
    found = probe(*MODELS[name])
    assert (found.cache_token_bytes, found.cache_fixed_bytes) == (KEYS_AND_VALUES, 0)
    assert found.layers.at(100) > 0


def test_a_sound_takes_the_same_of_the_cache_at_any_length_of_text() -> None:
    found = probe(*MODELS["whisper"])
    assert found.cache_token_bytes == KEYS_AND_VALUES
    assert found.cache_fixed_bytes == SOUND["max_source_positions"] * KEYS_AND_VALUES


@pytest.mark.parametrize("name", MODELS)
def test_the_modules_of_an_encoder_run_for_a_prompt_only(name: str) -> None:
    found = probe(*MODELS[name])
    assert not found.failure
    stacks = {"encoder" if "encoder." in leaf and "encoder_attn" not in leaf else "decoder" for leaf in found.prompt_only}
    assert "encoder" in stacks
    # keys and values of what the encoder gave are computed once
    decoder = {leaf for leaf in found.prompt_only if ".decoder." in f".{leaf}"}
    assert {leaf.rpartition(".")[2] for leaf in decoder} == ({"k", "v"} if name == "t5" else {"k_proj", "v_proj"})
    assert len(decoder) == 6


def test_an_image_takes_the_same_whatever_the_text() -> None:
    found = probe("ViTForImageClassification", "ViTConfig", PIXELS)
    assert found.layers == Curve(found.layers.fixed)
    assert found.layers.fixed > 0
    assert found.alone


def test_a_text_of_several_choices_is_measured() -> None:
    found = probe("BertForMultipleChoice", "BertConfig", SIZES)
    assert found.layers == probe("BertForSequenceClassification", "BertConfig", SIZES).layers


def smallest(model: Any) -> int:
    """The smallest budget that the model's shapes could run in."""
    partition = partition_model(model, *unread_entries(model))
    with pytest.raises(BudgetError) as raised:
        place(partition.sizes, "cpu", Budget(device_bytes=1))
    return raised.value.smallest_bytes


def test_both_stacks_are_cut_within_their_layers() -> None:
    wide = {"d_model": 1024, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "vocab_size": 96}
    model = on_meta("BartForConditionalGeneration", "BartConfig", {**BART, **wide}).to(torch.bfloat16)
    largest = 2 * 1024 * 4096 + 2 * 4096  # a matrix and its bias
    assert 2 * largest <= smallest(model) < 3 * largest  # a whole layer of the decoder has four of them


@pytest.mark.parametrize("name", MODELS)
def test_stacks_that_are_cut_finely_give_equal_bits(name: str, tmp_path: Path, streamed: Any) -> None:
    cls, config, sizes = MODELS[name]
    expected = own(save(cls, config, sizes, tmp_path), cls)
    sound = {"input_features": torch.randn(2, 8, 20)}
    inputs = {**(sound if name == "whisper" else TEXT), "decoder_input_ids": IDS[:, :5]}
    model = streamed(tmp_path, cut=FINE)
    assert sum("encoder.block" in unit or "encoder.layers" in unit for unit in model.plan.streamed) >= 18
    with torch.no_grad():
        assert [differing(model(**inputs), expected(**inputs)) for _ in range(2)] == [[], []]


def test_the_plan_has_the_encoder_once_a_text(tmp_path: Path, streamed: Any) -> None:
    model = streamed(save(*MODELS["bart"], tmp_path), cut=FINE)
    plan = model.plan
    sizes = {size.name: size.disk_bytes for size in plan.units if size.name in plan.streamed}
    once = {name for name in sizes if ".encoder." in name or "encoder_attn.k_" in name or "encoder_attn.v_" in name}
    assert plan.encoder_bytes == sum(sizes[name] for name in once)
    assert plan.pass_bytes == sum(sizes[name] for name in sizes.keys() - once)
    assert plan.prompt_bytes == plan.pass_bytes + plan.encoder_bytes
    assert dict(plan.rows())["encoder"].endswith("more from disk, once a text")
    assert "for images" not in dict(plan.rows())


def test_the_encoder_is_read_once_a_text(tmp_path: Path, streamed: Any) -> None:
    model = streamed(save(*MODELS["bart"], tmp_path), cut=FINE, prefetching=False)
    model.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert model.profile.bytes_read == 6 * model.plan.pass_bytes + model.plan.encoder_bytes


def test_a_list_of_lists_of_blocks_is_streamed(tmp_path: Path, streamed: Any) -> None:
    sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [2, 1, 1, 1], "num_encoder_blocks": 4}
    expected = own(
        save("PoolFormerForImageClassification", "PoolFormerConfig", sizes, tmp_path), "PoolFormerForImageClassification"
    )
    model = streamed(tmp_path)
    assert {name for name in model.plan.streamed if name.startswith("poolformer.encoder.block.0.")} == {
        "poolformer.encoder.block.0.0",
        "poolformer.encoder.block.0.1",
    }
    with torch.no_grad():
        assert [differing(model(**image), expected(**image)) for image in [{"pixel_values": torch.randn(1, 3, 32, 32)}]] == [[]]


def test_stages_are_streamed_by_their_large_parts(tmp_path: Path, streamed: Any) -> None:
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4, "patch_size": 4}
    expected = own(save("SwinForImageClassification", "SwinConfig", sizes, tmp_path), "SwinForImageClassification")
    model = streamed(tmp_path, cut=FINE)
    assert len(model.plan.streamed) > 10
    image = {"pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        assert differing(model(**image), expected(**image)) == []


TOKENS = IDS[:1].tolist()[0]


def both(name: str, folder: Path, streamed: Any, **keywords: Any) -> tuple[Any, Any]:
    """transformers' own load of the model, and the streamed one, cut finely."""
    cls, config, sizes = MODELS[name]
    return own(save(cls, config, sizes, folder), cls), streamed(folder, cut=FINE, **keywords)


@pytest.mark.parametrize("name", ["bart", "t5", "marian"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8},
        {"attention_mask": (torch.arange(12) < torch.tensor([[12], [7]])).long()},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "drawn", "padded", "uncached"],
)
def test_texts_are_generated_as_by_transformers(name: str, options: dict[str, Any], tmp_path: Path, streamed: Any) -> None:
    found = []
    for model in both(name, tmp_path, streamed):
        torch.manual_seed(3)
        found.append(model.generate(IDS, **{"do_sample": False, **options}, max_new_tokens=6))
    assert torch.equal(*found)


def test_texts_are_generated_in_bf16(tmp_path: Path, streamed: Any) -> None:
    cls, config, sizes = MODELS["t5"]
    own(save(cls, config, sizes, tmp_path), cls).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = own(tmp_path, cls).generate(IDS, do_sample=False, max_new_tokens=6)
    assert torch.equal(streamed(tmp_path, cut=FINE).generate(IDS, do_sample=False, max_new_tokens=6), expected)


def test_states_of_the_encoder_may_be_given(tmp_path: Path, streamed: Any) -> None:
    expected, model = both("bart", tmp_path, streamed, prefetching=False)
    encoded = model.get_encoder()(IDS)
    before = model.profile.bytes_read
    found = model.generate(encoder_outputs=encoded, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(found, expected.generate(IDS, do_sample=False, max_new_tokens=6, min_new_tokens=6))
    read = {name: unit.bytes_read for name, unit in model.profile.units.items() if ".encoder." in name}
    assert sum(read.values()) <= before  # by the call of the encoder alone


def test_a_streamer_gets_the_answer(tmp_path: Path, streamed: Any) -> None:
    from transformers.generation.streamers import BaseStreamer

    class Seen(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            pass

    expected, model = both("bart", tmp_path, streamed)
    seen = Seen()
    model.generate(IDS[:1], do_sample=False, max_new_tokens=6, streamer=seen)
    assert seen.tokens == expected.generate(IDS[:1], do_sample=False, max_new_tokens=6)[0].tolist()


def test_a_session_answers_as_generate_does(tmp_path: Path, streamed: Any) -> None:
    expected, model = both("t5", tmp_path, streamed)
    words(96).save_pretrained(tmp_path)
    texts = [TOKENS[:length] for length in (12, 5, 1, 9)]
    plain = [expected.generate(torch.tensor([text]), do_sample=False, max_new_tokens=7)[0, 1:].tolist() for text in texts]
    with Session(model, max_requests=3) as session:
        replies = session.generate(texts, max_new_tokens=7)
        assert [list(reply.tokens) for reply in replies] == plain
        assert [reply.prompt_tokens for reply in replies] == [12, 5, 1, 9]


def test_a_penalty_counts_from_the_first_token_of_an_answer(tmp_path: Path, streamed: Any) -> None:
    _, model = both("bart", tmp_path, streamed)
    words(96).save_pretrained(tmp_path)
    with Session(model) as session:
        plain, once = (
            session.generate([TOKENS], max_new_tokens=4, ignore_eos=True, presence_penalty=size)[0] for size in (0.0, 2.0)
        )
    assert plain.tokens[0] == plain.tokens[1]
    assert len(set(once.tokens[:3])) == 3


def test_an_answer_has_positions_of_its_own() -> None:
    limits = Limits(100, 16, whole=20, apart=True)
    assert limits.answer_tokens(100, None) == 19  # the first of `max_length` is what the decoder begins with
    assert limits.answer_tokens(100, 99) == 99
    assert limits.room_for_prompt(50) == 100
    for prompt, asked in ((101, None), (5, 100)):
        with pytest.raises(PromptTooLongError):
            limits.answer_tokens(prompt, asked)


def test_the_demand_of_a_call_counts_the_encoders_text_apart(tmp_path: Path, streamed: Any) -> None:
    config = transformers.GenerationConfig(max_length=30)

    def found(prompt: torch.Tensor, given: dict[str, Any], reading: Any) -> Demand:
        return demand_of(prompt, given, settings_of(given, None, config), reading)

    assert found(IDS, {}, "text") == Demand(12, 29, 2)
    assert found(torch.zeros(2, 8, 20), {"num_beams": 4}, "media") == Demand(1, 29, 8)
    sound = {"decoder_input_ids": torch.zeros(2, 3, dtype=torch.long), "max_new_tokens": 5}
    assert found(torch.zeros(2, 8, 20), sound, "media") == Demand(3, 5, 2)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_call_that_cannot_fit_is_refused(name: str, tmp_path: Path, streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both(name, tmp_path, streamed)
    partition = runtime_of(model).partition
    inputs: dict[str, Any] = {"input_features": torch.randn(2, 8, 20)} if name == "whisper" else {"input_ids": IDS}
    demand = Demand(1 if name == "whisper" else 12, 6, 2)
    free = need_bytes(partition.probe, demand) + KEPT_FREE_BYTES
    for here, refused in ((free, False), (free - 1, True)):
        monkeypatch.setattr(Runtime, "free_bytes", lambda _, here=here: here)
        with pytest.raises(PromptTooLongError) if refused else nullcontext():
            model.generate(**inputs, max_new_tokens=6)


def test_a_sound_is_no_text(tmp_path: Path, streamed: Any, rabbit: Any) -> None:
    _, model = both("whisper", tmp_path, streamed)
    words(96).save_pretrained(tmp_path)
    with Session(model) as session, pytest.raises(CannotGenerateError, match=r"reads input_features, not a text: .*generate"):
        session.generate(["w1"])
    assert "reads input_features, not a text" in rabbit("run", tmp_path, "w1", "--device", "cpu").err


@pytest.mark.parametrize("beams", [1, 2])
def test_run_writes_the_answer_without_the_prompt(beams: int, tmp_path: Path, rabbit: Any) -> None:
    cls, config, sizes = MODELS["bart"]
    expected = own(save(cls, config, sizes, tmp_path), cls)
    expected.generation_config.num_beams = beams
    expected.generation_config.save_pretrained(tmp_path)
    words(96).save_pretrained(tmp_path)
    text = words(96).decode(
        expected.generate(torch.tensor([[7]]), max_new_tokens=6, do_sample=False)[0], skip_special_tokens=True
    )
    done = rabbit("run", tmp_path, "w7", "--max-new-tokens", 6, "--device", "cpu")
    assert done.out.split() == text.split()[1:]  # the decoder begins with a token


@pytest.mark.parametrize("frames", [20, 50], ids=["one window", "long"])
def test_speech_becomes_text_as_with_transformers(frames: int, tmp_path: Path, streamed: Any) -> None:
    sound = torch.randn(1, 8, frames, generator=torch.Generator().manual_seed(4))
    more = {"return_timestamps": True, "attention_mask": torch.ones(1, frames, dtype=torch.long)} if frames > 20 else {}
    found = []
    for model in both("whisper", tmp_path, streamed):
        model.generation_config.no_timestamps_token_id = 60
        model.generation_config.is_multilingual = False
        found.append(model.generate(sound, do_sample=False, max_new_tokens=6, **more))
    assert torch.equal(*found)


def test_a_head_that_shares_the_embedding_of_the_decoder_stays(tmp_path: Path, streamed: Any) -> None:
    part = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"encoder": part, "decoder": part, "vocab_size": 96}
    cls = "T5GemmaForConditionalGeneration"
    expected = own(save(cls, "T5GemmaConfig", sizes, tmp_path), cls)
    model = streamed(tmp_path)
    inputs = {**TEXT, "decoder_input_ids": IDS[:, :5]}
    with torch.no_grad():
        assert differing(model(**inputs), expected(**inputs)) == []


def test_a_server_completes_with_an_encoder_and_a_decoder(tmp_path: Path, streamed: Any) -> None:
    import httpx
    from serving import NAME, serving

    expected, model = both("bart", tmp_path, streamed)
    words(96).save_pretrained(tmp_path)
    answer = words(96).decode(expected.generate(IDS[:1], max_new_tokens=6, do_sample=False)[0, 1:], skip_special_tokens=True)
    with Session(model) as session, serving(session) as address:
        body = {"model": NAME, "prompt": TOKENS, "max_tokens": 6, "temperature": 0}
        found = httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
    assert "choices" in found, found
    assert found["choices"][0]["text"].split() == answer.split()
    assert found["usage"]["prompt_tokens"] == len(TOKENS)
