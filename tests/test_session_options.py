"""Options of a session: one that is out of range, of the wrong type or unknown is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rabbit_engine import Session, errors
from rabbit_engine.sessions import Options


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"stop": ("",)},
        {"logprobs": 21},
        {"max_new_tokens": 0},
        {"frequency_penalty": 3},
        {"logit_bias": {1: 101}},
        {"seed": 2**64},
        {"stop": (1,)},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError):
        Options(**wrong)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("stop_strings", ["x"], "use stop"),
        ("do_sample", False, "temperature=0"),
        ("eos_token_id", 5, "stop_token_ids"),
        ("suppress_tokens", [5], "logit_bias"),
        ("max_completion_tokens", 5, "max_new_tokens"),
        ("n", 2, "several times"),
        ("best_of", 2, "several times"),
        ("num_beams", 4, "model.generate"),
        ("guidance_scale", 2.0, "model.generate"),
        ("logits_processor", [1], "model.generate"),
        ("stopping_criteria", [1], "use stop"),
        ("assistant_model", 1, "model.generate"),
    ],
)
def test_an_option_of_generate_is_refused_with_what_to_use(session: Session, name: str, value: Any, instead: str) -> None:
    for ask in (session.chat, session.generate):
        with pytest.raises(errors.ConfigurationError, match=rf"^{name} is not an option of a session: .*{instead}"):
            ask("Hi", **{name: value}, max_new_tokens=1)


def test_variables_that_the_template_reads_pass_and_those_without_end_do_not(session: Session, monkeypatch: Any) -> None:
    text = str(session.model.tokenizer.chat_template)
    monkeypatch.setattr(session.model.tokenizer, "chat_template", text + "{% if do_sample %}{{ 'more' }}{% endif %}{{ '\\n' }}")
    longer, plain = (session.request("Hi", do_sample=given, max_new_tokens=1).prompt.ids for given in (True, False))
    assert len(longer) > len(plain)
    with pytest.raises(errors.ConfigurationError, match=r"^n is not an option"):
        session.request("Hi", n=2)
    with pytest.raises(errors.ConfigurationError, match="100000 variables"):
        session.request("Hi", **{f"x{index}": 1 for index in range(100_000)})


@pytest.mark.parametrize(
    "option", [{"logit_bias": 5}, {"logit_bias": {"x": 1}}, {"seed": 1.5}, {"max_new_tokens": 1.5}, {"ignore_eos": "x"}]
)
def test_an_option_of_the_wrong_type_is_named(option: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigurationError, match=next(iter(option))):
        Options(**option)
