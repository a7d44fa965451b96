"""A model as a draft: what it proposes, what it keeps of a text, and which models it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from transformers import PreTrainedModel

from rabbit_engine.decoding import EMPTY, Allowance, DraftModel, Tree
from rabbit_engine.errors import ConfigurationError, DraftError, TokenizerNotFoundError

TEXT = [3, 5, 7]


@dataclass
class Words:
    """A tokenizer, as drafts see it: its tokens in the order of their ids, and which are special."""

    tokens: list[str]
    special: tuple[str, ...] = ()

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def get_added_vocab(self) -> dict[str, int]:
        return {token: self.tokens.index(token) for token in self.special}


@dataclass
class TargetModel:
    """A model to guess for."""

    model: Any
    words: Words | None = None
    name_or_path: str = "target"

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def tokenizer(self) -> Words:
        if self.words is None:
            raise TokenizerNotFoundError("none")
        return self.words

    def load_draft(self, name: str | Path | None, compression: str | None) -> PreTrainedModel:
        raise AssertionError("loaded already")


def attached(model: Any, target: Any = None, **options: Any) -> DraftModel:
    draft = DraftModel(model, **options)
    draft.attach(TargetModel(target or model))
    return draft


def with_words(tokens: list[str], special: tuple[str, ...] = ()) -> Any:
    model: Any = tiny.llama()
    model.tokenizer = Words(tokens, special)
    return model


def answer(model: Any, count: int) -> list[int]:
    """The prompt and `count` tokens that the model says greedily."""
    found = model.generate(torch.tensor([TEXT]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return found[0].tolist()


def accepted(tree: Tree, after: list[int]) -> int:
    """How many tokens of `after` lie on a path of the tree."""
    at, count = -1, 0
    for token in after:
        child = tree.child(at, token)
        if child is None:
            break
        at, count = child, count + 1
    return count


def passes(draft: DraftModel, text: list[int], budget: Allowance) -> list[int]:
    """How many guesses are accepted in each pass over a known text."""
    drafter, at, found = draft.start(), len(TEXT) + 1, []
    while at < len(text):
        found.append(accepted(drafter.propose(text[:at], budget), text[at:]))
        at += found[-1] + 1
    return found


def wide(**changes: Any) -> Any:
    """Weights large enough that tokens differ in likelihood, and that what a token sees matters."""
    model = tiny.llama(**changes)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= 12
    model.lm_head.weight.data *= 4
    return model


def test_the_model_itself_guesses_every_token() -> None:
    model = wide()
    assert passes(attached(model), answer(model, 25), Allowance(nodes=24, depth=4)) == [4] * 5


def test_another_model_guesses_fewer_tokens_and_a_larger_tree_more() -> None:
    model, other = wide(), noisy(wide())
    text, budget = answer(model, 25), Allowance(nodes=4, depth=4)
    small, large = (passes(attached(other, model), text, Allowance(nodes, depth=4)) for nodes in (4, 100))
    assert sum(passes(attached(model), text, budget)) > sum(small)
    assert sum(large) / len(large) > sum(small) / len(small) > 0


def test_what_it_kept_of_the_text_predicts_as_a_new_reading() -> None:
    model = wide()
    text, budget = answer(model, 20), Allowance(nodes=12, depth=5)
    used = attached(model).start()
    for end in range(4, 12, 3):
        assert accepted(used.propose(text[:end], budget), text[end:]) >= 2  # more than one guess is kept
    assert_alike(used.propose(text[:13], budget), attached(model).start().propose(text[:13], budget))


def test_a_text_may_go_on_otherwise_than_any_guess() -> None:
    model, budget = wide(), Allowance(nodes=12, depth=5)
    used = attached(model).start()
    used.propose([3, 5, 7], budget)
    other = [3, 5, 7, 1, 2, 4]
    assert_alike(used.propose(other, budget), attached(model).start().propose(other, budget))


def test_probabilities_are_those_of_the_model() -> None:
    model = wide()
    tree = attached(model).start().propose(TEXT, Allowance(nodes=30, depth=3))
    for node, likelihood in enumerate(tree.probabilities):
        path = [node]
        while tree.parents[path[0]] >= 0:
            path.insert(0, tree.parents[path[0]])
        ids = torch.tensor([TEXT + [tree.tokens[each] for each in path]])
        logs = model(ids).logits[0].log_softmax(-1)[2:-1]
        assert likelihood == pytest.approx(logs.gather(1, ids[0, 3:, None]).sum().exp().item(), rel=1e-4)
    assert list(tree.parents).count(-1) > 1
    assert max(tree.depths) == 3


def test_temperature_spreads_the_probabilities() -> None:
    model = wide()
    cold, warm = (attached(model, temperature=each).start().propose(TEXT, Allowance(9, 1)) for each in (1.0, 2.0))
    assert warm.probabilities[0] < cold.probabilities[0]
    scaled = (model(torch.tensor([TEXT])).logits[0, -1] / 2).softmax(-1)
    assert warm.probabilities == pytest.approx([scaled[token].item() for token in warm.tokens])


def test_no_more_nodes_or_deeper_ones_than_the_budget() -> None:
    drafter = attached(wide()).start()
    tree = drafter.propose(TEXT, Allowance(nodes=7, depth=2))
    assert (len(tree), max(tree.depths)) == (7, 2)
    assert drafter.propose(TEXT, Allowance(nodes=0, depth=2)) == drafter.propose(TEXT, Allowance(nodes=7, depth=0)) == EMPTY


def test_a_round_that_costs_more_than_it_adds_is_not_run() -> None:
    draft = attached(wide())
    draft.start().propose(TEXT, Allowance(nodes=30, depth=4))
    free, dear = (draft.start().propose(TEXT, Allowance(30, 4, token_s=each)) for each in (1e9, 1e-9))
    assert (max(free.depths), max(dear.depths)) == (4, 1)


def test_nothing_is_guessed_past_the_positions_of_the_model() -> None:
    drafter = attached(wide(max_position_embeddings=5)).start()
    assert max(drafter.propose(TEXT, Allowance(nodes=30, depth=9)).depths) == 2
    assert drafter.propose([3, 5, 7, 1, 2], Allowance(nodes=30, depth=9)) == EMPTY


def test_no_random_number_is_drawn() -> None:
    before = torch.get_rng_state()
    attached(wide()).start().propose(TEXT, Allowance(nodes=30, depth=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_texts_do_not_mix() -> None:
    draft, budget = attached(wide()), Allowance(nodes=12, depth=4)
    first, second = draft.start(), draft.start()
    first.propose(TEXT, budget)
    second.propose([9, 8], budget)
    assert_alike(first.propose([3, 5, 7, 1], budget), draft.start().propose([3, 5, 7, 1], budget))


def assert_alike(tree: Tree, other: Tree) -> None:
    assert (tree.tokens, tree.parents) == (other.tokens, other.parents)
    assert tree.probabilities == pytest.approx(other.probabilities, rel=1e-4)


def noisy(model: Any) -> Any:
    """The model with other weights: each with noise of half its size."""
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += weight.data.abs().mean() * torch.randn_like(weight) / 2
    return model


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "mistral", "deepseek_v3", "llama4", "bloom", "qwen3_next"])
def test_families_guess_their_own_tokens_past_their_windows(family: str) -> None:
    model = families.build(family)
    draft = attached(model, temperature=1e-4)  # so that the likeliest token is all but certain
    assert passes(draft, answer(model, 25), Allowance(nodes=4, depth=4)) == [4] * 5


def test_a_model_that_takes_no_masks_of_trees_guesses_chains() -> None:
    assert attached(families.build("bloom")).start().propose(TEXT, Allowance(nodes=6, depth=4)).is_chain


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(DraftError, match="in training mode"):
        attached(tiny.llama().train())


def test_tokens_past_the_vocabulary_of_either_are_not_guessed() -> None:
    padded, shorter = wide(vocab_size=40), wide()
    tree = attached(padded, shorter).start().propose(TEXT, Allowance(nodes=300, depth=3))
    assert max(tree.tokens) < 32
    first = [probability for probability, parent in zip(tree.probabilities, tree.parents, strict=True) if parent < 0]
    logits = padded(torch.tensor([TEXT])).logits[0, -1, :32]
    assert first == pytest.approx(logits.softmax(-1).topk(8).values.tolist(), rel=1e-4)
    assert attached(shorter, padded).start().propose([39, 38, 37], Allowance(nodes=3, depth=1))


def test_another_tokenizer_is_an_error_that_shows_which_tokens_differ() -> None:
    words = [f"w{number}" for number in range(32)]
    other = [*words[:2], "x", *words[3:6], "y", *words[7:]]
    with pytest.raises(DraftError, match=r"2 of 32 tokens differ \(2 is 'x', not 'w2'; 6 is 'y', not 'w6'\); take a smaller"):
        DraftModel(with_words(other)).attach(TargetModel(tiny.llama(), Words(words)))


def test_a_long_list_of_differing_tokens_is_cut() -> None:
    words = [f"w{number}" for number in range(32)]
    with pytest.raises(DraftError, match=r"3 is 'w28', not 'w3' \.\.\.\)"):
        DraftModel(with_words(words[::-1])).attach(TargetModel(tiny.llama(), Words(words)))


def test_special_tokens_may_have_other_names_and_one_may_have_more_tokens() -> None:
    words = [f"w{number}" for number in range(30)]
    draft = DraftModel(with_words([*words, "<pad>"], ("<pad>",)))
    draft.attach(TargetModel(tiny.llama(), Words([*words, "<reserved>", "<tool>"], ("<reserved>", "<tool>"))))
    assert draft.start().propose(TEXT, Allowance(nodes=3, depth=1))


def test_without_tokenizers_the_sizes_must_be_alike(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="rabbit_engine"):
        attached(tiny.llama(vocab_size=64), tiny.llama())
    assert "not known to have the same tokenizer: only the sizes match" in caplog.text
    with pytest.raises(DraftError, match="draft LlamaForCausalLM has 1000 tokens, target has 32"):
        attached(tiny.llama(vocab_size=1000), tiny.llama())


def test_invalid_drafts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="DraftModel takes a folder, a repo id or a causal language model, not a int"):
        DraftModel(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="nodes=0 is not a number of guesses"):
        DraftModel("folder", nodes=0)
    with pytest.raises(ConfigurationError, match="temperature=0 is not a number above 0"):
        DraftModel("folder", temperature=0)
    with pytest.raises(ConfigurationError, match="compression='4bit' is for models that are loaded by name"):
        DraftModel(tiny.llama(), compression="4bit")
    with pytest.raises(DraftError, match="the draft folder is not attached to a model: pass it as speculate="):
        DraftModel("some/folder").start()


def test_memory_of_the_draft_is_that_of_its_weights() -> None:
    model = tiny.llama()
    draft = attached(model, nodes=5)
    assert (draft.nbytes, draft.nodes, draft.name) == (model.get_memory_footprint(), 5, "draft LlamaForCausalLM")


def test_a_text_that_was_read_before_is_not_read_again() -> None:
    model: Any = wide()
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    drafter = attached(model).start()
    widths.clear()
    drafter.read(TEXT)
    drafter.propose(TEXT, Allowance(nodes=3, depth=1))
    assert widths == [2, 1]


def test_guesses_that_no_other_can_follow_into_the_tree_are_not_asked_for_more() -> None:
    model: Any = wide()
    drafter = attached(model).start()
    drafter.read(TEXT)
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    assert len(drafter.propose(TEXT, Allowance(nodes=1, depth=9))) == 1
    assert len(steps) == 1
