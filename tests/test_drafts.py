"""Drafts loaded by name: whole in memory, within the budget of the model that they guess for."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import words

from rabbit_engine import AutoModel, DraftModel, Lookup, Merged, SelfDraft, Session
from rabbit_engine.decoding import Allowance, Draft
from rabbit_engine.errors import BudgetError, CheckpointNotFoundError, ConfigurationError, DraftError
from rabbit_engine.model import read_settings
from rabbit_engine.model.choosing import choose_draft
from rabbit_engine.model.drafts import DraftLoader
from rabbit_engine.model.loading import load
from rabbit_engine.model.settings import LoadSettings
from rabbit_engine.planning.drafting import DraftGain
from rabbit_engine.utils.speeds import Speeds

TEXT = [3, 5, 7]


def loaded(folder: Path, draft: Any = None, **keywords: Any) -> Any:
    return load(folder, replace(read_settings({"device": "cpu", **keywords}), speculate=draft))


def smallest(folder: Path) -> int:
    with pytest.raises(BudgetError) as found:
        loaded(folder, max_memory={"cpu": 1})
    return found.value.smallest_bytes


def test_a_named_draft_is_loaded_whole_and_its_memory_is_taken_from_the_budget(checkpoint: Callable[[str], Path]) -> None:
    target, other = checkpoint("qwen3"), checkpoint("qwen2")
    budget = smallest(target) + 150_000
    draft = DraftModel(other)
    with loaded(target, draft, max_memory={"cpu": budget}) as model, loaded(target, max_memory={"cpu": budget}) as alone:
        assert draft.nbytes == model.plan.draft_bytes > 50_000
        assert model.plan.held_bytes("cpu") <= budget
        assert model.plan.budget.weights_bytes == budget - draft.nbytes
        assert model.plan.resident_bytes < alone.plan.resident_bytes
        assert dict(model.plan.rows())["draft"].startswith(f"{draft.nbytes / 1000:.2f} kB of {budget / 1000:.2f} kB on cpu")
        assert len(draft.start().propose(TEXT, Allowance(nodes=8, depth=2))) == 8


@pytest.mark.parametrize("load_as", [None, "8bit"], ids=["other", "copy"])
def test_a_draft_takes_no_memory_for_its_embedding(load_as: str | None, own_checkpoint: Callable[..., Path]) -> None:
    folder = own_checkpoint("llama", tie_word_embeddings=False)
    draft = DraftModel(folder) if load_as is None else SelfDraft(load_as)
    with loaded(folder, draft, max_memory={"cpu": 10**7}), loaded(folder, compression=load_as) as whole:
        embedding = whole.get_input_embeddings().weight.nbytes
        assert draft.nbytes == whole.plan.device_bytes - embedding
        expected = attached(whole).propose(TEXT, Allowance(nodes=8, depth=2))
        assert draft.start().propose(TEXT, Allowance(nodes=8, depth=2)) == expected


def attached(model: Any) -> Any:
    draft = DraftModel(model)
    draft.attach(model)
    return draft.start()


@pytest.mark.parametrize("kind", ["missing", "without weights", "without config"])
def test_a_draft_that_cannot_be_loaded_is_an_error_that_names_it_as_the_draft(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path, rabbit: Any
) -> None:
    target, other = checkpoint("qwen3"), tmp_path / "other"
    if kind != "missing":
        other.mkdir()
    if kind == "without weights":
        shutil.copy(checkpoint("qwen2") / "config.json", other)
    words = f"cannot load the draft {other}, which must be a folder with weights, a .gguf file or a repo id: {other} "
    with pytest.raises(DraftError, match=re.escape(words)) as found:
        loaded(target, DraftModel(other))
    assert isinstance(found.value.__cause__, CheckpointNotFoundError)
    refused = rabbit("plan", target, "--device", "cpu", "--draft", other)
    assert refused.code
    assert re.search("error: --draft: .* does not exist|error: cannot load the draft", refused.err)


def test_a_copy_that_cannot_be_made_is_an_error_that_names_it_as_the_draft(own_checkpoint: Callable[..., Path]) -> None:
    folder = own_checkpoint("llama")
    (folder / "rabbit_shards").touch()
    with pytest.raises(
        DraftError, match=rf"cannot load the 4bit copy of {re.escape(str(folder))} as its draft: .*cannot be written"
    ):
        loaded(folder, SelfDraft())


def test_a_draft_larger_than_the_budget_is_an_error_with_both_sizes(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(DraftError, match=r"draft .*qwen2\S* needs \d+\.\d+ kB on cpu, and has 60.00 kB: take a smaller one"):
        loaded(checkpoint("qwen3"), DraftModel(checkpoint("qwen2")), max_memory={"cpu": 60_000})


def test_a_draft_that_leaves_too_little_is_an_error_that_says_how_much_is_missing(checkpoint: Callable[[str], Path]) -> None:
    target = checkpoint("qwen3")
    draft = DraftModel(checkpoint("qwen2"))
    with pytest.raises(DraftError, match=rf"draft qwen2\S* takes .* on cpu; .* {10_000 / 1000:.2f} kB more than max_memory"):
        loaded(target, draft, max_memory={"cpu": smallest(target) + draft_bytes(checkpoint("qwen2")) - 10_000})


def draft_bytes(folder: Path) -> int:
    with loaded(folder) as model:
        return int(model.plan.device_bytes)


def test_a_draft_given_later_uses_memory_that_is_free(checkpoint: Callable[[str], Path]) -> None:
    target = checkpoint("qwen3")
    with loaded(target, max_memory={"cpu": smallest(target)}) as model:
        draft = DraftModel(checkpoint("qwen2"))
        draft.attach(model)
        assert draft.nbytes > 50_000
        assert draft.start().propose(TEXT, Allowance(nodes=3, depth=1))


def test_a_named_draft_is_closed_with_its_model_and_loaded_again_for_the_next(checkpoint: Callable[[str], Path]) -> None:
    draft = DraftModel(checkpoint("qwen2"))
    for _ in range(2):
        with loaded(checkpoint("qwen3"), draft, max_memory={"cpu": 10**7}):
            assert draft.start().propose(TEXT, Allowance(nodes=3, depth=1))
        with pytest.raises(DraftError, match="closed"):
            draft.start()


def test_a_copy_in_eight_bits_guesses_nearly_as_the_model(
    own_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder, draft = own_checkpoint("llama"), SelfDraft("8bit")
    with caplog.at_level(logging.INFO, "rabbit_engine"), loaded(folder, draft, max_memory={"cpu": 10**6}) as model:
        logits = model(torch.tensor([TEXT])).logits[0, -1]
        tree = draft.start().propose(TEXT, Allowance(nodes=5, depth=1))
    assert tree.probabilities == pytest.approx(logits.softmax(-1)[list(tree.tokens)].tolist(), rel=0.05)
    assert "as a draft for" in caplog.text
    assert "writing " in caplog.text
    assert (draft.name, model.plan.draft_bytes) == ("8bit draft", draft.nbytes)


def test_a_copy_that_was_made_is_used_again(own_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    folder = own_checkpoint("llama")
    loaded(folder, compression="4bit").close()
    with caplog.at_level(logging.INFO, "rabbit_engine"), loaded(folder, SelfDraft(), max_memory={"cpu": 10**6}):
        assert "writing " not in caplog.text


def test_a_model_in_four_bits_needs_no_copy_of_itself(own_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(DraftError, match="is stored in 4bit already"):
        loaded(own_checkpoint("llama"), SelfDraft(), compression="4bit")


def test_an_unknown_compression_is_an_error() -> None:
    for make in (lambda: SelfDraft("3bit"), lambda: DraftModel("folder", compression="3bit")):
        with pytest.raises(ConfigurationError, match="compression='3bit' is not one of"):
            make()


def prompt() -> torch.Tensor:
    return torch.randint(5, 90, (1, 13), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}], ids=["greedy", "drawn"])
def test_a_copy_as_the_default_draft_gives_the_same_text_in_fewer_passes(
    own_checkpoint: Callable[..., Path], how: dict[str, Any]
) -> None:
    folder = own_checkpoint("llama")
    with AutoModel.from_pretrained(folder, device="cpu", speculate=SelfDraft("8bit", nodes=48)) as model:

        def generate(**keywords: Any) -> tuple[list[int], int]:
            torch.manual_seed(0)
            before = model.profile.passes
            found: Any = model.generate(prompt(), max_new_tokens=24, pad_token_id=0, **how, **keywords)
            return found[0].tolist(), model.profile.passes - before

        generate()  # the first text tries out whether several tokens a pass are right
        (expected, plain), (found, fewer) = generate(speculate=None), generate()
    assert found == expected
    assert fewer < plain


def test_texts_of_a_session_have_caches_of_their_own_in_the_draft(checkpoint: Callable[[str], Path], streamed: Any) -> None:
    folder, draft = checkpoint("llama"), DraftModel(checkpoint("llama"), nodes=64, temperature=0.1)
    model = streamed(folder)
    model.tokenizer = words(96)
    prompts = [(prompt() + number)[0].tolist() for number in range(3)]
    options = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    with Session(model) as session:
        expected = [list(reply.tokens) for reply in session.generate(prompts, **options)]
    with Session(model, speculate=draft) as session:
        before = model.profile.passes
        found = [list(reply.tokens) for reply in session.generate(prompts, **options)]
    assert found == expected
    assert model.profile.passes - before < 20


def test_a_plan_with_a_draft_says_what_it_takes_and_gains(
    own_checkpoint: Callable[..., Path], checkpoint: Callable[[str], Path], rabbit: Any
) -> None:
    target, other = own_checkpoint("qwen3", num_hidden_layers=9), checkpoint("qwen2")
    budget = smallest(target) + draft_bytes(other) + 10_000
    memory = ("--device", "cpu", "--max-memory", str(budget), "--disk-rate", "1MB/s")
    shown = " ".join(rabbit("plan", target, *memory, "--draft", other).out.replace("│", "").split())
    assert f"{draft_bytes(other) / 1000:.2f} kB of {budget / 1000:.2f} kB on cpu" in shown
    assert "tokens a pass assumed)" in shown
    assert "leave it out" not in shown
    refused = rabbit("plan", target, "--device", "cpu", "--max-memory", str(smallest(target)), "--draft", "self")
    assert refused.code
    assert "or raise --max-memory" in " ".join(refused.err.split())


@pytest.mark.parametrize(("plain_s", "pass_s", "guesses_s", "pays"), [(2.0, 2.4, 1.2, True), (2.0, 2.4, 12.0, False)])
def test_a_draft_pays_if_tokens_come_sooner(plain_s: float, pass_s: float, guesses_s: float, pays: bool) -> None:
    gain = DraftGain(plain_s, pass_s, guesses_s, tokens=4.0)
    assert gain.token_s == pytest.approx((pass_s + guesses_s) / 4)
    assert (gain.pays, "leave it out" in str(gain)) == (pays, not pays)


def test_a_draft_gains_nothing_where_everything_fits() -> None:
    assert str(DraftGain(0.0, 0.0, 0.1)) == "everything fits without one: leave it out"


def _choose(folder: Path, settings: LoadSettings) -> Draft:
    return choose_draft(DraftLoader(str(folder), settings, load))


def test_auto_takes_a_copy_in_four_bits_where_one_was_split_and_pays(own_checkpoint: Callable[..., Path], rabbit: Any) -> None:
    folder = own_checkpoint("llama", num_hidden_layers=9, hidden_size=128, intermediate_size=512)
    settings = read_settings({"device": "cpu", "max_memory": {"cpu": 7_000_000}})
    slow, fast = (replace(settings, stream=replace(settings.stream, speeds=Speeds(disk=rate, link=0.0))) for rate in (1e6, 1e15))
    assert _choose(folder, slow).name == "lookup"
    assert rabbit("split", folder, "--compression", "4bit").code == 0
    assert _choose(folder, slow).name == Merged(Lookup(), SelfDraft("4bit")).name
    assert _choose(folder, fast).name == "lookup"
    planned = rabbit("plan", folder, "--device", "cpu", "-m", "7MB", "--disk-rate", "1MB/s", "--speculate").out
    assert "with the draft: about" in planned
    tight = replace(slow, stream=replace(slow.stream, device_budget_bytes=smallest(folder)))
    assert _choose(folder, tight).name == "lookup"
    with load(folder, replace(slow, speculate="auto")) as model:
        assert model.plan.draft_bytes > 0
        expected, found = (model.generate(torch.tensor([TEXT]), max_new_tokens=12, speculate=how) for how in (None, "auto"))
    assert torch.equal(found, expected)
