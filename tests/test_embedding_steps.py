"""What sentence-transformers does after pooling, and prompts that pooling leaves out: the values of its own modules.

scripts/check_clients.py compares with sentence-transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tasks import LONG, TEXTS, encoded, open_both
from test_tasks import SIZES
from tiny import pieces_of_words
from torch import nn

from rabbit_engine import Session, errors

BERT = ("BertModel", "BertConfig", SIZES)
MODULES = "sentence_transformers.models"


def steps(*kinds: str, pooling: dict[str, Any] | None = None) -> dict[str, Any]:
    """modules.json of a model, its pooling and these steps, and the file of the pooling."""
    every = ["Transformer", "Pooling", *kinds]
    rows = [
        {"path": f"{index}_{kind}" if index else "", "type": kind if "." in kind else f"{MODULES}.{kind}"}
        for index, kind in enumerate(every)
    ]
    return {"modules.json": rows, "1_Pooling/config.json": pooling or {"pooling_mode_mean_tokens": True}}


def dense(inner: int, outer: int, activation: str | None = None, **more: Any) -> dict[str, Any]:
    named = {} if activation is None else {"activation_function": f"torch.nn.modules.{activation}"}
    return {"in_features": inner, "out_features": outer, "bias": True, **named, **more}


def keep(folder: Path, part: str, module: nn.Module, pickled: bool = False) -> nn.Module:
    """The module, its weights saved as those of a step."""
    torch.manual_seed(5)
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)
    (folder / part).mkdir(exist_ok=True)
    if pickled:
        torch.save(module.state_dict(), folder / part / "pytorch_model.bin")
    else:
        save_file(module.state_dict(), folder / part / "model.safetensors")
    return module.eval().requires_grad_(False)


def hidden(oracle: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return oracle(**encoded(text)).last_hidden_state[0]  # type: ignore[no-any-return]


def pooled(oracle: Any, text: str) -> torch.Tensor:
    """The mean [1, width] of a text's hidden states."""
    states = hidden(oracle, text)
    return (states.sum(dim=0) / len(states))[None]


@pytest.fixture
def opened(tmp_path: Path, streamed: Any) -> Any:
    """`opened(files)`: BERT with these files, in the smallest budget, and transformers' own."""
    return lambda files: open_both(tmp_path, streamed, BERT, files)


@pytest.mark.parametrize("pickled", [False, True])
def test_steps_after_pooling_follow_in_their_order(pickled: bool, opened: Any, tmp_path: Path) -> None:
    files = steps("Dense", "LayerNorm", "Dropout", "Dense", "Normalize")
    files["2_Dense/config.json"] = dense(32, 16)  # Tanh, unless it names another
    files["3_LayerNorm/config.json"] = {"dimension": 16}
    files["5_Dense/config.json"] = dense(16, 8, "linear.Identity", use_residual=True)
    first = keep(tmp_path, "2_Dense", nn.ModuleDict({"linear": nn.Linear(32, 16)}), pickled)
    norm = keep(tmp_path, "3_LayerNorm", nn.ModuleDict({"norm": nn.LayerNorm(16)}), pickled)
    last = nn.ModuleDict({"linear": nn.Linear(16, 8), "residual": nn.Linear(16, 8, bias=False)})
    keep(tmp_path, "5_Dense", last, pickled)
    model, oracle = opened(files)
    with Session(model) as session:
        found, short = session.embed(TEXTS), session.embed(TEXTS, dimensions=4)
        plain = session.embed(TEXTS[0], normalize=False)
    for text, vector, cut in zip(TEXTS, found, short, strict=True):
        value = norm["norm"](first["linear"](pooled(oracle, text)).tanh())
        expected = last["linear"](value) + last["residual"](value)
        assert torch.equal(vector, nn.functional.normalize(expected, dim=-1)[0])
        assert torch.equal(cut, nn.functional.normalize(expected[:, :4], dim=-1)[0])
        if text == TEXTS[0]:
            assert torch.equal(plain, expected[0])


@pytest.mark.parametrize("name", ["activation.ReLU", "activation.GELU", "activation.Sigmoid", "linear.Identity"])
def test_the_activation_is_the_one_that_the_step_names(name: str, opened: Any, tmp_path: Path) -> None:
    files = {**steps("Dense"), "2_Dense/config.json": dense(32, 32, name, bias=False, use_residual=True)}
    module = keep(tmp_path, "2_Dense", nn.ModuleDict({"linear": nn.Linear(32, 32, bias=False)}))
    model, oracle = opened(files)
    with Session(model) as session:
        found = session.embed(TEXTS[0])
    own = pooled(oracle, TEXTS[0])
    activation = getattr(nn, name.rpartition(".")[2])()
    assert torch.equal(found, (activation(module["linear"](own)) + own)[0])


def test_a_step_for_several_poolings_refuses_one(opened: Any, tmp_path: Path) -> None:
    files = {**steps("Dense", pooling={"pooling_mode": ["mean", "max"]}), "2_Dense/config.json": dense(64, 8)}
    keep(tmp_path, "2_Dense", nn.ModuleDict({"linear": nn.Linear(64, 8)}))
    model, _ = opened(files)
    with Session(model) as session:
        assert session.embed(TEXTS).shape == (len(TEXTS), 8)
        with pytest.raises(errors.ConfigurationError, match="takes vectors of 64 values, and they have 32 with this pooling"):
            session.embed(TEXTS, pooling="mean")


def test_a_normalize_before_the_last_step_stays_there(opened: Any, tmp_path: Path) -> None:
    files = {**steps("Normalize", "Dense"), "3_Dense/config.json": dense(32, 8, "linear.Identity")}
    module = keep(tmp_path, "3_Dense", nn.ModuleDict({"linear": nn.Linear(32, 8)}))
    model, oracle = opened(files)
    with Session(model) as session:
        found = session.embed(TEXTS[1])
        longer = session.embed(TEXTS[1], normalize=True)
    expected = module["linear"](nn.functional.normalize(pooled(oracle, TEXTS[1]), dim=-1))
    assert torch.equal(found, expected[0])
    assert torch.equal(longer, nn.functional.normalize(expected, dim=-1)[0])


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken"])
def test_a_prompt_that_pooling_leaves_out_is_read_and_not_counted(pooling: str, opened: Any) -> None:
    prompts = {"prompts": {"query": "w60 w61 "}, "default_prompt_name": None}
    config = {"pooling_mode": pooling, "include_prompt": False}
    model, oracle = opened({**steps(pooling=config), "config_sentence_transformers.json": prompts})
    with Session(model) as session:
        found, ids = session.embed(TEXTS, prompt="query"), session.embed([[2, 5, 3]], prompt="query")
        padded, bare = session.embed(TEXTS, prompt="query", exact=False), session.embed(TEXTS[:1])
        assert torch.equal(ids, session.embed([[2, 5, 3]]))  # token ids have no prompt
    for text, vector in zip(TEXTS, found, strict=True):
        states = hidden(oracle, f"w60 w61 {text}")
        own, weights = states[3:], torch.arange(4.0, len(states) + 1)[:, None]  # [CLS], and two words
        expected = {
            "mean": own.mean(dim=0),
            "cls": own[0],
            "max": own.amax(dim=0),
            "weightedmean": (own * weights).sum(dim=0) / weights.sum(),
            "mean_sqrt_len_tokens": own.sum(dim=0) / len(own) ** 0.5,
            "lasttoken": own[-1],
        }[pooling]
        torch.testing.assert_close(vector, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded, found, rtol=1e-5, atol=1e-6)
    assert not torch.equal(bare, found[:1])


def test_windows_of_a_long_text_count_the_prompt_in_none_of_them(opened: Any) -> None:
    files = steps(pooling={"pooling_mode": "mean", "include_prompt": False})
    model, oracle = opened({**files, "sentence_bert_config.json": {"max_seq_length": 20}})
    with Session(model) as session:
        found = session.embed(LONG, prompt="w60 w61 ", stride=6)
        with pytest.raises(
            errors.ConfigurationError, match="windows have 20 tokens, and a prompt of 15, which pooling leaves out"
        ):
            session.embed(LONG, prompt="w60 " * 14, stride=6)
    split = pieces_of_words(96)(f"w60 w61 {LONG}", truncation=True, max_length=20, stride=6, return_overflowing_tokens=True)
    with torch.no_grad():
        every = torch.cat([oracle(torch.tensor([ids])).last_hidden_state[0] for ids in split["input_ids"]])
    torch.testing.assert_close(found, every[3:].mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kinds", "config", "message"),
    [
        (["CNN"], None, "steps that are not supported: CNN"),
        (["sentence_transformers.base.modules.router.Router"], None, "steps that are not supported: Router"),
        (["StaticEmbedding", "Dense"], None, "steps that are not supported: StaticEmbedding"),
        (["pylate.models.Dense.Dense"], None, r"steps that are not supported: pylate\.models\.Dense\.Dense"),
        (["Dense", "Pooling"], None, "steps in an order that is not supported: Transformer, Pooling, Dense, Pooling"),
        (["Dense"], dense(32, 8, "activation.MultiheadAttention"), "MultiheadAttention, which is not supported"),
        (["Dense"], dense(32, 8, module_input_name="token_embeddings"), "module_input_name 'token_embeddings', which is not"),
        (["Dense"], {**dense(32, 8), "activation_function": "os.getcwd"}, "activation os.getcwd, which is not supported"),
    ],
    ids=str,
)
def test_a_step_that_is_not_supported_is_named(kinds: list[str], config: Any, message: str, opened: Any, tmp_path: Path) -> None:
    files = {**steps(*kinds), **({} if config is None else {"2_Dense/config.json": config})}
    if config is not None:
        keep(tmp_path, "2_Dense", nn.ModuleDict({"linear": nn.Linear(32, 8)}))
    model, _ = opened(files)
    with Session(model) as session, pytest.raises(errors.ConfigurationError, match=message):
        session.embed("w5")


def test_weights_of_a_step_that_do_not_fit_are_named(opened: Any, tmp_path: Path) -> None:
    keep(tmp_path, "2_Dense", nn.ModuleDict({"linear": nn.Linear(32, 9)}))
    model, _ = opened({**steps("Dense"), "2_Dense/config.json": dense(32, 8)})
    with Session(model) as session:
        with pytest.raises(errors.DamagedCheckpointError, match=r"2_Dense/config.json needs linear.weight of \[8, 32\]"):
            session.embed("w5")
        (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"nothing")
        with pytest.raises(errors.DamagedCheckpointError, match=r"2_Dense/model.safetensors is not a complete"):
            session.embed("w5")
        (tmp_path / "2_Dense" / "model.safetensors").unlink()
        with pytest.raises(errors.MissingFileError, match=r"2_Dense/pytorch_model.bin is missing"):
            session.embed("w5")
