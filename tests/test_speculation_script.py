"""The benchmark of speculation: its questions, its drafts, and what it counts."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rabbit_engine import DraftModel, Lookup, Merged

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import benchmark_speculation
from benchmark_speculation import Lane, Question


class Words:
    """A tokenizer with a token for each word."""

    def apply_chat_template(self, chat: list[dict[str, str]], **keywords: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, len(chat[0]["content"].split()), dtype=torch.int64)}


def test_there_are_three_questions_of_each_kind_and_texts_to_summarise_are_long() -> None:
    asked = list(benchmark_speculation.questions(Words(), ()))
    assert Counter(question.kind for question in asked) == {"chat": 3, "code": 3, "summary": 3, "json": 3}
    assert all(question.ids.shape[1] > 200 for question in asked if question.kind == "summary")
    assert {question.kind for question in benchmark_speculation.questions(Words(), ["json"])} == {"json"}


@pytest.mark.parametrize(
    ("draft", "nodes", "kind"), [("lookup", "16", Lookup), ("text", "auto", Lookup), ("lookup+text", "64", Merged)]
)
def test_a_lane_has_the_draft_that_its_name_says(draft: str, nodes: str, kind: type) -> None:
    made = Lane(draft, nodes).new_draft()
    assert isinstance(made, kind)
    assert made.nodes == (None if nodes == "auto" else int(nodes))


def test_other_names_are_folders_of_models(tmp_path: Path) -> None:
    merged = Lane(f"lookup+{tmp_path}", "8").new_draft()
    assert isinstance(merged, Merged)
    assert [type(draft) for draft in merged.drafts] == [Lookup, DraftModel]


def test_lanes_answer_as_plain_decoding_does_and_count_their_passes(checkpoint: Any, streamed: Any) -> None:
    model = streamed(checkpoint("llama"), dtype="float32")
    asked = [Question(kind, torch.tensor([[seed, 7, 8, 9] * 4])) for kind, seed in (("chat", 5), ("json", 6))]
    lane = Lane("lookup", "16")
    plain = benchmark_speculation.measure(model, [lane], asked, 24)
    for found in (plain, lane):
        whole = found.counts["all"]
        assert (whole.tokens, whole.texts, whole.equal) == (46, 2, 2)
        assert whole.passes == found.counts["chat"].passes + found.counts["json"].passes
    assert plain.counts["all"].tokens_a_pass == 1
    assert lane.counts["all"].tokens_a_pass > 1.5
    assert benchmark_speculation.as_record(lane, {}).conditions["tokens_a_pass"]["all"] > 1.5
