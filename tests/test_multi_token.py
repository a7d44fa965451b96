"""A checkpoint's multi-token heads guess what transformers' own do, streamed, and the text stays the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from heads import IGNORED, save_with_heads
from tiny import words

from rabbit_engine import AutoModel, Lookup, Merged, MultiTokenHeads, Session
from rabbit_engine.decoding import ROOT, Allowance, Tree
from rabbit_engine.errors import ConfigurationError, DraftError
from rabbit_engine.transformers_bridge.multi_token import can_run_heads

pytestmark = pytest.mark.skipif(not can_run_heads(), reason="this release of transformers does not run heads one at a time")

KINDS = [("mellum", 1), ("deepseek_v3", 1), ("glm4_moe", 2)]
TEXT = torch.randint(5, 90, (1, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, int], Path] = {}

    def folder(family: str, heads: int = 1) -> Path:
        if (family, heads) not in made:
            made[family, heads] = save_with_heads(family, tmp_path_factory.mktemp(family), heads)
        return made[family, heads]

    return folder


class Recorded:
    """Multi-token heads, and the trees that they proposed by the length of the text."""

    def __init__(self, nodes: int) -> None:
        self._heads, self.trees = MultiTokenHeads(nodes=nodes), dict[int, Tree]()
        self.name, self.nodes, self.attach = self._heads.name, nodes, self._heads.attach

    @property
    def nbytes(self) -> int:
        return self._heads.nbytes

    def start(self) -> Any:
        drafter: Any = self._heads.start()
        propose = drafter.propose

        def recorded(ids: list[int], budget: Allowance) -> Tree:
            self.trees[len(ids)] = found = propose(ids, budget)
            return found

        drafter.propose = recorded
        return drafter


@pytest.mark.parametrize(("family", "heads"), KINDS)
def test_heads_guess_what_those_of_transformers_do(
    family: str, heads: int, with_heads: Any, plain: Any, streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_heads(family, heads)
    guesses: dict[int, list[int]] = {}
    from transformers.modeling_layers import MtpModel

    native = MtpModel.forward

    def forward(self: Any, *args: Any, full_input_ids: torch.Tensor, **keywords: Any) -> Any:
        found = native(self, *args, full_input_ids=full_input_ids, **keywords)
        guesses[full_input_ids.shape[1]] = found[0][0].tolist()
        return found

    monkeypatch.setattr(MtpModel, "forward", forward)
    oracle = plain(folder)
    oracle._keys_to_ignore_on_load_unexpected = IGNORED
    expected = oracle.generate(TEXT, max_new_tokens=16, do_sample=False, use_mtp=True)
    draft = Recorded(nodes=64)
    assert torch.equal(streamed(folder).generate(TEXT, max_new_tokens=16, do_sample=False, speculate=draft), expected)
    both = sorted(set(guesses) & set(draft.trees))
    assert len(both) > 8
    for length in both:
        found = _likeliest(draft.trees[length])[:heads]
        assert found == guesses[length][: len(found)]


def _likeliest(tree: Tree) -> list[int]:
    """The likeliest child of each node from the root down."""
    line, at = list[int](), ROOT
    while children := [node for node, parent in enumerate(tree.parents) if parent == at]:
        at = max(children, key=tree.probabilities.__getitem__)
        line.append(tree.tokens[at])
    return line


@pytest.mark.parametrize(("family", "heads"), KINDS)
@pytest.mark.parametrize("drawn", [False, True])
def test_the_text_stays_the_same(
    family: str, heads: int, drawn: bool, with_heads: Any, streamed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, draft = streamed(with_heads(family, heads)), Merged(Lookup(), MultiTokenHeads(), nodes=8)
    found = []
    for speculate in (None, draft):
        torch.manual_seed(3)
        found.append(model.generate(TEXT, max_new_tokens=16, do_sample=drawn, speculate=speculate))
    assert torch.equal(*found)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # heads have their place
    assert model.profile.speculation.drafted > 30


@pytest.mark.parametrize(("family", "heads"), KINDS)
def test_guesses_leave_no_trace_in_what_the_heads_have_read(family: str, heads: int, with_heads: Any, streamed: Any) -> None:
    model, draft = streamed(with_heads(family, heads)), MultiTokenHeads(nodes=8)
    draft.attach(model)
    states, ids, budget = torch.randn(30, 32), TEXT[0].tolist() * 2, Allowance(8, 6)
    used = draft.start()
    used.see(states[:12])
    used.read(ids[:13])
    for length, grown in ((13, 14), (14, 17), (17, 25), (25, 31)):  # a pass has accepted so many guesses
        used.propose(ids[:length], budget)
        used.see(states[length - 1 : grown - 1])
    new = draft.start()
    new.see(states)
    first, second = (drafter.propose(ids[:31], budget) for drafter in (used, new))
    assert first.tokens == second.tokens
    assert first.probabilities == pytest.approx(second.probabilities, rel=1e-4)


def test_heads_are_set_streaming_once_and_their_memory_is_in_the_plan(with_heads: Any, streamed: Any) -> None:
    folder, draft = with_heads("glm4_moe"), MultiTokenHeads(nodes=2)
    alone = streamed(folder)
    with AutoModel.from_pretrained(folder, device="cpu", max_memory={"cpu": 400_000}, speculate=draft) as model:
        assert 0 < draft.nbytes == model.plan.draft_bytes < alone.plan.device_bytes
        assert torch.equal(model.generate(TEXT, max_new_tokens=8), alone.generate(TEXT, max_new_tokens=8))
        memory = draft.nbytes
        model.generate(TEXT, max_new_tokens=8)
        assert draft.nbytes == memory
    with pytest.raises(DraftError, match="were closed, with the model they belong to"):
        draft.start()


def test_use_mtp_means_the_streamed_heads(with_heads: Any, streamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(with_heads("mellum"))
    expected = model.generate(TEXT, max_new_tokens=12)
    monkeypatch.setattr("transformers.modeling_layers.MtpModel.from_pretrained", None)
    assert torch.equal(model.generate(TEXT, max_new_tokens=12, use_mtp=True), expected)
    assert model.profile.speculation.passes == 11
    model.generation_config.use_mtp = True
    assert torch.equal(model.generate(TEXT, max_new_tokens=12), expected)
    assert model.profile.speculation.passes == 22


def test_texts_of_a_session_have_heads_of_their_own(with_heads: Any, streamed: Any) -> None:
    model = streamed(with_heads("deepseek_v3"))
    model.tokenizer = words(96)
    texts = [TEXT[0, :length].tolist() for length in (5, 12, 20)]
    expected = [model.generate(torch.tensor([text]), max_new_tokens=10)[0, len(text) :].tolist() for text in texts]
    with Session(model, speculate=MultiTokenHeads(nodes=3)) as session:
        replies = session.generate(texts, max_new_tokens=10)
    assert [list(reply.tokens) for reply in replies] == expected
    assert model.profile.speculation.drafted > 30


def test_a_checkpoint_without_heads_is_refused(checkpoint: Any, streamed: Any) -> None:
    with pytest.raises(DraftError, match=r"has no multi-token heads: its config names none \(num_mtp_layers\)"):
        streamed(checkpoint("llama")).generate(TEXT, use_mtp=True)
    with pytest.raises(DraftError, match=r"heads of .* cannot be streamed from its files: .* lacks weights"):
        streamed(checkpoint("deepseek_v3")).generate(TEXT, speculate=MultiTokenHeads())
    with pytest.raises(ConfigurationError, match="temperature=0 is not a number above 0"):
        MultiTokenHeads(temperature=0)


def test_auto_takes_heads_where_they_pay(with_heads: Any, rabbit: Any) -> None:
    folder = with_heads("glm4_moe")
    asked = ("plan", folder, "--device", "cpu", "--disk-rate", "1MB/s", "--speculate", "-m")
    assert "1.8 tokens a pass assumed" in rabbit(*asked, "400kB").out
    assert "with lookup" in rabbit(*asked, "100MB").out
    named = rabbit("plan", folder, "--device", "cpu", "-m", "400kB", "--draft", "heads").out
    assert "with the draft: about" in named
    assert (
        "--draft heads uses the checkpoint's own files"
        in rabbit("plan", folder, "--draft", "heads", "--draft-compression", "4bit").err
    )
