"""Drafts that users write: what they propose is checked, and cannot change a text."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from rabbit_engine import DraftModel, Lookup, Merged
from rabbit_engine.decoding import ROOT, Tree
from rabbit_engine.errors import ConfigurationError, DraftError

IDS = torch.tensor([[3, 5, 7]])
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def llama(checkpoint: Any, streamed: Any) -> Any:
    return streamed(checkpoint("llama"), dtype="float32")


class Proposes:
    """A draft, and its own drafter, that proposes the same each time."""

    name, nodes, nbytes = "my draft", 8, 0

    def __init__(self, found: Any) -> None:
        self.found = found

    def attach(self, target: Any) -> None:
        pass

    def start(self) -> Any:
        return self

    def read(self, ids: Any) -> None:
        pass

    def propose(self, ids: Any, budget: Any) -> Any:
        return self.found

    def accepted(self, verdict: Any) -> None:
        pass

    def close(self) -> None:
        pass


WRONG = {
    "a value of type list, not a Tree": [5],
    "2 tokens with 1 parents": Tree((5, 6), (ROOT,), (0.5, 0.5)),
    "node 0 after node 1": Tree((5, 6), (1, ROOT), (0.5, 0.5)),
    "node 0 after node -2": Tree((5,), (-2,), (0.5,)),
    "node 1 with probability 0.6": Tree((5, 6), (ROOT, 0), (0.5, 0.6)),
    "node 0 with probability nan": Tree((5,), (ROOT,), (float("nan"),)),
    "token 5 twice after node -1": Tree((5, 5), (ROOT, ROOT), (0.5, 0.4)),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_tree_is_an_error_that_names_the_draft_and_leaves_a_usable_model(words: str, llama: Any) -> None:
    with pytest.raises(DraftError, match=re.escape(f"my draft proposed {words}")):
        llama.generate(IDS, speculate=Proposes(WRONG[words]), **GREEDY)
    assert torch.equal(llama.generate(IDS, **GREEDY), llama.generate(IDS, speculate="auto", **GREEDY))


def test_guesses_outside_of_the_vocabulary_are_left_out(llama: Any) -> None:
    expected = llama.generate(IDS, **GREEDY)
    vocabulary = llama.config.vocab_size
    draft = Proposes(Tree((vocabulary, -1, 7, 8), (ROOT, ROOT, 0, ROOT), (0.3, 0.3, 0.2, 0.1)))
    before = llama.profile.speculation
    assert torch.equal(llama.generate(IDS, speculate=draft, **GREEDY), expected)
    counts = llama.profile.speculation.since(before)
    assert counts.nodes == counts.passes - 1 > 0  # the last pass has no room for a guess


@pytest.mark.parametrize("nodes", [0, -1, True, 4.0, "4"])
def test_a_wrong_number_of_nodes_is_refused_by_every_draft(nodes: Any) -> None:
    for draft in (Lookup, lambda nodes: DraftModel("x", nodes=nodes), lambda nodes: Merged(Lookup(), Lookup(), nodes=nodes)):
        with pytest.raises(ConfigurationError, match=f"nodes={nodes!r} is not a number of guesses"):
            draft(nodes=nodes)
