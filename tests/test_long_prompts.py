"""Long prompts in parts: one pass over the weights, the memory of a part, and what transformers computes from the whole."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from tiny import words
from transformers import AttentionInterface, AutoModelForImageTextToText, DynamicCache, GenerationConfig

from rabbit_engine import Session
from rabbit_engine.config import Cut
from rabbit_engine.errors import PromptTooLongError, SessionClosedError
from rabbit_engine.model.runtime import Runtime, runtime_of
from rabbit_engine.planning import budget, demand
from rabbit_engine.planning.demand import KEPT_FREE_BYTES, Demand, Ways, best_way, need_bytes, work_bytes
from rabbit_engine.planning.parts import layer_of, layer_ring_bytes
from rabbit_engine.planning.placement import place
from rabbit_engine.planning.probe import Curve, Probe
from rabbit_engine.planning.tiers import Budget, UnitSize
from rabbit_engine.sessions.answer import Piece
from rabbit_engine.sessions.room import Room
from rabbit_engine.streaming import Placeholder
from rabbit_engine.streaming.part_masks import PartMasks
from rabbit_engine.streaming.parts import run_in_parts
from rabbit_engine.transformers_bridge.forwards import cache_argument

FAMILIES = ["llama", "llama_tied", "mistral", "gemma3", "gemma3n", "qwen2", "qwen3", "gpt2", "cohere2", "phi3"]
"""Plain, with windows in all or some layers, with keys that layers share, learnt positions."""

WITH_STATES = ["qwen3_next", "qwen3_5", "mamba2", "bamba", "falcon_h1", "lfm2"]
"""States of the whole text, in all or some layers, alone or beside keys."""

OTHERS = ["mpt", "llama4", "jamba", "mamba", "phi4"]
"""Biases instead of positions, attention in chunks, recurrent states, angles that depend on the length."""

ROWS = 8


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "PLANNED_ROWS", ROWS)
    monkeypatch.setattr(demand, "PART_ROWS", (16, ROWS))


def prompt(tokens: int = 61, sequences: int = 1) -> torch.Tensor:
    return torch.randint(5, 90, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def answer(model: Any, ids: torch.Tensor, **keywords: Any) -> Any:
    torch.manual_seed(3)
    settings = {
        "max_new_tokens": 9,
        "do_sample": False,
        "pad_token_id": 0,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    return model.generate(ids, **(settings | keywords))


@pytest.fixture
def parted(parted: Any) -> Any:
    """Load so that prompts are computed in parts, and weights move."""

    def load(folder: Any, **keywords: Any) -> Any:
        model = parted(folder, **keywords)
        assert runtime_of(model).computes_parts
        assert model.plan.streamed
        return model

    return load


@pytest.mark.parametrize("family", [*FAMILIES, *WITH_STATES])
def test_a_prompt_in_parts_takes_one_pass_and_gives_the_answer_of_transformers(
    checkpoint: Any, parted: Any, plain: Any, family: str
) -> None:
    model, own = parted(checkpoint(family)), plain(checkpoint(family))
    ids, before = prompt(), model.profile.passes
    found, expected = answer(model, ids, prefill_chunk_size=ROWS), answer(own, ids)
    assert model.profile.passes - before == 9
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


LEFT = torch.tensor([0, 23, 52, 3, 8])
"""Tokens of padding before each sequence: none, less than a part, several, and exactly one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_in_parts_has_the_answers_of_transformers(checkpoint: Any, parted: Any, plain: Any, family: str) -> None:
    model, own = parted(checkpoint(family)), plain(checkpoint(family))
    ids, mask = prompt(61, len(LEFT)), (torch.arange(61) >= LEFT[:, None]).long()
    before = model.profile.passes
    found = answer(model, ids, attention_mask=mask, prefill_chunk_size=ROWS, eos_token_id=None)
    expected = answer(own, ids, attention_mask=mask, eos_token_id=None)
    assert model.profile.passes - before == 9
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_that_does_not_fit_is_computed_in_parts_however_it_is_continued(
    checkpoint: Any, parted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    model, own = (load(checkpoint("gemma3"), attn_implementation=attention) for load in (parted, plain))
    ids, mask, texts = prompt(50, 2), torch.ones(2, 50, dtype=torch.long), []
    mask[0, :13] = 0
    probe = runtime_of(model).partition.probe
    for each in (model, own):
        cache = DynamicCache(config=each.config)
        first = each.generate(
            ids[:, :20], attention_mask=mask[:, :20], max_new_tokens=3, do_sample=False, **cache_argument(each.forward, cache)
        )
        before, longer = each is own or model.profile.passes, torch.cat([mask.new_ones(2, 3), mask[:, 20:]], -1)
        free(monkeypatch, need_bytes(probe, Demand(33, 9, sequences=2, padded=True, chunk=ROWS)) + KEPT_FREE_BYTES)
        texts.append(
            answer(
                each, torch.cat([first, ids[:, 20:]], -1), attention_mask=torch.cat([mask[:, :20], longer], -1),
                **cache_argument(each.forward, cache),
            ).sequences
        )  # fmt: skip
        assert each is own or model.profile.passes - before == 9
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("tokens", [ROWS + 1, 3 * ROWS, 3 * ROWS + 5])
def test_parts_of_any_length_leave_the_cache_of_one_forward(
    checkpoint: Any, parted: Any, plain: Any, family: str, tokens: int
) -> None:
    model, own = parted(checkpoint(family)), plain(checkpoint(family))
    ids = prompt(tokens)
    ours, theirs = (
        answer(each, ids, max_new_tokens=2, **extra) for each, extra in ((model, {"prefill_chunk_size": ROWS}), (own, {}))
    )
    caches = [list(found.values())[-1] for found in (ours, theirs)]
    assert [type(cache) for cache in caches] == [DynamicCache] * 2
    for here, there in zip(caches[0].layers, caches[1].layers, strict=True):
        assert here.get_seq_length() == there.get_seq_length() == tokens + 1
        torch.testing.assert_close(here.keys, there.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(here.values, there.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"speculate": "auto", "return_dict_in_generate": False},
        {"do_sample": True, "speculate": "auto", "return_dict_in_generate": False},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_every_way_to_generate_has_the_text_of_transformers(checkpoint: Any, parted: Any, plain: Any, settings: Any) -> None:
    model, own = parted(checkpoint("gemma3")), plain(checkpoint("gemma3"))
    ids = torch.cat([prompt(30), prompt(30)], -1)
    found = answer(model, ids, prefill_chunk_size=ROWS, **settings)
    expected = answer(own, ids, **{name: value for name, value in settings.items() if name != "speculate"})
    assert torch.equal(*(getattr(each, "sequences", each) for each in (found, expected)))


def test_a_cache_that_holds_a_text_is_continued_in_parts(checkpoint: Any, parted: Any, plain: Any) -> None:
    model, own = parted(checkpoint("gemma3")), plain(checkpoint("gemma3"))
    ids, texts = prompt(50), []
    for each, extra in ((model, {"prefill_chunk_size": ROWS}), (own, {})):
        cache = DynamicCache(config=each.config)
        first = each.generate(ids[:, :20], max_new_tokens=3, do_sample=False, **cache_argument(each.forward, cache))
        before = model.profile.passes
        texts.append(answer(each, torch.cat([first, ids[:, 20:]], -1), **cache_argument(each.forward, cache), **extra).sequences)
        assert each is own or model.profile.passes - before == 9
    assert torch.equal(*texts)


class OwnCache(DynamicCache):
    """A caller's class, which may do more than store."""


@pytest.fixture
def never_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabbit_engine.model.long_prompts.run_in_parts", lambda *_: pytest.fail("in parts"))


BARE = GenerationConfig(max_new_tokens=9)
"""What it leaves out, `generate` takes from the model's."""


@pytest.mark.parametrize(
    "given", [{"pad_token_id": 0, "max_new_tokens": 9}, {"generation_config": BARE}], ids=["given", "the model's"]
)
def test_padding_that_transformers_finds_without_a_mask_is_masked(
    checkpoint: Any, parted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    model, own = parted(checkpoint("gemma3")), plain(checkpoint("gemma3"))
    ids = prompt(40)
    ids[:, :7] = 0
    for each in (model, own):
        monkeypatch.setattr(each.generation_config, "pad_token_id", 0)
    found = model.generate(ids, do_sample=False, prefill_chunk_size=ROWS, **given)
    assert torch.equal(found, own.generate(ids, do_sample=False, **given))
    assert model.profile.passes == 9


@pytest.mark.usefixtures("never_parted")
@pytest.mark.parametrize("kind", ["class", "static"])
def test_other_caches_than_the_default_are_updated_by_transformers(
    checkpoint: Any, parted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    texts = []
    for each in (parted(checkpoint("gemma3")), plain(checkpoint("gemma3"))):
        given = cache_argument(each.forward, OwnCache(config=each.config)) if kind == "class" else {"generation_config": BARE}
        monkeypatch.setattr(each.generation_config, "cache_implementation", "static" if kind == "static" else None)
        texts.append(answer(each, prompt(40), prefill_chunk_size=ROWS, **given).sequences)
    assert torch.equal(*texts)


@pytest.mark.usefixtures("never_parted")
def test_tokens_of_an_image_see_each_other_in_one_forward(parted: Any, tmp_path: Path) -> None:
    folder = families.save("gemma3_image", tmp_path / "gemma3_image")
    model, own = parted(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    ids, kinds = prompt(40), torch.zeros(1, 40, dtype=torch.long)
    kinds[:, 4:20] = 1
    found, expected = (answer(each, ids, token_type_ids=kinds, prefill_chunk_size=ROWS).sequences for each in (model, own))
    assert torch.equal(found, expected)


def test_the_size_of_parts_may_stand_in_a_generation_config(checkpoint: Any, parted: Any) -> None:
    model = parted(checkpoint("llama"))
    before = model.profile.passes
    answer(model, prompt(), generation_config=GenerationConfig(max_new_tokens=9, prefill_chunk_size=ROWS))
    assert model.profile.passes - before == 9


@pytest.mark.parametrize("family", OTHERS)
def test_other_classes_are_computed_as_transformers_does(checkpoint: Any, streamed: Any, plain: Any, family: str) -> None:
    model, own = streamed(checkpoint(family)), plain(checkpoint(family))
    assert not runtime_of(model).partition.computes_parts
    ids = prompt(40)
    chunked = {} if family in ("mamba", "qwen3_next") else {"prefill_chunk_size": 16}
    before = model.profile.passes
    assert torch.equal(answer(model, ids, **chunked).sequences, answer(own, ids, **chunked).sequences)
    assert model.profile.passes - before == (11 if chunked else 9)


def test_a_class_that_drops_its_cache_at_a_length_is_computed_as_transformers_does(
    own_checkpoint: Any, streamed: Any, plain: Any
) -> None:
    folder = own_checkpoint("phi3", original_max_position_embeddings=30)
    model, own = streamed(folder), plain(folder)
    assert not runtime_of(model).computes_parts
    assert torch.equal(answer(model, prompt(40)).sequences, answer(own, prompt(40)).sequences)


@pytest.mark.usefixtures("never_parted")
def test_after_a_change_of_attention_a_prompt_is_computed_whole(checkpoint: Any, parted: Any, plain: Any) -> None:
    model = parted(checkpoint("llama"))
    AttentionInterface.register("tests_own", AttentionInterface()["sdpa"])
    expected = answer(plain(checkpoint("llama")), prompt()).sequences
    for name in ("flex_attention", "tests_own"):
        model.set_attn_implementation(name)
        assert not runtime_of(model).computes_parts
    assert torch.equal(answer(model, prompt()).sequences, expected)
    assert torch.equal(answer(model, prompt(), prefill_chunk_size=64).sequences, expected)
    model.set_attn_implementation("eager")
    assert runtime_of(model).computes_parts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_parts_read_the_experts_that_they_are_routed_to(checkpoint: Any, parted: Any, plain: Any, family: str) -> None:
    model, own = parted(checkpoint(family)), plain(checkpoint(family))
    assert model.plan.experts.layers
    ids, before = prompt(), model.profile.passes
    found, expected = answer(model, ids, prefill_chunk_size=ROWS), answer(own, ids)
    assert model.profile.passes - before == 9
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    read = [read_by(model, ids, **rows) for rows in ({"prefill_chunk_size": 31}, {})]
    assert read[0] < 2 * read[1]  # other weights once


def read_by(model: Any, ids: torch.Tensor, **keywords: Any) -> int:
    """Bytes that a pass over the prompt read."""
    before = model.profile.bytes_read
    answer(model, ids, max_new_tokens=1, **keywords)
    return int(model.profile.bytes_read - before)


@pytest.mark.parametrize("way", ["4bit", "blocks"])
def test_stored_weights_and_a_head_in_blocks_are_used_in_parts(checkpoint: Any, parted: Any, way: str) -> None:
    chosen = {"compression": "4bit"} if way == "4bit" else {"cut": Cut(least_bytes=1, most_bytes=4096, rest_share=0.0)}
    model = parted(checkpoint("llama"), **chosen)
    if way == "blocks":
        assert any("lm_head[" in name for name in (*model.plan.streamed, *model.plan.host))
    expected, before = answer(model, prompt()), model.profile.passes
    found = answer(model, prompt(), prefill_chunk_size=ROWS)
    assert model.profile.passes - before == 9
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_applied_in_parts(checkpoint: Any, parted: Any) -> None:
    peft = pytest.importorskip("peft")
    model = parted(checkpoint("llama"))
    plain_scores = answer(model, prompt(), prefill_chunk_size=ROWS).scores[0]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    expected = answer(adapted, prompt())
    before = model.profile.passes
    found = answer(adapted, prompt(), prefill_chunk_size=ROWS)
    assert model.profile.passes - before == 9
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores[0], expected.scores[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found.scores[0], plain_scores, atol=1e-3)


def test_the_progress_of_a_pass_in_parts_only_grows(checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = parted(checkpoint("llama")), list[int]()
    native = model.model.layers[1].mlp.act_fn.forward
    monkeypatch.setattr(
        model.model.layers[1].mlp.act_fn, "forward", lambda states: (seen.append(model.progress.layer), native(states))[1]
    )
    answer(model, prompt(), max_new_tokens=1, prefill_chunk_size=ROWS)
    assert len(seen) == 8
    assert len(set(seen)) == 1
    assert model.progress is None


def free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    monkeypatch.setattr(Runtime, "free_bytes", lambda _: nbytes)


def test_what_does_not_fit_whole_is_computed_in_the_largest_parts_that_do(
    checkpoint: Any, parted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = parted(checkpoint("llama")), prompt(120)
    probe = runtime_of(model).partition.probe
    needs = {rows: need_bytes(probe, Demand(120, 9, chunk=rows)) + KEPT_FREE_BYTES for rows in (None, 16, 8)}
    assert sorted(needs.values(), reverse=True) == list(needs.values())
    expected = answer(plain(checkpoint("llama")), ids).sequences
    rows = []
    monkeypatch.setattr(
        "rabbit_engine.model.long_prompts.run_in_parts",
        lambda source, works, *rest: (rows.append(works), run_in_parts(source, works, *rest)),
    )
    for wanted, nbytes in needs.items():
        free(monkeypatch, nbytes)
        rows.clear()
        assert torch.equal(answer(model, ids).sequences, expected)
        assert [len(works) for works in rows] == ([] if wanted is None else [-(-120 // wanted)])
    free(monkeypatch, needs[8] - 1)
    with pytest.raises(PromptTooLongError, match=r"120 tokens and 9 new ones need .* enough for a prompt of 1\d\d tokens"):
        answer(model, ids)


@pytest.mark.parametrize("where", ["keyword", "passed config", "model's config"])
@pytest.mark.parametrize(
    ("setting", "value"), [("use_cache", False), ("cache_implementation", "static"), ("output_hidden_states", True)], ids=str
)
def test_what_a_setting_keeps_from_parts_is_refused_by_its_name(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, where: str
) -> None:
    model, ids = parted(checkpoint("llama")), prompt(120)
    free(monkeypatch, need_bytes(runtime_of(model).partition.probe, Demand(120, 9, chunk=8)) + KEPT_FREE_BYTES)
    given: dict[str, Any] = {"max_new_tokens": 9}
    if where == "keyword":
        given[setting] = value
    elif where == "passed config":
        given = {"generation_config": GenerationConfig(max_new_tokens=9, **{setting: value})}
    else:
        given = {"generation_config": BARE}
        monkeypatch.setattr(model.generation_config, setting, value)
    with pytest.raises(PromptTooLongError, match=f"leave out {setting}=.*, with which it is not computed in parts, shorten it"):
        model.generate(ids, **given)
    assert model.profile.passes == 0


def test_a_bare_generation_config_has_the_size_and_the_former_cache_of_the_models(
    checkpoint: Any, parted: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = parted(checkpoint("gemma3")), prompt()
    expected = answer(plain(checkpoint("gemma3")), ids).sequences
    monkeypatch.setattr(model.generation_config, "prefill_chunk_size", ROWS)
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
    before = model.profile.passes
    assert torch.equal(model.generate(ids, generation_config=BARE), expected)
    assert model.profile.passes - before == 9


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_session_of_a_model_without_a_cache_refuses_what_fits_only_in_parts(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    model = parted(checkpoint("llama"))
    model.tokenizer = words(96)
    asked = [prompt(120)[0].tolist()]
    free(monkeypatch, int(need_bytes(runtime_of(model).partition.probe, Demand(130, 6, chunk=ROWS)) / 0.9) + 2)
    if when == "before":
        monkeypatch.setattr(model.generation_config, "use_cache", False)
    with Session(model) as session:
        monkeypatch.setattr(model.generation_config, "use_cache", False)
        with pytest.raises(PromptTooLongError, match="that fit" if when == "before" else "has use_cache=False: unset it"):
            session.generate(asked, max_new_tokens=6)
        assert len(session.generate([asked[0][:8]], max_new_tokens=3, ignore_eos=True)[0].tokens) == 3


def test_a_wrong_size_is_left_to_transformers(checkpoint: Any, parted: Any, plain: Any) -> None:
    model, own = parted(checkpoint("llama")), plain(checkpoint("llama"))
    for size in (0, -3, "8"):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
            answer(own, prompt(), prefill_chunk_size=size)
        with pytest.raises(type(theirs.value)):
            answer(model, prompt(), prefill_chunk_size=size)


@pytest.mark.parametrize(
    "given",
    [{"output_hidden_states": True}, {"attention_mask": torch.tensor([[1] * 119 + [0]])}],
    ids=["states", "padding on the right"],
)
def test_what_cannot_be_in_parts_is_refused_if_it_does_not_fit(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    model = parted(checkpoint("llama"))
    free(monkeypatch, need_bytes(runtime_of(model).partition.probe, Demand(120, 9, chunk=8)) + KEPT_FREE_BYTES)
    answer(model, prompt(120))
    with pytest.raises(PromptTooLongError):
        answer(model, prompt(120), **given)


@pytest.mark.parametrize(("family", "exact"), [("gemma3", True), ("gemma3", False), ("qwen2_moe", True)])
def test_a_long_prompt_joins_the_passes_of_a_session(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch, family: str, exact: bool
) -> None:
    model = parted(checkpoint(family))
    model.tokenizer = words(96)
    probe = runtime_of(model).partition.probe
    asked = [prompt(120)[0].tolist(), prompt(7)[0].tolist(), prompt(90)[0].tolist()]
    parts = [{"prefill_chunk_size": ROWS}, {}, {"prefill_chunk_size": ROWS}]
    alone = [
        answer(model, torch.tensor([ids]), max_new_tokens=6, eos_token_id=None, **rows).sequences[0, len(ids) :]
        for ids, rows in zip(asked, parts, strict=True)
    ]
    free(monkeypatch, int(need_bytes(probe, Demand(130, 6, chunk=ROWS)) / 0.9) + 2)
    with Session(model, exact=exact) as session:
        assert 120 < session.most_tokens < 200
        before = model.profile.passes
        replies = session.generate(asked, max_new_tokens=6, ignore_eos=True)
        passes = model.profile.passes - before
    assert [reply.text for reply in replies] == [model.tokenizer.decode(found) for found in alone]
    assert passes < 18


def test_an_error_or_an_interrupt_in_a_part_leaves_nothing_behind(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = parted(checkpoint("llama")), prompt()
    expected = answer(model, ids, prefill_chunk_size=ROWS).sequences
    layer, calls = model.model.layers[1].mlp, []
    native = layer.act_fn.forward
    for error in (KeyboardInterrupt, ValueError("in a part"), MemoryError):

        def fail(states: torch.Tensor, error: Any = error) -> torch.Tensor:
            calls.append(1)
            if len(calls) % 3 == 0:
                raise error
            return native(states)

        monkeypatch.setattr(layer.act_fn, "forward", fail)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            answer(model, ids, prefill_chunk_size=ROWS)
        monkeypatch.setattr(layer.act_fn, "forward", native)
        assert all(isinstance(weight, Placeholder) for weight in layer.parameters())
        assert torch.equal(answer(model, ids, prefill_chunk_size=ROWS).sequences, expected)


@pytest.mark.parametrize("window", [None, 3, 7, 50])
@pytest.mark.parametrize("left", [None, [0, 9, 22, 4]], ids=["plain", "padded"])
def test_masks_of_parts_are_those_of_the_whole(window: int | None, left: list[int] | None) -> None:
    whole = torch.ones(1, 23, 23).tril().bool()
    if window is not None:
        whole &= torch.ones(23, 23).triu(1 - window).bool()
    padding = None if left is None else torch.arange(23) < torch.tensor(left)[:, None]
    if padding is not None:
        whole = whole & ~padding[:, None]
    masks = PartMasks({"": window}, 5, 23, torch.float32, torch.device("cpu"), padding)
    for first in (0, 5, 20, 0, 10, 15):
        rows = min(5, 23 - first)
        found: Any = masks.of(first, rows)
        masks.show(first, rows)
        kept = first if window is None else min(first, window - 1)
        assert torch.equal(found[:, 0] == 0, whole[:, first : first + rows, first - kept : first + rows])


def test_what_parts_take() -> None:
    probe = Probe(
        cache_token_bytes=100,
        carried_token_bytes=7,
        span_token_bytes=11,
        layers=Curve(10, 1000, 2),
        head=Curve(50, 0, 0),
        vocabulary=10,
    )
    alone = work_bytes(probe, Demand(10, 1))
    assert work_bytes(probe, Demand(30, 1, chunk=10)) == alone + 30 * 18 + 10 * 20 * (2 + 4)
    padded = work_bytes(probe, Demand(30, 1, chunk=10, padded=True, sequences=2))
    assert padded == 2 * (work_bytes(probe, Demand(30, 1, chunk=10)) + 4 * 10 * 30)
    assert work_bytes(probe, Demand(30, 1, chunk=10, is_computed=True)) == work_bytes(probe, Demand(30, 1, is_computed=True))
    demand = Demand(30, 1)
    assert best_way(probe, demand, need_bytes(probe, demand), Ways(parts=True)) == demand
    assert best_way(probe, demand, need_bytes(probe, demand) - 1, Ways(parts=True)) == Demand(30, 1, chunk=16)
    assert best_way(probe, demand, 100, Ways(parts=True)) == demand


def test_a_ring_for_parts_holds_a_layer_and_two_of_the_largest_units() -> None:
    sizes = [
        UnitSize(f"model.layers.{layer}.{name}", "streamed", nbytes)
        for layer in (1, 11)
        for name, nbytes in (("a", 30), ("b", 50))
    ]
    units = [*sizes, UnitSize("model.layers.1", "resident", 999), UnitSize("lm_head[0:9]", "streamed", 60)]
    layers = ["model.layers.1", "model.layers.11"]
    assert [layer_of(unit.name, layers) for unit in units] == [*layers[:1] * 2, *layers[1:] * 2, layers[0], "lm_head[0:9]"]
    ring = layer_ring_bytes(units, layers)
    assert ring == 80 + 2 * 60
    assert place(units, "cuda:0", Budget(device_bytes=1210, host_bytes=0)).ring_bytes < ring
    assert place(units, "cuda:0", Budget(device_bytes=1210, host_bytes=0, least_ring_bytes=ring)).ring_bytes == ring


def test_memory_is_reserved_for_parts_if_that_takes_less(checkpoint: Any, streamed: Any) -> None:
    few = streamed(checkpoint("llama"), max_seq_len=64)
    assert few.plan.budget.least_ring_bytes == 0
    many = streamed(checkpoint("llama"), max_seq_len=4000)
    assert runtime_of(many).computes_parts
    assert many.plan.reserved_bytes < need_bytes(runtime_of(many).partition.probe, Demand(4000, 0))


def test_a_prompt_whose_states_a_draft_sees_is_computed_whole(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = parted(checkpoint("llama")), prompt()
    expected = answer(model, ids).sequences
    model.watch_states()
    monkeypatch.setattr("rabbit_engine.model.long_prompts.run_in_parts", None)
    assert torch.equal(answer(model, ids, prefill_chunk_size=ROWS).sequences, expected)


@pytest.mark.parametrize("way", ["cancel", "error", "close"])
def test_a_text_that_ends_amid_its_parts_leaves_the_others_alone(
    checkpoint: Any, parted: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model = parted(checkpoint("llama"))
    model.tokenizer = words(96)
    long, short = prompt(120)[0].tolist(), prompt(7)[0].tolist()
    expected = [answer(model, torch.tensor([ids]), max_new_tokens=6, eos_token_id=None, **extra).sequences[0, len(ids) :].tolist()
                for ids, extra in ((long, {"prefill_chunk_size": ROWS}), (short, {}))]  # fmt: skip
    free(monkeypatch, 10**9)
    layer, rows, told = model.model.layers[1].mlp.act_fn, list[int](), dict[int, Any]()
    native, ended = layer.forward, threading.Event()
    with Session(model) as session:
        monkeypatch.setattr(Room, "demand", lambda _, tokens, new: Demand(tokens, new, chunk=ROWS if tokens > 7 else None))
        requests = [session.request_text(ids, max_new_tokens=6, ignore_eos=True) for ids in (long, short)]

        def tell(index: int, event: Any) -> None:
            if not isinstance(event, Piece):
                told[index] = event
                if len(told) == 2:
                    ended.set()

        def act(states: torch.Tensor) -> torch.Tensor:
            rows.append(states.shape[-2])
            if rows.count(ROWS) == 3:
                rows.append(ROWS)
                if way == "error":
                    raise ValueError("in a part")
                if way == "cancel":
                    tickets[0].cancel()
                else:
                    threading.Thread(target=session.close).start()
                    while not session._engine._closed:
                        time.sleep(0.001)
            return native(states)

        layer.forward = act
        tickets: list[Any] = []
        tickets += session.ask(requests, tell)
        assert ended.wait(20)
        layer.forward = native
        if way == "close":
            assert all(isinstance(event, SessionClosedError) for event in told.values())
        else:
            assert told[1].tokens == tuple(expected[1])
            assert "in a part" in repr(told[0]) if way == "error" else told[0].finish_reason == "cancelled"
            assert list(session.generate([long], max_new_tokens=6, ignore_eos=True)[0].tokens) == expected[0]
    assert all(isinstance(weight, Placeholder) for weight in model.model.layers[1].mlp.parameters())
    assert answer(model, torch.tensor([short]), max_new_tokens=6, eos_token_id=None).sequences[0, 7:].tolist() == expected[1]
