"""config.json, generation_config.json and tokenizer files with anything in them: a named error, or what transformers makes."""

from __future__ import annotations

import copy
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import talking
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rabbit_engine import AutoModel, errors
from rabbit_engine.architectures import build_skeleton
from rabbit_engine.architectures.configfile import read_config
from rabbit_engine.checkpoints import open_request
from rabbit_engine.cli.app import app
from rabbit_engine.config import SourceConfig, SplitConfig
from rabbit_engine.model.runtime import runtime_of


def _tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel(vocab={f"w{index}": index for index in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(LlamaConfig(**talking.SIZES)).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llama"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


UNREADABLE = {
    "empty": b"",
    "cut": b"{",
    "list": b"[]",
    "text": b'"x"',
    "null": b"null",
    "web page": b"<html>404</html>",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "deep": b'{"a":' * 100_000,
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_a_config_that_cannot_be_read_is_damage(text: bytes, llama: Path) -> None:
    (llama / "config.json").write_bytes(text)
    with pytest.raises(errors.DamagedCheckpointError, match=r"config\.json") as caught:
        AutoModel.from_pretrained(llama, device="cpu")
    assert isinstance(caught.value, OSError)  # as transformers raises it


VALUES = {
    "hidden_act": "nope",
    "rope_parameters": {"rope_type": "nope", "rope_theta": 1e4},
    "hidden_size": -32,
    "vocab_size": 0,
    "pad_token_id": 10**6,
    "num_attention_heads": 0,
    "num_key_value_heads": [1],
    "head_dim": 0,
    "intermediate_size": 2**70,
    "rms_norm_eps": {},
    "quantization_config": 3,
    "text_config": 3,
    "attn_implementation": 1,
    "base_model_tp_plan": True,
    "sliding_window": "x",
    "output_hidden_states": float("inf"),
    "is_encoder_decoder": True,
    "transformers_weights": "other.safetensors",
    "dtype": [0, 0],
    "num_labels": 10**7,
}


@pytest.mark.parametrize("key", VALUES)
def test_a_value_that_makes_no_model_is_refused_by_its_key(key: str, llama: Path) -> None:
    edit(llama / "config.json", **{key: VALUES[key]})
    with pytest.raises(ValueError, match=key) as caught:
        AutoModel.from_pretrained(llama, device="cpu")
    assert isinstance(caught.value, errors.RabbitError)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 10**20},
        {"max_position_embeddings": -(10**20)},
        {"eos_token_id": [95, 2**63]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**25}},
    ],
    ids=json.dumps,
)
def test_a_number_of_more_than_64_bits_is_refused_by_its_key(fields: dict[str, Any], llama: Path) -> None:
    edit(llama / "config.json", **fields)
    key = next(reversed(fields.get("rope_parameters", fields)))
    with pytest.raises(
        errors.UnsupportedArchitectureError, match=rf"config\.json has {key}=-?\d+, which does not fit in 64 bits"
    ):
        AutoModel.from_pretrained(llama, device="cpu")


def test_a_tokenizer_s_length_in_a_config_may_be_no_limit(llama: Path) -> None:
    edit(llama / "config.json", model_max_length=int(1e30), sliding_window=2**40)
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        assert model.config.sliding_window == 2**40


def test_a_value_that_lets_no_buffer_be_made_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", time_step_min=-0.001)
    with pytest.raises(
        errors.UnsupportedArchitectureError, match=r"MambaForCausalLM cannot create its buffers from .*config\.json: ValueError"
    ):
        AutoModel.from_pretrained(tmp_path, device="cpu")


def test_a_key_that_lets_no_pass_work_is_found_among_experts(tmp_path: Path) -> None:
    config = MixtralConfig(**talking.SIZES, num_local_experts=4, num_experts_per_tok=9)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedArchitectureError, match="at fault is num_experts_per_tok=9"):
        AutoModel.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("split", ["auto", "always"])
@pytest.mark.parametrize("layers", [3_000_000, 5000, 10**12])
def test_layers_that_the_files_do_not_hold_are_refused_at_once(layers: int, split: str, llama: Path) -> None:
    edit(llama / "config.json", num_hidden_layers=layers)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"num_hidden_layers={layers}"):
        AutoModel.from_pretrained(llama, device="cpu", split=split)
    assert time.monotonic() - start < 3


def test_plan_refuses_what_loading_refuses(llama: Path) -> None:
    edit(llama / "config.json", hidden_act="nope")
    result = CliRunner().invoke(app, ["plan", str(llama), "--device", "cpu"])
    assert isinstance(result.exception, errors.UnsupportedArchitectureError)
    assert "hidden_act='nope'" in str(result.exception)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int64", "bool", "complex64", "float31", torch.float8_e4m3fn])
def test_a_dtype_that_nothing_computes_in_is_refused_by_name(dtype: Any, llama: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match=r'bfloat16.*"float32"'):
        AutoModel.from_pretrained(llama, device="cpu", dtype=dtype)
    edit(llama / "config.json", dtype=str(dtype).removeprefix("torch."))
    with pytest.raises(errors.RabbitError, match=r"config\.json"):
        AutoModel.from_pretrained(llama, device="cpu")


def test_a_requested_dtype_wins_over_one_in_the_config_that_cannot_run(llama: Path, ids: torch.Tensor) -> None:
    expected = transformers.LlamaForCausalLM.from_pretrained(llama)(ids).logits
    edit(llama / "config.json", dtype="float8_e4m3fn")
    with AutoModel.from_pretrained(llama, device="cpu", dtype="float32") as model:
        torch.testing.assert_close(model(ids).logits, expected)


def test_building_changes_no_config() -> None:
    config = LlamaConfig(**talking.SIZES, quantization_config=None)
    before = copy.deepcopy(config.to_dict())
    build_skeleton(transformers.LlamaForCausalLM, config, torch.bfloat16, "eager")
    assert (config.to_dict(), config._attn_implementation) == (before, None)


def test_the_checkpoint_s_head_dim_changes_no_config(saved: Path, llama: Path, ids: torch.Tensor) -> None:
    expected = transformers.LlamaForCausalLM.from_pretrained(saved)(ids).logits
    edit(llama / "config.json", head_dim=4)
    request = open_request(llama, SourceConfig(), SplitConfig())
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        torch.testing.assert_close(model(ids).logits, expected)
        assert runtime_of(model).architecture.config.head_dim == request.architecture.config.head_dim == 4
        assert model.config.head_dim == 8


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_a_generation_config_that_cannot_be_read_is_damage(text: bytes, llama: Path) -> None:
    (llama / "generation_config.json").write_bytes(text)
    with pytest.raises(errors.DamagedCheckpointError, match=r"generation_config\.json"):
        AutoModel.from_pretrained(llama, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "</s>"),
        ("eos_token_id", [95, "x"]),
        ("pad_token_id", [0]),
        ("pad_token_id", {}),
        ("max_new_tokens", "20"),
        ("max_length", [20]),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("stop_strings", [1]),
        ("suppress_tokens", 5),
        ("bad_words_ids", [5]),
        ("cache_implementation", 5),
        ("watermarking_config", "x"),
        ("watermarking_config", {"bias": "x"}),
        ("eos_token_id", 2**63),
        ("eos_token_id", [3, -(10**20)]),
        ("pad_token_id", 10**20),
        ("bos_token_id", 10**20),
        ("forced_bos_token_id", -1),
        ("forced_bos_token_id", True),
        ("forced_eos_token_id", -1),
        ("forced_eos_token_id", True),
        ("forced_eos_token_id", []),
        ("forced_eos_token_id", [3, -1]),
        ("forced_eos_token_id", 96),
        ("forced_eos_token_id", [3, 96]),
        ("min_length", 5.0),
        ("min_new_tokens", 2.0),
        ("encoder_no_repeat_ngram_size", 2.0),
        ("no_repeat_ngram_size", 2.0),
        ("num_beams", 0),
        ("num_beams", False),
        ("num_beams", 2.0),
        ("num_return_sequences", 2.0),
        ("max_new_tokens", 0),
        ("max_length", -1),
        ("max_length", True),
        ("top_k", True),
        ("no_repeat_ngram_size", True),
        ("suppress_tokens", [True]),
        ("bad_words_ids", [[True]]),
        ("sequence_bias", {"a": 1.0}),
        ("sequence_bias", [[3, 1.0]]),
        ("sequence_bias", [[[3]]]),
        ("sequence_bias", [[[True], 1.0]]),
        ("sequence_bias", [[[3], 1]]),
        ("exponential_decay_length_penalty", [2]),
        ("exponential_decay_length_penalty", [2, "x"]),
    ],
)
def test_a_generation_value_of_another_type_is_refused_by_its_key(key: str, value: Any, llama: Path) -> None:
    edit(llama / "generation_config.json", **{key: value})
    with pytest.raises(errors.DamagedCheckpointError, match=rf"generation_config\.json .*{key}"):
        AutoModel.from_pretrained(llama, device="cpu")


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": [95, -1], "pad_token_id": -1, "bos_token_id": True},
        {"eos_token_id": [], "num_beams": 1.0},
        {"num_beams": True, "num_return_sequences": 0, "min_length": -1, "min_new_tokens": True},
        {"min_length": 0.0, "no_repeat_ngram_size": 0.0, "top_k": 50.0, "forced_eos_token_id": 95},
        {"suppress_tokens": [-1, 7], "forced_eos_token_id": [95], "sequence_bias": [[[3, 5], 1.0], [[3], 2.0]]},
    ],
    ids=json.dumps,
)
def test_an_odd_generation_value_that_transformers_runs_with_runs(fields: dict[str, Any], llama: Path, ids: torch.Tensor) -> None:
    edit(llama / "generation_config.json", **fields)
    expected = transformers.LlamaForCausalLM.from_pretrained(llama).generate(ids, max_new_tokens=4)
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        assert model.generate(ids, max_new_tokens=4).tolist() == expected.tolist()


def test_an_answer_with_no_token_that_ends_it_needs_no_padding(llama: Path, ids: torch.Tensor) -> None:
    edit(llama / "generation_config.json", eos_token_id=None, pad_token_id=None)
    expected = transformers.LlamaForCausalLM.from_pretrained(llama).generate(ids, max_new_tokens=4)
    edit(llama / "generation_config.json", eos_token_id=[])
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        assert model.generate(ids, max_new_tokens=4).tolist() == expected.tolist()


def test_a_generation_config_of_the_right_types_generates_as_transformers(llama: Path, ids: torch.Tensor) -> None:
    edit(llama / "generation_config.json", eos_token_id=[95, 3], max_new_tokens=4.0, top_k=50, temperature=1, suppress_tokens=[7])
    expected = transformers.LlamaForCausalLM.from_pretrained(llama).generate(ids, max_new_tokens=4)
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        assert model.generate(ids, max_new_tokens=4).tolist() == expected.tolist()


def _future(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "model": {**raw["model"], "type": "FutureBPE"}}


def _negative(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "model": {**raw["model"], "vocab": {**raw["model"]["vocab"], "w5": -5}}}


TOKENIZERS = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "a web page": lambda _: "<html>404</html>",
    "an empty object": lambda _: "{}",
    "a list": lambda _: "[]",
    "another version": lambda text: json.dumps(_future(json.loads(text))),
    "a negative id": lambda text: json.dumps(_negative(json.loads(text))),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_damaged_tokenizer_is_named_and_the_model_runs(damage: str, llama: Path, ids: torch.Tensor) -> None:
    path = llama / "tokenizer.json"
    path.write_text(TOKENIZERS[damage](path.read_text("utf-8")), "utf-8")
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        with pytest.raises(errors.TokenizerNotFoundError, match=f"{llama}.*set model.tokenizer") as caught:
            _ = model.tokenizer
        assert isinstance(caught.value, OSError)
        assert model(ids).logits.shape == (1, 12, 96)
        _tokenizer(llama)
        assert model.tokenizer("w3 w4")["input_ids"] == [3, 4]


def test_threads_that_ask_for_the_tokenizer_at_the_same_time_get_the_same_one(llama: Path) -> None:
    _tokenizer(llama)
    with AutoModel.from_pretrained(llama, device="cpu") as model, ThreadPoolExecutor(4) as pool:
        together = Barrier(4)
        found = list(pool.map(lambda _: (together.wait(), model.tokenizer)[1], range(4)))
    assert all(tokenizer is found[0] for tokenizer in found)


@pytest.mark.parametrize("value", ["x", [], {}, [5]])
def test_a_tokenizer_s_length_of_another_type_is_named_when_it_is_loaded(value: Any, llama: Path) -> None:
    edit(llama / "tokenizer_config.json", model_max_length=value)
    with AutoModel.from_pretrained(llama, device="cpu") as model:
        with pytest.raises(errors.TokenizerNotFoundError, match=r"tokenizer_config\.json has model_max_length="):
            _ = model.tokenizer
        edit(llama / "tokenizer_config.json", model_max_length=None)
        assert model.tokenizer("w3 w4")["input_ids"] == [3, 4]


@pytest.mark.parametrize("value", [[], [1], "x", 3, None, {"tokenizer_class": 5}, {"tokenizer_class": []}])
def test_a_tokenizer_config_of_another_type_is_named(value: Any, llama: Path) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps(value), "utf-8")
    with AutoModel.from_pretrained(llama, device="cpu") as model, pytest.raises(errors.TokenizerNotFoundError, match=str(llama)):
        _ = model.tokenizer


def test_the_experts_of_doge_are_plausible(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "doge", "num_experts": 16384}', encoding="utf-8")
    assert read_config(tmp_path)["num_experts"] == 16_384
