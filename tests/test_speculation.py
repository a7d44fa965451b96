"""Several tokens a pass give the text of plain decoding: transformers' loop sees the same logits, from fewer passes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import families
import pytest
import torch
from guessing import Guided
from tiny import words
from transformers import DynamicCache, LlamaConfig, LogitsProcessor, StoppingCriteria

from rabbit_engine import AutoModel, DraftModel, Lookup, Session
from rabbit_engine.decoding import ROOT, Allowance, Tree
from rabbit_engine.decoding.support import deepest
from rabbit_engine.decoding.verification import mask_kinds, tree_mask
from rabbit_engine.errors import ConfigurationError
from rabbit_engine.model.speculating import findings_of
from rabbit_engine.transformers_bridge.forwards import cache_argument, cache_of

GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
DRAWN = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 0.95, "pad_token_id": 0}
FAMILIES = {
    "llama": "a tree",
    "mistral": "a tree; all layers slide",
    "gemma3": "a tree; some layers slide",
    "gemma3n": "a tree; layers share keys",
    "gpt2": "a tree; learnt positions",
    "deepseek_v3": "a tree; latent attention, experts on demand",
    "mpt": "a chain; it refuses masks of four dimensions",
    "llama4": "a chain; attention in chunks",
    "qwen3_next": "a chain; recurrent states",
    "phi4": "a tree; other rotary factors behind 32 tokens",
}


def prompt(tokens: int = 21) -> torch.Tensor:
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


def seeded(model: Any, ids: torch.Tensor | None, **keywords: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(ids, **keywords)


def passes(model: Any, ids: torch.Tensor, **keywords: Any) -> tuple[Any, int]:
    before = model.profile.passes
    found = seeded(model, ids, **keywords)
    return found, model.profile.passes - before


@pytest.fixture
def llama(checkpoint: Any, streamed: Any) -> Any:
    return streamed(checkpoint("llama"), dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_text_is_that_of_plain_decoding_in_fewer_passes(family: str, how: Any, checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    expected, plain_passes = passes(model, prompt(), **how)
    draft = Guided(expected[0].tolist(), branches=2)
    found, fewer = passes(model, prompt(), speculate=draft, **how)
    assert torch.equal(found, expected)
    assert fewer < plain_passes - 3
    assert sum(len(verdict.path) for verdict in draft.verdicts) > 0


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_model_that_computes_other_numbers_for_several_tokens_decodes_plainly(
    family: str, checkpoint: Any, streamed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    expected = seeded(model, prompt(), **GREEDY)
    draft = Guided(expected[0].tolist())
    with caplog.at_level(logging.INFO, "rabbit_engine"):
        assert torch.equal(seeded(model, prompt(), speculate=draft, **GREEDY), expected)
    assert not draft.verdicts
    assert "other numbers" in caplog.text


def test_left_padding_and_padding_inside_the_prompt(llama: Any) -> None:
    ids, mask = prompt(), torch.ones(1, 21, dtype=torch.long)
    mask[0, :5], mask[0, 9] = 0, 0
    expected = seeded(llama, ids, attention_mask=mask, **GREEDY)
    assert not torch.equal(expected, seeded(llama, ids, **GREEDY))
    draft = Guided(expected[0].tolist(), branches=2)
    found, fewer = passes(llama, ids, attention_mask=mask, speculate=draft, **GREEDY)
    assert torch.equal(found, expected)
    assert fewer < 20


@pytest.mark.parametrize("family", ["phi4", "gemma3"])
@pytest.mark.parametrize("given", ["padded on the left", "as embeddings", "in chunks", "one token"])
def test_prompts_in_other_forms(family: str, given: str, checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    ids, how = prompt(), {**GREEDY, "max_new_tokens": 20}
    forms: dict[str, dict[str, Any]] = {
        "padded on the left": {"input_ids": torch.cat([torch.zeros_like(ids[:, :5]), ids], 1)},
        "as embeddings": {"inputs_embeds": model.get_input_embeddings()(ids)},
        "in chunks": {"input_ids": ids, "prefill_chunk_size": 4},
        "one token": {"input_ids": ids[:, :1], "max_new_tokens": 40},
    }
    how |= forms[given]
    if given == "padded on the left":
        how["attention_mask"] = (how["input_ids"] > 0).long()
    expected = seeded(model, None, **how)
    draft = Guided(expected[0].tolist(), agreement=1.0, branches=1, nodes=30)
    assert torch.equal(seeded(model, None, speculate=draft, **how), expected)
    assert sum(len(verdict.path) for verdict in draft.verdicts) > 4


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_each_token_once(llama: Any) -> None:
    expected, recorder = seeded(llama, prompt(), **DRAWN), Recorder()
    seeded(llama, prompt(), speculate=Guided(expected[0].tolist()), streamer=recorder, **DRAWN)
    assert recorder.tokens == expected[0].tolist()
    assert recorder.ended == 1


class OnlyNew(LogitsProcessor):
    """Forbids the tokens of the text so far; counts its calls."""

    supports_continuous_batching = False
    calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores.index_fill(1, input_ids[0], -1e9)


class AtLength(StoppingCriteria):
    """Ends the text at 35 tokens; counts its calls."""

    calls = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.calls += 1
        return torch.tensor([input_ids.shape[1] >= 35])


def test_processors_and_criteria_are_asked_once_a_token(llama: Any) -> None:
    expected = seeded(llama, prompt(), logits_processor=[OnlyNew()], stopping_criteria=[AtLength()], **DRAWN)
    assert expected.shape[1] == 35
    processor, criterion, draft = OnlyNew(), AtLength(), Guided(expected[0].tolist())
    found, fewer = passes(llama, prompt(), speculate=draft, logits_processor=[processor], stopping_criteria=[criterion], **DRAWN)
    assert torch.equal(found, expected)
    assert processor.calls == criterion.calls == 14
    assert fewer < 14


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma3n", "qwen3_next"])
def test_returned_scores_states_and_cache_are_those_of_plain_decoding(family: str, checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    returned = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        **GREEDY,
    }
    expected = seeded(model, prompt(), **returned)
    draft = Guided(expected.sequences[0].tolist(), branches=2)
    found = seeded(model, prompt(), speculate=draft, **returned)
    assert draft.verdicts
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert [[part.shape for part in step] for step in found.hidden_states] == [
        [part.shape for part in step] for step in expected.hidden_states
    ]
    torch.testing.assert_close(found.hidden_states[-1], expected.hidden_states[-1], rtol=1e-4, atol=1e-4)
    followed = [
        seeded(model, output.sequences, past_key_values=output["past_key_values"], **GREEDY) for output in (found, expected)
    ]
    assert torch.equal(*followed)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"], ids=["tree", "carry"])
def test_returned_scores_and_states_hold_no_more_memory_than_those_of_plain_decoding(
    family: str, checkpoint: Any, streamed: Any
) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    names = ("scores", "logits", "hidden_states")
    returned = {"return_dict_in_generate": True, **{f"output_{name}": True for name in names}, **GREEDY}
    expected = seeded(model, prompt(), **returned)
    draft = Guided(expected.sequences[0].tolist(), branches=2)
    found = seeded(model, prompt(), speculate=draft, **returned)
    assert draft.verdicts
    for name in names:
        assert held_bytes(found[name]) <= held_bytes(expected[name])


def held_bytes(states: Any) -> int:
    """Memory that tensors in nested tuples keep, that of a view as a whole."""
    storages = [tensor.untyped_storage() for tensor in flat(states)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def flat(states: Any) -> list[torch.Tensor]:
    return [states] if isinstance(states, torch.Tensor) else [tensor for part in states for tensor in flat(part)]


def test_cache_of_the_caller_is_continued(llama: Any) -> None:
    first = seeded(llama, prompt(), return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, prompt(4)], 1)
    expected = seeded(llama, text, **GREEDY)
    draft, own = Guided(expected[0].tolist()), cache_argument(llama.forward, cache_of(first))
    found, fewer = passes(llama, text, speculate=draft, **own, **GREEDY)
    assert torch.equal(found, expected)
    assert fewer < 20


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_states_of_the_caller_are_continued(family: str, checkpoint: Any, streamed: Any) -> None:
    def continued(model: Any) -> torch.Tensor:
        first = seeded(model, prompt(), return_dict_in_generate=True, **GREEDY)
        text = torch.cat([first.sequences, prompt(1)], 1)
        return seeded(model, text, **cache_argument(model.forward, cache_of(first)), **GREEDY)

    model = streamed(checkpoint(family), dtype="float32", speculate="auto")
    assert torch.equal(continued(model), continued(families.build(family)))


@pytest.mark.parametrize("records", [False, True])
def test_cache_of_the_caller_records_its_past_afterwards_if_it_did_before(records: bool, checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("gemma3"), dtype="float32")
    expected, cache = seeded(model, prompt(), **GREEDY), DynamicCache(config=model.config)
    if records:
        cache.activate_past_recording()
    draft = Guided(expected[0].tolist(), branches=2)
    assert torch.equal(seeded(model, prompt(), speculate=draft, **cache_argument(model.forward, cache), **GREEDY), expected)
    assert draft.verdicts
    assert {layer.record_past for layer in cache.layers if hasattr(layer, "record_past")} == {records}


@pytest.mark.parametrize(("family", "way"), [("mistral", "chain"), ("gemma3", "chain"), ("llama", "tree")])
def test_cache_of_the_caller_without_sliding_layers_verifies_chains(
    family: str, way: str, checkpoint: Any, streamed: Any
) -> None:
    model = streamed(checkpoint(family), dtype="float32")
    expected = seeded(model, prompt(), **GREEDY)
    draft, own = Guided(expected[0].tolist(), branches=2), cache_argument(model.forward, DynamicCache())
    assert torch.equal(seeded(model, prompt(), speculate=draft, **own, **GREEDY), expected)
    assert findings_of(model).used == way


def test_answer_ends_at_an_end_token_within_a_tree(llama: Any) -> None:
    text = seeded(llama, prompt(), **GREEDY)[0].tolist()
    end = text[-1]
    stop = {**GREEDY, "eos_token_id": end}
    expected = seeded(llama, prompt(), **stop)
    found = seeded(llama, prompt(), speculate=Guided([*expected[0].tolist(), 7, 8, 9]), **stop)
    assert torch.equal(found, expected)


UNABLE = {
    "2 texts at once": {"num_return_sequences": 2, "do_sample": True},
    "returned attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "guidance": {"guidance_scale": 1.5},
    "beams": {"num_beams": 2},
    "StaticCache": {"cache_implementation": "static"},
    "use_cache=False": {"use_cache": False},
}


@pytest.mark.parametrize("reason", UNABLE)
def test_what_cannot_be_speculated_decodes_plainly_and_says_so_once(
    reason: str, checkpoint: Any, streamed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = streamed(checkpoint("llama"), dtype="float32", attn_implementation="eager")
    how = {**GREEDY, "max_new_tokens": 5, **UNABLE[reason]}
    expected = seeded(model, prompt(), **how)
    draft = Guided([])
    with caplog.at_level(logging.INFO, "rabbit_engine"):
        for _ in range(2):
            found = seeded(model, prompt(), speculate=draft, **how)
    same = getattr(found, "sequences", found), getattr(expected, "sequences", expected)
    assert torch.equal(*same)
    assert caplog.text.count("without speculation") == 1
    assert reason in caplog.text


def test_error_in_the_middle_of_a_tree_leaves_a_usable_model(llama: Any) -> None:
    expected = seeded(llama, prompt(), **GREEDY)

    def fails(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        if input_ids.shape[1] == 30:
            raise KeyError("own")
        return torch.tensor([False])

    with pytest.raises(KeyError, match="own"):
        seeded(llama, prompt(), speculate=Guided(expected[0].tolist()), stopping_criteria=[fails], **GREEDY)
    assert torch.equal(seeded(llama, prompt(), speculate=Guided(expected[0].tolist()), **GREEDY), expected)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("atuo", "speculate='atuo' is not known: give \"auto\""),
        (DraftModel, "speculate is the class DraftModel"),
        (True, "speculate is a bool: give None"),
        (torch.zeros(2), 'speculate is a Tensor: give None, "auto" or a draft'),
    ],
)
def test_a_wrong_value_is_refused_with_the_known_ones(wrong: Any, words: str, llama: Any) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        llama.generate(prompt(), speculate=wrong)
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        AutoModel.from_pretrained(llama.name_or_path, speculate=wrong)


def test_default_of_the_model_is_used_unless_a_call_says_otherwise(checkpoint: Any, streamed: Any) -> None:
    draft = Guided([])
    model = streamed(checkpoint("llama"), dtype="float32", speculate=draft)
    expected, plain_passes = passes(model, prompt(), speculate=None, **GREEDY)
    draft.text = expected[0].tolist()
    found, fewer = passes(model, prompt(), **GREEDY)
    assert torch.equal(found, expected)
    assert fewer < plain_passes == 24


def test_texts_of_a_session_are_verified_in_the_same_passes(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"), dtype="float32")
    model.tokenizer = words(96)
    prompts = [prompt(tokens)[0].tolist() for tokens in (9, 13, 21)]
    options = {"max_new_tokens": 20, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    with Session(model) as session:
        expected = [list(reply.tokens) for reply in session.generate(prompts, **options)]
    draft = Guided([], branches=2)
    draft.others = [ids + answer for ids, answer in zip(prompts, expected, strict=True)]
    with Session(model, speculate=draft) as session:
        before = model.profile.passes
        replies = session.generate(prompts, **options)
    assert [list(reply.tokens) for reply in replies] == expected
    assert model.profile.passes - before < 15
    assert sum(len(verdict.path) for verdict in draft.verdicts) > 20


def test_texts_of_a_session_all_draft_before_the_pass_that_verifies(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"), dtype="float32")
    model.tokenizer = words(96)
    events: list[str] = []

    class Watched(Guided):
        def propose(self, ids: Sequence[int], budget: Allowance) -> Tree:
            events.append("draft")
            return super().propose(ids, budget)

    hook = model.lm_head.register_forward_hook(lambda *_: events.append("compute"))
    with Session(model, speculate=Watched([])) as session:
        session.generate([prompt(tokens)[0].tolist() for tokens in (9, 13, 21)], max_new_tokens=4, ignore_eos=True)
    hook.remove()
    assert events == ["compute"] * 3 + (["draft"] * 3 + ["compute"] * 3) * 2 + ["compute"] * 3  # no room for a guess


TREE = Tree(tokens=(5, 6, 7, 8), parents=(ROOT, ROOT, 0, 2), probabilities=(0.6, 0.3, 0.5, 0.4))


def test_a_node_sees_the_text_and_its_own_path() -> None:
    visible = torch.tensor([False, True, True])
    expected = [
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 1, 0],
        [0, 1, 1, 1, 1, 0, 1, 1],
    ]
    assert tree_mask(visible, TREE, None).int().tolist() == expected


def test_a_node_of_a_sliding_layer_sees_as_many_positions_as_its_window() -> None:
    # kept of 5: the last 3; the deepest node stands at 3 after the text's last token and sees 4 positions
    expected = [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 1, 0],
        [0, 0, 0, 1, 1, 0, 1, 1],
    ]
    assert tree_mask(torch.ones(5, dtype=torch.bool), TREE, 4).int().tolist() == expected


def test_each_kind_of_layer_gets_its_mask_and_layers_that_differ_get_none() -> None:
    assert mask_kinds({0: None, 1: None}, None) == {"": None}
    assert mask_kinds({0: 8, 2: None}, ["sliding_attention", "full_attention", "full_attention"]) == {
        "sliding_attention": 8,
        "full_attention": None,
    }
    with pytest.raises(ValueError, match="see 8 and 4 tokens"):
        mask_kinds({0: 8, 1: 4}, ["sliding_attention", "sliding_attention"])
    with pytest.raises(ValueError, match="does not say which"):
        mask_kinds({0: 8, 1: None}, None)


@pytest.mark.parametrize(
    ("rope", "tokens", "depth"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 30, 2),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 33, 31),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 65, 1 << 30),
        ({"rope_type": "dynamic"}, 60, 4),
        ({"rope_type": "dynamic"}, 65, 0),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 60, 4),
        ({"rope_type": "llama3", "original_max_position_embeddings": 32}, 60, 4),
        ({"rope_type": "llama3", "original_max_position_embeddings": 32}, 65, 1 << 30),
    ],
)
def test_trees_do_not_cross_a_length_at_which_positions_change(rope: Any, tokens: int, depth: int) -> None:
    config = LlamaConfig(max_position_embeddings=64)
    config.rope_parameters = rope
    assert deepest(config, tokens) == depth


def test_trees_end_with_the_learnt_positions(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("opt"), dtype="float32")
    most = model.config.max_position_embeddings
    how = {**GREEDY, "max_new_tokens": 40, "stopping_criteria": [lambda ids, _: torch.tensor([ids.shape[1] == most - 1])]}
    expected = seeded(model, prompt(most - 9), **how)
    draft = Guided(expected[0].tolist() + [7] * 30, agreement=1.0, nodes=64)
    found, fewer = passes(model, prompt(most - 9), speculate=draft, **how)
    assert torch.equal(found, expected)
    assert fewer < 8


def test_rotary_factors_change_by_positions_not_by_padded_tokens(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("phi4"), dtype="float32")
    ids, mask = prompt(40), torch.ones(1, 40, dtype=torch.long)
    mask[0, :22] = 0  # 18 positions; the factors change behind the 32nd
    how = {**GREEDY, "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    expected = seeded(model, ids, **how)
    draft = Guided(expected.sequences[0].tolist(), agreement=1.0, branches=2, nodes=64)
    found, fewer = passes(model, ids, speculate=draft, **how)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert fewer < 12


class LooksAhead(LogitsProcessor):
    """Generates with the same model how the text might go on, by beams."""

    supports_continuous_batching = False

    def __init__(self, model: Any, **keywords: Any) -> None:
        self.model, self.keywords = model, keywords

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.model.generate(input_ids, max_new_tokens=3, do_sample=False, pad_token_id=0, **self.keywords)
        return scores


@pytest.mark.parametrize("inner", [{"num_beams": 2}, {"speculate": None}], ids=["beams", "plain"])
def test_processor_that_generates_with_the_same_model_is_a_generation_of_its_own(inner: Any, llama: Any) -> None:
    expected = seeded(llama, prompt(), **GREEDY)
    draft = Guided(expected[0].tolist(), branches=2)
    found = seeded(llama, prompt(), speculate=draft, logits_processor=[LooksAhead(llama, **inner)], **GREEDY)
    assert torch.equal(found, expected)
    assert max(len(verdict.path) for verdict in draft.verdicts) > 1


def test_auto_is_not_bound_by_the_size_of_another_lookup(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start, sizes = Lookup.start, list[int | None]()
    monkeypatch.setattr(Lookup, "start", lambda draft: (sizes.append(draft.nodes), start(draft))[1])
    for draft in (Lookup(nodes=64), "auto"):
        seeded(llama, prompt(), speculate=draft, **GREEDY)
    assert sizes == [64, None]


def test_profile_counts_the_pass_in_whose_tree_the_text_ends(llama: Any) -> None:
    expected, before = seeded(llama, prompt(), **GREEDY), llama.profile.speculation
    draft = Guided(expected[0].tolist(), agreement=1.0, nodes=12)  # a chain of 6 with a wrong sibling at each step
    _, count = passes(llama, prompt(), speculate=draft, **GREEDY)
    found = llama.profile.speculation.since(before)
    assert (found.tokens, found.passes) == (23, count - 1)  # the first token is the prompt's
    assert found.accepted == found.tokens - found.passes
