"""What a session may not change: the caller's model, tokenizer and generation config."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import talking
import torch
from torch import nn

from rabbit_engine import AutoModel, Session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking.save(tmp_path_factory.mktemp("talking"), pad_token_id=None)


@pytest.fixture
def model(folder: Path) -> Any:
    with AutoModel.from_pretrained(folder, device="cpu") as model:
        yield model


def state_of(tokenizer: Any) -> dict[str, Any]:
    own = {name: value for name, value in vars(tokenizer).items() if value is not tokenizer.backend_tokenizer}
    return copy.deepcopy(
        {
            **own,
            "padding": tokenizer.padding_side,
            "template": tokenizer.chat_template,
            "rust": tokenizer.backend_tokenizer.to_str(),
        }
    )


def forwards(model: Any) -> list[Any]:
    return [module.__dict__.get("forward") for module in model.modules()]


def test_tokenizer_generation_config_and_config_stay_as_they_are(model: Any) -> None:
    model.tokenizer.pad_token = None
    model.tokenizer.padding_side, model.tokenizer.model_max_length = "right", 5
    before = state_of(model.tokenizer), model.generation_config.to_dict(), model.config.to_dict()
    with Session(model, max_new_tokens=4) as session:
        session.chat("abcdefgh", stop="x", seed=1, logit_bias={5: -3})
        session.generate(["abcdefgh", [5, 6]], temperature=0)
    assert (state_of(model.tokenizer), model.generation_config.to_dict(), model.config.to_dict()) == before


@pytest.mark.parametrize("first", [0, 1])
def test_layers_have_their_own_forward_back_after_the_last_session_that_shared_them(model: Any, first: int) -> None:
    before, ids = forwards(model), torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    sessions = [Session(model, exact=False), Session(model, exact=False)]
    assert forwards(model) != before
    sessions[first].close()
    assert forwards(model) != before
    assert sessions[1 - first].generate(["abc", "def"], max_new_tokens=3)
    sessions[1 - first].close()
    sessions[1 - first].close()
    assert forwards(model) == before
    assert torch.equal(model(ids).logits, expected)


def test_a_forward_that_was_replaced_meanwhile_is_left_to_who_replaced_it(model: Any) -> None:
    linear = next(module for module in model.modules() if type(module) is nn.Linear)
    with Session(model, exact=False):
        other = linear.forward = lambda states: states
    assert linear.forward is other


def test_a_session_that_cannot_begin_leaves_the_layers_alone(model: Any, monkeypatch: Any) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = forwards(model)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            Session(model, exact=False)
    assert forwards(model) == before
